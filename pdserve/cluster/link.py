"""The one connection a gateway or a worker keeps to the router that leads.

It survives the router: when the connection breaks or falls silent, the link looks for the one who
leads now, first where the last one said its standbys are, then where the cluster says. It connects
again, says hello again, and only then sends what waited. What waited is bounded, in messages and in
bytes; a link that cannot reach a router for that long has a bigger problem than lost load reports.

A router leads in an epoch. Of an older one than it has heard of a link takes nothing.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from pdserve.cluster.silence import listen
from pdserve.errors import Disconnected, PdserveError
from pdserve.ids import HostId
from pdserve.messages import Address, Following, Leading, Seek
from pdserve.wire.connection import Connection, connect
from pdserve.wire.outbox import Outbox
from pdserve.wire.tls import TlsContext

log = logging.getLogger(__name__)

RETRY_S = 0.05
RETRY_S_MAX = 1.0

SEEK_S = 1.0
"""For a router to be reached, and again for it to say whether it leads."""

KNOWN_ROUNDS = 20
"""Rounds among those who are known and answer, before the cluster is asked who else there is. They
last a second, in which a standby takes over many times."""


class Person(Protocol):
    """Who holds the link: what it says first, and what it does with what it hears."""

    def hello(self) -> object: ...
    def hear(self, message: object) -> None: ...
    def reconnected(self) -> None:
        """Called after hello on every connection but the first."""
        ...


class RouterLink:
    def __init__(
        self,
        person: Person,
        *,
        find_router: Callable[[], Awaitable[Address]],
        host: HostId,
        silence_s: float = 3.0,
        tls: TlsContext | None = None,
    ) -> None:
        """
        Args:
            find_router: any of the routers, as far as the cluster knows; it may take long to say.
            silence_s: a router that says nothing for so long is gone.
            tls: for a router on another host; None: TCP is plain.
        """
        self._person = person
        self._find_router = find_router
        self._host = host
        self._silence_s = silence_s
        self._tls = tls
        self._epoch = 0  # the youngest that was heard of
        self._known: list[Address] = []  # where to look first, the likeliest first
        self._outbox = Outbox()
        self._task: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()
        self._connection: Connection | None = None  # once hello has been said on it

    async def start(self, *, timeout_s: float) -> None:
        """Connects for the first time.

        Raises:
            TimeoutError: no router answered within ``timeout_s``.
        """
        self._task = asyncio.create_task(self._run())
        await asyncio.wait_for(self._connected.wait(), timeout_s)

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    def post(self, message: object) -> None:
        """Sends in order, later. Never blocks.

        Raises:
            QueueFull: the router has not taken anything for as much as an outbox holds.
            MessageTooLarge: no frame can carry it.
        """
        self._outbox.put(message, peer="the router", retry_after_ms=1000)

    def post_now(self, message: object) -> None:
        """``post``; where nothing waits before it, it leaves in this turn of the event loop.

        Raises:
            QueueFull, MessageTooLarge: as ``post``.
        """
        connection = self._connection
        if connection is None or self._outbox or not connection.send_now(message):
            self.post(message)

    def begin_anew(self) -> None:
        """Drops what waits, and the connection: to the router its holder is lost, and comes again
        with the next hello."""
        self._outbox.clear()
        if self._connection is not None:
            self._connection.abort()

    async def close(self) -> None:
        """Sends what waits, then hangs up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while self._connected.is_set() and self._outbox:
                    await asyncio.sleep(0.005)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        first = True
        while True:
            connection = await self._search()
            try:
                await connection.send(self._person.hello())
                self._connected.set()
                if not first:
                    log.warning("connected to the router of epoch %d", self._epoch)
                    self._person.reconnected()
                first = False
                await self._converse(connection)
            except (PdserveError, OSError) as error:
                log.warning("lost the router: %s", error)
            finally:
                self._connected.clear()
                await connection.close()

    async def _search(self) -> Connection:
        """A connection to the router that leads."""
        retry_s, round_count = RETRY_S, 0
        while True:
            answered = False
            for address in self._known:
                try:
                    return await self._seek(address)
                except _Elsewhere as elsewhere:
                    answered = True
                    leader = elsewhere.leader
                    if leader is not None and leader not in self._known:
                        self._known.insert(0, leader)
                        break
                except (PdserveError, OSError, TimeoutError) as error:
                    log.debug("no router at %s: %s", address, error)
            round_count += 1
            if not answered or round_count > KNOWN_ROUNDS:
                self._known, round_count = await self._asked_for(), 0
                if not self._known:
                    await asyncio.sleep(retry_s)
                    retry_s = min(2 * retry_s, RETRY_S_MAX)
            await asyncio.sleep(RETRY_S)

    async def _asked_for(self) -> list[Address]:
        try:
            return [await self._find_router()]
        except (PdserveError, OSError, TimeoutError) as error:
            log.debug("no router yet: %s", error)
            return []

    async def _seek(self, address: Address) -> Connection:
        """
        Raises:
            _Elsewhere: who is there does not lead.
            PdserveError, OSError, TimeoutError: nobody is there.
        """
        connection = await connect(
            address, host=self._host, timeout_s=SEEK_S, ssl_context=self._tls
        )
        try:
            frame = await connection.call(Seek(self._epoch), timeout_s=SEEK_S)
            match frame.message:
                case Leading(epoch) as leading if epoch >= self._epoch:
                    self._note(leading, address)
                    return connection
                case Following(_, leader):
                    raise _Elsewhere(leader)
                case _:
                    raise _Elsewhere(None)
        except BaseException:
            connection.abort()
            raise

    def _note(self, leading: Leading, address: Address) -> None:
        self._epoch = leading.epoch
        self._known = [*(a for a in leading.standbys if a != address), address]

    async def _converse(self, connection: Connection) -> None:
        leader = self._known[-1]

        def hear(message: object) -> None:
            if isinstance(message, Leading):
                self._note(message, leader)
            else:
                self._person.hear(message)

        sender = asyncio.create_task(self._send(connection))
        self._connection = connection
        try:
            await listen(connection, hear, silence_s=self._silence_s)
        finally:
            self._connection = None
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, PdserveError, OSError):
                await sender

    async def _send(self, connection: Connection) -> None:
        while True:
            await connection.send_encoded(await self._outbox.take())


class _Elsewhere(Disconnected):
    """Who was asked does not lead."""

    def __init__(self, leader: Address | None) -> None:
        super().__init__(f"another router leads, at {leader}")
        self.leader = leader
