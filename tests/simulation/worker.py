"""A worker's insides: the production engine loop on a fake model, stepped in virtual time.

``SimEngine`` stands where ``EngineThread`` stands, ``SimMover`` runs the production mover's moves
one after another, each after the time that it takes. The model is that of ``tests.unit.engine``:
every token leaves its name and place in its block, and the next one is drawn from a hash of all of
them as they lie in the pool; so one block that is wrong, missing or another's changes the answer.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdserve.clock import MS, US
from pdserve.config import ClusterConfig
from pdserve.engine.leader import Followers
from pdserve.engine.loop import EngineLoop
from pdserve.engine.mover import PARK_WAIT_MS, Mover
from pdserve.engine.moves import ANY_READER, Move, OpenTicket, Park, blocks_touched
from pdserve.engine.outputs import Load, Output, ToDecode
from pdserve.errors import PdserveError
from pdserve.ids import HostId, RequestId, WorkerId
from pdserve.kvstore.keys import namespace_digest
from pdserve.messages import Address, Dispatch, Handoff, Resume, Role
from tests.simulation.loop import SimProcess, VirtualLoop, current_process
from tests.simulation.owners import OwnedPool, WatchedRunner
from tests.simulation.store import SimStoreClient, StoreNode, Waiting
from tests.unit.engine.fakes import BLOCK_BYTES, letters

TOKENIZER = letters()
NAMESPACE = namespace_digest(model="fake")
STEP_NS = 2 * MS
TOKEN_NS = 100 * US
MOVE_NS = (100 * US, 3 * MS)
LOOK_NS = 1 * MS
"""Between two looks of a mover that waits for a ticket."""


class SimMover(Mover):
    def __init__(self, *args: Any, loop: VirtualLoop, dice: random.Random, **keywords: Any) -> None:
        process = current_process()
        assert process is not None
        self._process = process
        self._virtual = loop
        self._dice = dice
        self._late: deque[tuple[Move, Any]] = deque()
        self._later: deque[tuple[Move, Any]] = deque()
        self._busy = False
        self.is_closed = False
        super().__init__(*args, threaded=False, **keywords)

    def submit(self, move: Move, owner: Any = None) -> None:
        self._late.append((move, owner))
        self._begin()

    def offer(self, move: Move, owner: Any = None) -> bool:
        if len(self._later) >= 4:
            return False
        self._later.append((move, owner))
        self._begin()
        return True

    def take_back_offered(self) -> list[Move]:
        moves = [move for move, _ in self._later]
        self._later.clear()
        return moves

    def _begin(self) -> None:
        if not self._busy and not self.is_closed and (self._late or self._later):
            self._busy = True
            self._in(self._dice.randrange(*MOVE_NS), self._run_next)

    def _in(self, delay_ns: int, action: Callable[[], None]) -> None:
        self._virtual.at(self._virtual.now_ns + delay_ns, action, self._process)

    def _run_next(self) -> None:
        if self.is_closed:
            return
        queue = self._late or self._later
        if not queue:
            self._busy = False
            return
        move, owner = queue.popleft()
        node = _NODES.get(move.store)
        if node is not None and node.process.stopped:
            queue.appendleft((move, owner))  # nobody answers at the moment
            self._in(5 * MS, self._run_next)
            return
        try:
            waiting = self._ask(move)
        except PdserveError:
            waiting = None  # carrying it out says the same
        if waiting is None:
            self._carry(move, owner)
        else:
            self._wait(move, owner, waiting)

    def _ask(self, move: Move) -> Waiting | None:
        match move:
            case OpenTicket():
                reader, count, wait_ms = move.reader, move.block_count, move.wait_ms
            case Park():
                reader, count, wait_ms = ANY_READER, len(blocks_touched(move)), PARK_WAIT_MS
            case _:
                return None
        client = self._client(move.store)
        assert isinstance(client, SimStoreClient)
        return client.ask_ticket(
            move.request,
            move.attempt,
            reader=reader,
            block_count=count,
            wait_ms=wait_ms,
            tenant=move.tenant,
        )

    def _wait(self, move: Move, owner: Any, waiting: Waiting) -> None:
        if self.is_closed:
            return
        if waiting.over(self._virtual.now_ns):
            self._carry(move, owner)
        else:
            self._in(LOOK_NS, lambda: self._wait(move, owner, waiting))

    def _carry(self, move: Move, owner: Any) -> None:
        super().submit(move, owner)
        self.wake()
        self._busy = False
        self._begin()

    def close(self) -> None:
        self.is_closed = True
        super().close()


_NODES: dict[Address, StoreNode] = {}
"""Every node that there was in this run, by its address."""


class SimEngine:
    """As ``EngineThread``, for the worker shell."""

    def __init__(
        self,
        loop: EngineLoop,
        runner: WatchedRunner,
        emit: Callable[[Sequence[Output], Load], None],
        virtual: VirtualLoop,
        process: SimProcess,
    ) -> None:
        self.error: BaseException | None = None
        self.loop = loop
        self.had: set[tuple[RequestId, int]] = set()  # requests, and of which attempt
        self.slow = 1  # how many times as long as it should a step takes
        self._runner = runner
        self._emit = emit
        self._virtual = virtual
        self._process = process
        self._inbox: deque[Any] = deque()
        self._said: Load | None = None
        self._draining = self._stopping = False
        self._is_due = False
        self._began_ns: int | None = None
        self._turns = 0
        loop.wake_by(self._kick)
        runner.look = self._look

    @property
    def alive(self) -> bool:
        return self.error is None and not self._stopping

    @property
    def is_busy(self) -> bool:
        return self._said is not None and self._said.running + self._said.waiting > 0

    def submit(self, message: object) -> None:
        match message:
            case Dispatch(request) | Handoff(request=request) | Resume(Handoff(request=request)):
                self.had.add((request.request, request.attempt))
        self._inbox.append(message)
        self._kick()

    def drain(self) -> None:
        self._draining = True
        self._kick()

    def stop(self, *, timeout_s: float) -> None:
        if not self._stopping:
            self._stopping = True
            self.loop.close()

    def last_step_ns(self) -> int:
        return self._virtual.now_ns

    def stuck_ns(self) -> int:
        return 0 if self._began_ns is None else self._virtual.now_ns - self._began_ns

    def hangs(self) -> bool:
        """Its steps take virtual time, and none of a processor's. Whole processes hang here."""
        return False

    def _kick(self) -> None:
        if not self._is_due and self.alive:
            self._is_due = True
            self._virtual.at(self._virtual.now_ns + 20 * US, self._turn, self._process)

    def _turn(self) -> None:
        if not self.alive:
            return
        try:
            while self._inbox:
                self.loop.handle(self._inbox.popleft())
            if self._draining:
                self._draining = False
                self.loop.drain()
            steps = len(self._runner.steps)
            self._began_ns = self._virtual.now_ns
            outputs = self.loop.step()
            load = self.loop.load()
            self._turns += 1
            if self._turns % 8 == 0:
                self.loop.pool.check()
        except BaseException as error:
            self.error = error
            return
        tokens = sum(map(sum, self._runner.steps[steps:]))
        took_ns = (STEP_NS + tokens * TOKEN_NS) * self.slow if tokens else 0
        self._runner.steps.clear()
        self._virtual.at(
            self._virtual.now_ns + took_ns, lambda: self._end_turn(outputs, load), self._process
        )

    def _look(self) -> None:
        """Told to the run, as what fails in a step would only end the requests in it."""
        pool = self.loop.pool
        assert isinstance(pool, OwnedPool)
        for part in self.loop._parts:
            wrong = pool.foreign(part.sequences(computing=False))
            if wrong is not None:
                self._virtual.errors.append(f"{wrong} ({self._process})")

    def _end_turn(self, outputs: list[Output], load: Load) -> None:
        self._began_ns = None
        if not self.alive:
            return
        if outputs or load != self._said:
            self._emit(outputs, load)
            self._said = load.without_deltas()
        self._is_due = False
        if self.loop.busy() or self._inbox or self._draining:
            self._kick()


@dataclass
class SimCodec:
    label: str = "fake"


@dataclass
class SimParts:
    """As ``cluster.worker_parts.WorkerParts``, for the worker shell."""

    config: ClusterConfig
    role: Role
    world: Any
    namespace: bytes = NAMESPACE
    block_bytes: int = BLOCK_BYTES
    codec: SimCodec = field(default_factory=SimCodec)
    followers: Followers = field(default_factory=Followers)

    @property
    def block_count(self) -> int:
        blocks = (
            self.config.prefill if self.role is Role.PREFILL else self.config.decode
        ).pool_blocks
        assert blocks is not None
        return blocks

    def kernel_calls(self) -> dict[str, int]:
        return {}

    def open_store(self, store: Address, host: HostId, worker: WorkerId) -> SimStoreClient:
        node, process = _NODES[store], current_process()
        assert process is not None
        here = process.host
        return SimStoreClient(node, worker, reach=lambda there: self.world.reaches(here, there))

    def open_remote(self, *_: object) -> None:
        """No masters are simulated, so nobody knows what other hosts have."""

    def start_engine(
        self,
        worker: WorkerId,
        store: Address,
        host: HostId,
        emit: Callable[[Sequence[Output], Load], None],
        announce: Callable[[ToDecode], None],
        remote: None = None,
    ) -> SimEngine:
        from pdserve.cluster.worker_parts import make_loop

        process, world = current_process(), self.world
        assert process is not None
        runner = WatchedRunner(self.block_count)
        mover = SimMover(
            runner.pool,
            lambda address: self.open_store(address, host, worker),
            store,
            announce=announce,
            loop=world.loop,
            dice=world.network.dice,
        )
        settings = self.config.prefill if self.role is Role.PREFILL else self.config.decode
        loop = make_loop(
            worker=worker,
            runner=runner,
            mover=mover,
            tokenizer=TOKENIZER,
            namespace=NAMESPACE,
            settings=settings,
            store=self.config.store,
            clock=lambda: world.loop.now_ns,
        )
        engine = SimEngine(loop, runner, emit, world.loop, process)
        world.engines[process] = world.engine_of[worker] = engine
        return engine


def know(node: StoreNode) -> None:
    _NODES[node.address] = node


def forget_nodes() -> None:
    _NODES.clear()
