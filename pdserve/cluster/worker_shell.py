"""One prefill or decode worker as a process: sockets around an engine thread. It decides nothing.

    router ──Dispatch, Preempt, Cancel, Resume──► shell ──► engine thread (EngineLoop)
    prefill ──Handoff──────────────────────────►   │
                                                   ▼
              Report, Parked ◄── link ◄── outputs of each step ──► postbox ──► decode, gateways

The engine thread calls ``emit`` after each step; everything it says is handed to the event loop in
one go, and tokens for the same gateway leave as one frame.
"""

import asyncio
import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from pdserve.clock import MS, S, monotonic
from pdserve.cluster.fetching_ahead import FetchingAhead
from pdserve.cluster.link import RouterLink
from pdserve.cluster.store_watch import News, StoreWatch
from pdserve.config import ClusterConfig, PoolConfig
from pdserve.errors import CapacityError, ErrorInfo, MessageTooLarge, PdserveError, RankLost
from pdserve.ids import HostId, new_worker_id
from pdserve.kvstore.security import credentials_of
from pdserve.messages import (
    Address,
    Attained,
    Cancel,
    ChunkDone,
    Dispatch,
    FetchAhead,
    Goodbye,
    Handoff,
    Hello,
    Progress,
    Report,
    Request,
    Resume,
    Role,
    TokenBatch,
    TokenDelta,
)
from pdserve.messages import WorkerFailed as Failed
from pdserve.prompt_tasks import PromptDelta
from pdserve.vitals import Vitals
from pdserve.wire.connection import Connection
from pdserve.wire.listener import Listener
from pdserve.wire.postbox import Postbox

if TYPE_CHECKING:
    from pdserve.cluster.worker_parts import WorkerParts
    from pdserve.engine.outputs import Load, Output, ToDecode
    from pdserve.engine.thread import EngineThread

log = logging.getLogger(__name__)

REPORT_S_MAX = 1.0
"""A report leaves at least this often, so that silence means trouble."""

BATCH_TOKENS_MAX = 4096
"""In one message to a gateway. Only the answers of a beam search are longer, and come at once; with
logprobs so many tokens take 2 MB."""

STUCK_S = 20.0
"""A step that takes longer is a hang: the longest honest one, a full chunk on a loaded laptop
core, takes a tenth."""


class WorkerShell:
    def __init__(
        self, role: Role, config: ClusterConfig, *, host: HostId, place: tuple[str, ...] = ()
    ) -> None:
        """``place``: where the host is, coarse to fine, for pairing prefill and decode."""
        self.worker = new_worker_id(role)
        self.role = role
        self._config = config
        self._pool: PoolConfig = config.prefill if role is Role.PREFILL else config.decode
        self._host = host
        self._place = place
        self._engine: EngineThread | None = None
        self._store: StoreWatch | None = None
        self._parts: WorkerParts | None = None
        self._link: RouterLink | None = None
        self._listener: Listener | None = None
        self._hello: Hello | None = None
        self._ahead: FetchingAhead | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._credentials = credentials_of(config.store)
        self._tls = self._credentials.ssl_context(server_side=False)
        self._postbox = Postbox(host=host, on_undelivered=self._undelivered, ssl_context=self._tls)
        self._loop = asyncio.get_running_loop()
        self._load: Load | None = None
        self._report_sequence = 0
        self._vitals = Vitals()
        self._reported_ns = 0
        self._draining = False
        self._unbound = False  # the router has nothing for this worker any more
        self._hung_ms: int | None = None  # how long the engine had been in a step when it was so

    # ── coming and going ─────────────────────────────────────────────────────────────────────────

    async def start(
        self,
        directory: Path,
        find_store: Callable[[int, str], Awaitable[Address]],
        find_router: Callable[[], Awaitable[Address]],
        *,
        find_masters: Callable[[], Awaitable[tuple[str, ...]]],
        tcp_host: str | None,
    ) -> None:
        """Loads the model, joins the store of this host and the router. Returns when it serves."""
        from pdserve.cluster.worker_parts import build_parts

        # A thread that ends, and with it the OpenMP threads it had. Were they to stay, there would
        # be more than cores, and those of the engine would sleep after every operation.
        passing = ThreadPoolExecutor(1)
        loading = passing.submit(build_parts, self._config, self.role)
        passing.shutdown(wait=False)
        parts = await asyncio.wrap_future(loading)
        self._parts = parts
        store = await find_store(parts.block_bytes, parts.codec.label)
        client = await asyncio.to_thread(parts.open_store, store, self._host, self.worker)
        remote = parts.open_remote(await find_masters(), client.store_id, self._host, self.worker)
        self._engine = parts.start_engine(
            self.worker, store, self._host, self._emit, self._announce, remote
        )
        self._listener = await Listener.open(
            directory,
            self.worker,
            host=self._host,
            serve=self._listen,
            tcp_host=tcp_host,
            ssl_context=self._credentials.ssl_context(server_side=True),
        )
        self._hello = Hello(
            worker=self.worker,
            role=self.role,
            address=self._listener.address,
            store_id=client.store_id,
            store=store,
            namespace=parts.namespace.hex(),
            block_tokens=self._config.model.block_tokens,
            block_count=parts.block_count,
            running_max=self._pool.running_max,
            chunk_tokens=self._pool.chunk_tokens,
            pid=os.getpid(),
            store_has_disk=self._config.store.ssd_directory is not None,
            place=self._place,
            fetches=remote is not None,
        )
        self._ahead = FetchingAhead(store, self._host)
        self._store = StoreWatch(client, with_blocks=self._tells_of_store())
        self._link = RouterLink(
            self,
            find_router=find_router,
            host=self._host,
            silence_s=self._config.router.router_silence_ms / 1000,
            tls=self._tls,
        )
        await self._link.start(timeout_s=30.0)
        self._tasks = [
            asyncio.create_task(self._report_regularly()),
            asyncio.create_task(self._follow_store(self._store)),
        ]
        if self._hello.store_has_disk:
            self._tasks.append(asyncio.create_task(self._ahead.run()))

    async def drain(self, *, timeout_s: float) -> None:
        """Hands everything back, says goodbye, and stops. At most ``timeout_s``."""
        engine = self._engine
        if engine is None:
            return
        self._draining = True
        engine.drain()
        self._report()
        deadline_ns = monotonic() + int(timeout_s * S)
        while self._death() is None and not self._idle() and monotonic() < deadline_ns:
            await asyncio.sleep(0.02)
        idle_ns = monotonic()
        while self._is_needed(idle_ns) and monotonic() < deadline_ns:
            await asyncio.sleep(0.02)
        if monotonic() >= deadline_ns:
            log.warning("%s leaves undrained, with %s", self.worker, self._load)
        await self._postbox.flush()
        if self._link is not None:
            self._report()
            with contextlib.suppress(CapacityError):
                self._link.post(Goodbye(self.worker))
        await self.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._link is not None:
            await self._link.close()
        if self._listener is not None:
            await self._listener.close()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop, timeout_s=10.0)
        if self._parts is not None:
            await asyncio.to_thread(self._parts.followers.close)
        await self._postbox.close()
        if self._store is not None:
            self._store.close()

    def check_health(self) -> None:
        """Raises RuntimeError where a restart is the cure; supervision does the rest."""
        engine = self._engine
        if engine is None:
            return
        if (death := self._death()) is not None:
            raise RuntimeError(f"{self.worker}: {death}")
        stuck_ns = engine.stuck_ns()
        if stuck_ns > STUCK_S * S:
            raise RuntimeError(f"{self.worker} has been in one step for {stuck_ns // MS} ms")
        if self._store is not None and self._store.lost is not None:
            raise RuntimeError(f"{self.worker} lost its store node: {self._store.lost}")

    def _death(self) -> str | None:
        """Why this worker will compute nothing more; None while it can."""
        if self._engine is not None and not self._engine.alive:
            return f"the engine is dead: {self._engine.error!r}"
        if self._hung_ms is not None:
            return f"the engine hangs: {self._hung_ms} ms in one step, and it computes nothing"
        try:
            if self._parts is not None:
                self._parts.followers.check()
        except RankLost as error:
            return str(error)
        return None

    @property
    def counters(self) -> dict[str, int]:
        return dict(self._load.counters) if self._load else {}

    def _idle(self) -> bool:
        """Nothing is here, and nothing more will come."""
        load = self._load
        empty = load is None or (load.running == 0 and load.waiting == 0)
        return empty and (self._unbound or not self._is_heard())

    def _is_needed(self, since_ns: int) -> bool:
        """What was parked ends with this process unless somebody has adopted it by then."""
        store = self._store
        if store is None or store.lost is not None:
            return False
        return self._is_heard() and not store.holds_nothing(since_ns)

    def _is_heard(self) -> bool:
        """Without a router nobody would take over."""
        return self._link is not None and self._link.connected

    # ── what comes in ────────────────────────────────────────────────────────────────────────────

    def hello(self) -> Hello:
        assert self._hello is not None
        return self._hello

    def hear(self, message: object) -> None:
        if isinstance(message, Goodbye):
            self._unbound = True
        elif isinstance(message, FetchAhead):
            if self._ahead is not None:
                self._ahead.take(message)
        else:
            if isinstance(message, Dispatch):
                self._vouch(message.request)
            elif isinstance(message, Resume):
                self._vouch(message.handoff.request)
            self._submit(message)

    def reconnected(self) -> None:
        """A new router knows nothing of what runs or is stored here; the old one gave it up."""
        from pdserve.engine.outputs import GiveUp

        self._submit(GiveUp())
        if self._store is not None:
            self._store.tell_anew()
        self._report()

    async def _listen(self, connection: Connection) -> None:
        with contextlib.suppress(PdserveError):
            while True:
                frame = await connection.receive()
                if isinstance(frame.message, Handoff):
                    self._vouch(frame.message.request)
                    self._submit(frame.message)
                else:
                    log.warning("%s sent a %s", connection.peer, type(frame.message).__name__)

    def _vouch(self, request: Request) -> None:
        """Where others died computing it, the router has to know that it is here, before anything
        else happens: this worker may die of it at once."""
        if request.deaths > 0:
            here = Attained(request.request, request.attempt, request.emitted_count)
            self._report(vouched=(here,))

    def _submit(self, message: object) -> None:
        assert self._engine is not None
        try:
            self._engine.submit(message)
        except CapacityError:
            log.exception("%s cannot take a %s", self.worker, type(message).__name__)

    # ── what goes out ────────────────────────────────────────────────────────────────────────────

    def _emit(self, outputs: Sequence["Output"], load: "Load") -> None:
        """On the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has closed: nobody listens
            self._loop.call_soon_threadsafe(self._send, outputs, load)

    def _announce(self, sealed: "ToDecode") -> None:
        """On the mover's thread."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._post, sealed.address, sealed.message)

    def _send(self, outputs: Sequence["Output"], load: "Load") -> None:
        from pdserve.engine.outputs import OfPrompt, ToDecode, ToGateway, ToRouter

        deltas: dict[Address, list[TokenDelta]] = defaultdict(list)
        progress: list[Progress] = []
        chunks: list[ChunkDone] = []
        for output in outputs:
            match output:
                case ToGateway(address, delta):
                    deltas[address].append(delta)
                case OfPrompt(address, known):
                    self._post(address, known)
                case ToDecode(address, handoff):
                    self._post(address, handoff)
                case ToRouter(Progress() as event):
                    progress.append(event)
                case ToRouter(ChunkDone() as chunk):
                    chunks.append(chunk)
                case ToRouter(message):
                    self._to_router(message)
        for address, batch in deltas.items():
            for part in in_batches(batch):
                self._post(address, TokenBatch(self.worker, part))
        # Room that the router does not hear of is room that nobody uses: every change is told.
        changed = self._load is None or _fullness(load) != _fullness(self._load)
        self._load = load
        deltas_of_keys = load.blocks_added or load.blocks_removed
        if progress or chunks or deltas_of_keys or load.attained or changed:
            self._report(progress, chunks)

    def _report(
        self,
        progress: Sequence[Progress] = (),
        chunks: Sequence[ChunkDone] = (),
        *,
        of_store: News | None = None,
        vouched: Sequence[Attained] = (),
    ) -> None:
        load, news = self._load, of_store or News()
        self._reported_ns = monotonic()
        report = Report(
            worker=self.worker,
            sequence=self._report_sequence,
            draining=self._draining,
            running=load.running if load else 0,
            waiting=load.waiting if load else 0,
            free_blocks=load.free_blocks if load else self.hello().block_count,
            progress=tuple(progress),
            chunks=tuple(chunks),
            attained=(*(load.attained if load else ()), *vouched),
            blocks_added=load.blocks_added if load else (),
            blocks_removed=load.blocks_removed if load else (),
            store_added=tuple(news.added),
            store_removed=tuple(news.removed),
            store_anew=news.anew,
            counters={
                **(load.counters if load else {}),
                **(self._store.counters if self._store else {}),
                **self._vitals.figures(),
                **(self._parts.kernel_calls() if self._parts else {}),
            },
        )
        if load is not None:
            self._load = load.without_deltas()
        self._report_sequence += 1
        self._to_router(report, now=bool(vouched))

    def _post(self, address: Address, message: object) -> None:
        """A peer that has left so much unread is, for this message, as good as gone: its requests
        end here, and begin again where it reads. Silence would last until their deadlines."""
        try:
            self._postbox.post(address, message)
        except (CapacityError, MessageTooLarge):
            self._undelivered(address, [message])

    def _to_router(self, message: object, *, now: bool = False) -> None:
        assert self._link is not None
        try:
            (self._link.post_now if now else self._link.post)(message)
        except MessageTooLarge:
            log.exception("%s cannot tell the router", self.worker)
        except CapacityError as error:
            # What the router then does not hear of it would never hear again.
            log.warning("%s begins anew with the router: %s", self.worker, error)
            self._link.begin_anew()

    def _undelivered(self, address: Address, messages: list[object]) -> None:
        """A peer takes nothing more: hand-offs go back to the router, streams end. A later attempt
        may be here already, and is nobody's to end for the one before it."""
        for message in messages:
            if isinstance(message, Handoff):
                request = message.request
                error = ErrorInfo("worker_lost", f"decode at {address.host} did not take it")
                self._to_router(Failed(request.request, request.attempt, error))
            elif isinstance(message, PromptDelta):
                self._submit(Cancel(message.request, message.attempt))
                error = ErrorInfo("worker_lost", f"the gateway at {address.host} did not take it")
                self._to_router(Failed(message.request, message.attempt, error))
            elif isinstance(message, TokenBatch):
                self._cancel_all(message.deltas)
                error = ErrorInfo("worker_lost", f"the gateway at {address.host} did not take it")
                for delta in message.deltas:  # should the gateway live, it asks again
                    self._to_router(Failed(delta.request, delta.attempt, error))

    def _cancel_all(self, deltas: Sequence[TokenDelta]) -> None:
        for delta in deltas:
            self._submit(Cancel(delta.request, delta.attempt))

    # ── watching ─────────────────────────────────────────────────────────────────────────────────

    async def _report_regularly(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S_MAX / 4)
            if self._engine is not None and self._engine.hangs():
                self._hung_ms = self._engine.stuck_ns() // MS
            if (death := self._death()) is not None:
                log.error("%s: %s", self.worker, death)
                assert self._link is not None
                await self._link.close()  # the router takes it for lost, at once
                return
            if monotonic() - self._reported_ns > REPORT_S_MAX * S / 2:
                self._report()

    async def _follow_store(self, store: StoreWatch) -> None:
        """The store's changes go to the router's prefix index; its death ends this worker."""
        async for news in store.news():
            if self._tells_of_store():
                self._report(of_store=news)
        await self._leave()

    def _tells_of_store(self) -> bool:
        """Whoever may be given prompts says which prefixes its host has; others need not repeat."""
        return self.role is Role.PREFILL or self._config.router.mode != "disaggregated"

    async def _leave(self) -> None:
        """Without a store no request gets past this worker: nothing more must come here, and
        supervision replaces it together with the node."""
        from pdserve.engine.outputs import GiveUp

        assert self._link is not None
        assert self._store is not None
        log.error("%s lost its store node: %s", self.worker, self._store.lost)
        self._link.post(Goodbye(self.worker))  # no request is to blame
        await self._link.close()  # the router takes this worker for lost, at once
        self._submit(GiveUp())


def in_batches(deltas: Sequence[TokenDelta]) -> Iterator[tuple[TokenDelta, ...]]:
    """In order, each with at most ``BATCH_TOKENS_MAX`` tokens, or with one delta."""
    batch: list[TokenDelta] = []
    token_count = 0
    for delta in deltas:
        token_count += len(delta.tokens)
        if batch and token_count > BATCH_TOKENS_MAX:
            yield tuple(batch)
            batch, token_count = [], len(delta.tokens)
        batch.append(delta)
    if batch:
        yield tuple(batch)


def _fullness(load: "Load") -> tuple[int, int, int]:
    return load.running, load.waiting, load.free_blocks
