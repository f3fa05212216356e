"""A router among several: the shell around ``router.succession``.

    register ◄──look, claim── candidate ──watch──► the leader's listener
                                  │
                                  └──lead(), step_down()──► RouterService

It says who leads to everybody who asks (``Seek``), and passes control questions that come to a
standby on to the leader.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol, assert_never

from pdserve.cluster.silence import BEATS, listen
from pdserve.cluster.terms import Register
from pdserve.errors import PdserveError, StoreUnavailable
from pdserve.ids import HostId
from pdserve.messages import Address, Consult, Consulted, Following, Leading, Seek, Standby
from pdserve.router import succession
from pdserve.router.succession import (
    Claim,
    Deposed,
    Doing,
    Found,
    Gone,
    Lead,
    Look,
    Outcome,
    Term,
    Unanswered,
    Watch,
)
from pdserve.wire.connection import Connection, connect
from pdserve.wire.tls import TlsContext

log = logging.getLogger(__name__)

AGAIN_S = 0.05
"""Before the register, or a leader that does not lead yet, is asked again."""

REGISTER_S = 2.0
"""How often a leader asks the register whether it still is one. Whom everybody can reach but the
standby learns in no other way that it was succeeded."""

CONNECT_S = 1.0
CONSULT_S = 2.0
STANDBYS_MAX = 8


class Office(Protocol):
    """What comes with leading; ``RouterService``, or a fake."""

    def lead(self) -> None:
        """With nothing in the books: whoever is served comes and says so."""
        ...

    def step_down(self) -> None: ...
    def say_to_all(self, message: Leading) -> None: ...


class Candidate:
    def __init__(
        self,
        register: Register,
        own: Address,
        office: Office,
        *,
        host: HostId,
        silence_s: float,
        answer: Callable[[str, str], str],
        tls: TlsContext | None = None,
    ) -> None:
        """
        Args:
            own: where this router listens.
            answer: to a control question with its argument, from the leader's own figures.
            tls: for a leader on another host; None: TCP is plain.
        """
        self._register = register
        self._own = own
        self._office = office
        self._host = host
        self._silence_s = silence_s
        self._answer = answer
        self._tls = tls
        self._doing: Doing = Look()
        self._epoch = 0  # the youngest that was heard of
        self._standbys: dict[Connection, Address] = {}
        self._leader: Connection | None = None  # to whom questions are passed on
        self._settled = asyncio.Event()  # somebody is known to lead
        self._deposed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @property
    def leads(self) -> bool:
        return isinstance(self._doing, Lead)

    @property
    def epoch(self) -> int:
        """The youngest that it has heard of."""
        return self._epoch

    @property
    def leader(self) -> Address | None:
        match self._doing:
            case Lead():
                return self._own
            case Watch(term):
                return term.leader
        return None

    @property
    def standbys(self) -> tuple[Address, ...]:
        """Who watches, where this one leads."""
        return tuple(self._standbys.values())

    # ── what others ask ──────────────────────────────────────────────────────────────────────────

    def sought(self, seek: Seek) -> Leading | Following:
        match self._doing:
            case Lead(epoch) if seek.epoch <= epoch:
                return self._leading(epoch)
            case Lead(epoch):
                log.warning("epoch %d is over: somebody has heard of %d", epoch, seek.epoch)
                self._deposed.set()
                return Following(seek.epoch, None)
        return Following(self._epoch, self.leader)

    async def stand_by(self, standby: Standby, connection: Connection) -> None:
        """Serves a standby that watches us, until it hangs up."""
        if len(self._standbys) >= STANDBYS_MAX:
            log.warning("%d standbys are here already", STANDBYS_MAX)
            return
        self._standbys[connection] = standby.address
        self._say()
        try:
            while True:
                frame = await connection.receive()
                if isinstance(frame.message, Consult):
                    question = frame.message
                    text = self._answer(question.question, question.argument)
                    await connection.answer(frame, Consulted(), [text.encode()])
        finally:
            del self._standbys[connection]
            self._say()

    async def ask(self, question: str, argument: str = "") -> str:
        """The leader's answer to a control question.

        Raises:
            StoreUnavailable: nobody leads.
        """
        try:
            async with asyncio.timeout(CONSULT_S):
                await self._settled.wait()
                if self.leads:
                    return self._answer(question, argument)
                leader = self._leader
                if leader is not None:
                    consult = Consult(question, argument)
                    frame = await leader.call(consult, timeout_s=CONSULT_S)
                    return bytes(frame.body).decode()
        except (TimeoutError, PdserveError, OSError) as error:
            raise StoreUnavailable(f"the router that leads does not answer: {error}") from error
        raise StoreUnavailable("no router leads at this moment; try again")

    # ── what it does itself ──────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        while True:
            outcome = await self._do(self._doing)
            self._doing = succession.next_doing(self._doing, outcome, self._own)

    async def _do(self, doing: Doing) -> Outcome:
        match doing:
            case Look(again):
                if again:
                    await asyncio.sleep(AGAIN_S)
                return await self._asked(None)
            case Claim(epoch):
                return await self._asked(Term(epoch, self._own))
            case Watch(term):
                return await self._watch(term)
            case Lead(epoch):
                return await self._lead(epoch)
            case _:
                assert_never(doing)

    async def _asked(self, claimed: Term | None) -> Outcome:
        try:
            if claimed is None:
                term = await self._register.latest()
            else:
                term = await self._register.claim(claimed)
        except StoreUnavailable as error:
            log.debug("%s", error)
            return Unanswered()
        if term is not None:
            self._epoch = max(self._epoch, term.epoch)
        return Found(term)

    async def _watch(self, term: Term) -> Outcome:
        connection: Connection | None = None
        try:
            connection = await connect(
                term.leader, host=self._host, timeout_s=CONNECT_S, ssl_context=self._tls
            )
            answer = await connection.call(Seek(self._epoch), timeout_s=self._silence_s)
            if not isinstance(answer.message, Leading) or answer.message.epoch < term.epoch:
                return Deposed()
            await connection.send(Standby(self._own))
            log.info("standing by in epoch %d", term.epoch)
            self._leader = connection
            self._settled.set()
            await listen(connection, lambda _: None, silence_s=self._silence_s)
        except (PdserveError, OSError, TimeoutError) as error:
            log.info("the leader of epoch %d is gone: %s", term.epoch, error)
        finally:
            self._settled.clear()
            self._leader = None
            if connection is not None:
                connection.abort()
        return Gone()

    async def _lead(self, epoch: int) -> Outcome:
        log.info("leading in epoch %d", epoch)
        self._epoch = max(self._epoch, epoch)
        self._deposed.clear()
        self._office.lead()
        self._settled.set()
        looking = asyncio.create_task(self._look_regularly(epoch))
        beating = asyncio.create_task(self._beat())
        try:
            await self._deposed.wait()
        finally:
            self._settled.clear()
            looking.cancel()
            beating.cancel()
            self._office.step_down()
        return Deposed()

    async def _look_regularly(self, epoch: int) -> None:
        while True:
            await asyncio.sleep(REGISTER_S)
            found = await self._asked(None)
            if isinstance(found, Found) and found.term is not None and found.term.epoch > epoch:
                log.warning("epoch %d is over: the register has %d", epoch, found.term.epoch)
                self._deposed.set()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._silence_s / BEATS)
            self._say()

    def _say(self) -> None:
        if isinstance(self._doing, Lead):
            self._office.say_to_all(self._leading(self._doing.epoch))

    def _leading(self, epoch: int) -> Leading:
        return Leading(epoch, self.standbys)
