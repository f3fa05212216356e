"""The router as a process: a listener around ``router.core``. It decides nothing.

Every connection says hello first, as a gateway or as a worker; from then on its frames are events
of the core, and the core's commands are frames to others. A closed connection is an event too: it
is how a dead worker is noticed at once, whatever killed it.

Where there are several routers one leads, which is a ``Candidate``'s business; the others have no
core, take no hello, and tell whoever comes where to go.
"""

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import assert_never

from pdserve.clock import MS, S, monotonic
from pdserve.cluster.candidate import Candidate
from pdserve.cluster.recording import Recorder
from pdserve.cluster.terms import Register
from pdserve.errors import (
    ConfigError,
    ErrorInfo,
    MessageTooLarge,
    PdserveError,
    QueueFull,
    StoreUnavailable,
)
from pdserve.ids import HostId, WorkerId
from pdserve.kvstore.security import Credentials
from pdserve.lifecycle import Event
from pdserve.messages import (
    Address,
    Cancel,
    Dispatch,
    GatewayHello,
    Goodbye,
    Hello,
    Leading,
    Parked,
    Refused,
    Report,
    Request,
    Resume,
    Seek,
    Standby,
    Submit,
    WorkerFailed,
)
from pdserve.router.core import Command, RouterCore, ToGateway, ToWorker
from pdserve.router.costs import CostModel
from pdserve.router.duties import Duty
from pdserve.router.scaling import Observation
from pdserve.router.snapshot import RouterSnapshot
from pdserve.router_config import RouterConfig
from pdserve.vitals import Vitals
from pdserve.wire.connection import Connection
from pdserve.wire.hearing import hear_all
from pdserve.wire.listener import Listener
from pdserve.wire.outbox import Outbox

log = logging.getLogger(__name__)

TICK_S_MAX = 0.25

ASLEEP_S = 0.5
"""A tick later than that means that this process was stopped, or starved."""

UNFETCHED_S_MAX = 10.0
"""A recording that nobody fetches for so long is given up."""


class _Peer:
    """One connection's outbox: the core never waits for a socket. A peer that is a whole outbox
    behind is as good as gone, and hung up on."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outbox = Outbox()

    def post(self, message: object) -> None:
        """Sends it now, or as soon as what was posted before it has left.

        Raises:
            QueueFull: it has left an outbox full unread.
            MessageTooLarge: no frame can carry it.
        """
        if not self._outbox and self._connection.send_now(message):
            return
        self._outbox.put(message, peer=self._connection.peer, retry_after_ms=0)

    async def pump(self) -> None:
        with contextlib.suppress(PdserveError, OSError):
            while True:
                await self._connection.send_encoded(await self._outbox.take())

    async def hang_up(self) -> None:
        await self._connection.close()


def _no_answer(question: str, _: str) -> str:
    raise StoreUnavailable(f"this router answers no questions, and was asked {question!r}")


class RouterService:
    def __init__(
        self,
        settings: RouterConfig,
        *,
        host: HostId,
        register: Register,
        costs: CostModel | None = None,
        answer: Callable[[str, str], str] = _no_answer,
    ) -> None:
        """
        Args:
            register: of who leads.
            answer: to a control question that came to a standby, with its argument.
        """
        self._settings = settings
        self._costs = costs
        self._core = RouterCore(settings, costs=costs)
        self._host = host
        self._register = register
        self._answer = answer
        self._candidate: Candidate | None = None  # from start() on
        # Who is told regularly that we lead, in the order in which they came.
        self._sought: dict[_Peer, None] = {}
        self._workers: dict[WorkerId, _Peer] = {}
        self._gateways: dict[Address, _Peer] = {}
        self._listener: Listener | None = None
        self._vitals = Vitals()
        self._ticker: asyncio.Task[None] | None = None
        self._hanging_up: set[asyncio.Task[None]] = set()
        self.hello: Hello | None = None  # of the last worker that came; all agree on the model
        self._recorder: Recorder | None = None
        self._recording = ""  # its name
        self._fetched_ns = 0

    async def start(
        self, directory: Path, *, tcp_host: str | None, credentials: Credentials | None = None
    ) -> Address:
        """``credentials``: for traffic with other hosts; None: TCP is plain."""
        credentials = credentials or Credentials()
        self._listener = await Listener.open(
            directory,
            f"router-{secrets.token_hex(4)}",
            host=self._host,
            serve=self._serve,
            tcp_host=tcp_host,
            ssl_context=credentials.ssl_context(server_side=True),
        )
        self._ticker = asyncio.create_task(self._tick())
        self._candidate = Candidate(
            self._register,
            self._listener.address,
            self,
            host=self._host,
            silence_s=self._settings.router_silence_ms / 1000,
            answer=self._answer,
            tls=credentials.ssl_context(server_side=False),
        )
        self._candidate.start()
        return self._listener.address

    @property
    def address(self) -> Address:
        assert self._listener is not None, "start() comes first"
        return self._listener.address

    @property
    def candidate(self) -> Candidate:
        assert self._candidate is not None, "start() comes first"
        return self._candidate

    @property
    def leads(self) -> bool:
        return self._candidate is not None and self._candidate.leads

    def leadership(self) -> dict[str, int]:
        """Who answers, for people."""
        return {
            "pid": os.getpid(),
            "epoch": self.candidate.epoch,
            "standbys": len(self.candidate.standbys),
            **self._vitals.figures(),
        }

    # ── a Candidate's office ─────────────────────────────────────────────────────────────────────

    def lead(self) -> None:
        self._core = RouterCore(self._settings, costs=self._costs)
        self.hello = None

    def step_down(self) -> None:
        """Everybody is hung up on, and finds the one who leads."""
        for peer in [*self._workers.values(), *self._gateways.values(), *self._sought]:
            self._hang_up(peer)

    def say_to_all(self, message: Leading) -> None:
        for peer in list(self._sought):
            self._post(peer, message)

    async def close(self) -> None:
        if self._candidate is not None:
            await self._candidate.close()
        if self._ticker is not None:
            self._ticker.cancel()
        if self._listener is not None:
            await self._listener.close()

    async def ask(self, question: str, argument: str = "") -> str:
        """The leader's answer to a control question.

        Raises:
            StoreUnavailable: no router leads at this moment.
        """
        return await self.candidate.ask(question, argument)

    def snapshot(self) -> RouterSnapshot:
        return self._core.snapshot(monotonic())

    def observation(self) -> Observation:
        return self._core.observation(monotonic())

    def assign(self, worker: str, duty: str) -> None:
        """Raises ConfigError where the worker cannot have that role."""
        if duty not in tuple(Duty):
            raise ConfigError(f"role is {duty!r}, must be one of {', '.join(Duty)}")
        log.info("%s: its role is %s from now on", worker, duty)
        self._carry_out(self._core.assign(WorkerId(worker), Duty(duty), monotonic()))

    def recording(self) -> dict[str, object]:
        """What has arrived since the last call; the first call begins a recording.

        Raises:
            StoreUnavailable: no worker has come yet, so nobody knows the size of a block.
        """
        self._fetched_ns = monotonic()
        if self._recorder is None:
            if self.hello is None:
                raise StoreUnavailable("no worker has come yet; try again when one has")
            self._recording = secrets.token_hex(4)
            self._recorder = Recorder(
                block_tokens=self.hello.block_tokens,
                began_ns=self._fetched_ns,
                tenant_key=secrets.token_bytes(16),
            )
        recorder = self._recorder
        return {
            "recording": self._recording,
            "lines": recorder.take_lines(),
            "lost": recorder.lost_count,
        }

    def _record(self, message: object) -> None:
        """Enter what a peer said, if anybody records."""
        recorder = self._recorder
        if recorder is None:
            return
        match message:
            case Submit(request):
                recorder.on_request(request, monotonic())
            case Cancel(request_id) | Refused(request_id):
                recorder.on_given_up(request_id)
            case Report(progress=events):
                for event in events:
                    if event.event is Event.ENDED:
                        recorder.on_ended(event.request, event.total_tokens)

    async def _serve(self, connection: Connection) -> None:
        peer = _Peer(connection)
        pump = asyncio.create_task(peer.pump())
        try:
            frame = await connection.receive()
            while isinstance(frame.message, Seek):
                answer = self.candidate.sought(frame.message)
                await connection.answer(frame, answer)
                if isinstance(answer, Leading):
                    self._sought[peer] = None
                frame = await connection.receive()
            match frame.message:
                case Hello() as hello if self.leads:
                    await self._serve_worker(hello, peer, connection)
                case GatewayHello(address) if self.leads:
                    await self._serve_gateway(address, peer, connection)
                case Standby() as standby if self.leads:
                    await self.candidate.stand_by(standby, connection)
                case first:
                    log.warning("%s said %s before hello", connection.peer, type(first).__name__)
        except PdserveError as error:
            log.debug("%s: %s", connection.peer, error)
        finally:
            self._sought.pop(peer, None)
            pump.cancel()
            await connection.close()

    async def _serve_worker(self, hello: Hello, peer: _Peer, connection: Connection) -> None:
        self._workers[hello.worker] = peer
        self.hello = hello
        left = False
        self._carry_out(self._core.on_hello(hello, monotonic()))

        def hear(message: object) -> bool:
            nonlocal left
            left = isinstance(message, Goodbye)
            return not left and self._hear_worker(hello.worker, message)

        try:
            await hear_all(connection, hear)
        finally:
            if self._workers.get(hello.worker) is peer:
                del self._workers[hello.worker]
                self._carry_out(self._core.on_worker_lost(hello.worker, monotonic(), left=left))

    def _hear_worker(self, worker: WorkerId, message: object) -> bool:
        """False: it has to come again."""
        if not self._core.knows(worker):
            log.warning("%s was silent for too long; it has to come again", worker)
            return False
        self._record(message)
        match message:
            case Report() as report:
                commands = self._core.on_report(report, monotonic())
            case Parked(handoff):
                commands = self._core.on_parked(handoff, worker, monotonic())
            case WorkerFailed() as failed:
                problem = failed.error.message
                log.warning("%s failed at %s: %s", failed.request, worker, problem)
                commands = self._core.on_failed(failed, worker, monotonic())
            case other:
                log.warning("%s sent a %s", worker, type(other).__name__)
                commands = []
        self._carry_out(commands)
        return True

    async def _serve_gateway(self, address: Address, peer: _Peer, connection: Connection) -> None:
        self._gateways[address] = peer
        self._carry_out(self._core.on_gateway_hello(address, monotonic()))

        def hear(message: object) -> None:
            self._record(message)
            match message:
                case Submit(request):
                    commands = self._core.on_submit(request, monotonic())
                case Cancel(request_id):
                    commands = self._core.on_cancel(request_id, monotonic())
                case other:
                    log.warning("%s sent a %s", connection.peer, type(other).__name__)
                    commands = []
            self._carry_out(commands)

        try:
            await hear_all(connection, hear)
        finally:
            if self._gateways.get(address) is peer:
                del self._gateways[address]
                self._carry_out(self._core.on_gateway_lost(address, monotonic()))

    async def _tick(self) -> None:
        due_ns = monotonic()
        while True:
            late_ns = monotonic() - due_ns
            if late_ns > ASLEEP_S * S:  # then the others' silence is our own
                log.warning("the router has stood still for %d ms", late_ns // MS)
                self._core.slept(late_ns)
            self._carry_out(self._core.on_tick(monotonic()))
            if monotonic() - self._fetched_ns > UNFETCHED_S_MAX * S:
                self._recorder = None
            next_ns = self._core.next_tick_ns()
            wait_s = TICK_S_MAX if next_ns is None else (next_ns - monotonic()) / S
            wait_s = min(max(wait_s, 0.001), TICK_S_MAX)
            due_ns = monotonic() + round(wait_s * S)
            await asyncio.sleep(wait_s)

    def _carry_out(self, commands: Iterable[Command]) -> None:
        unsent: list[tuple[Request, MessageTooLarge]] = []
        for command in commands:
            match command:
                case ToWorker(worker, message):
                    peer = self._workers.get(worker)
                case ToGateway(gateway, message):
                    self._record(message)
                    peer = self._gateways.get(gateway)
                case _:
                    assert_never(command)
            if peer is None:  # its connection has just gone; the core hears of it next
                continue
            try:
                self._post(peer, message)
            except MessageTooLarge as error:
                log.warning("%s is not sent: %s", type(message).__name__, error)
                if isinstance(message, Dispatch):
                    unsent.append((message.request, error))
                elif isinstance(message, Resume):
                    unsent.append((message.handoff.request, error))
        for request, problem in unsent:
            self._give_up(request, problem)

    def _give_up(self, request: Request, error: PdserveError) -> None:
        """No worker can be told of it, so none will have it."""
        self._carry_out(self._core.on_cancel(request.request, monotonic()))
        refused = Refused(request.request, request.attempt, ErrorInfo.of(error))
        self._carry_out([ToGateway(request.reply_to, refused)])

    def _post(self, peer: _Peer, message: object) -> None:
        """Raises MessageTooLarge."""
        try:
            peer.post(message)
        except QueueFull as error:
            log.warning("hanging up: %s", error)
            self._hang_up(peer)

    def _hang_up(self, peer: _Peer) -> None:
        task = asyncio.create_task(peer.hang_up())
        self._hanging_up.add(task)
        task.add_done_callback(self._hanging_up.discard)
