"""Moves KV blocks between the device pool and stores, beside the thread that computes.

Moves run one after another, in the order in which they were submitted. Those that were *offered*
run when nothing submitted waits, and are refused when too many wait: they only make a later
request cheaper. A failure is an answer like any other and never ends the thread.

One client per store, made on the mover's thread when first needed, and made anew after it lost its
node. The local store's is made at once: a ticket sealed for this worker is freed when its reader
has no connection, so there must be one before the first hand-off.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, assert_never

from pdserve.clock import monotonic
from pdserve.engine.layered import LayeredBlocks, LayeredPushes, LayeredStore
from pdserve.engine.moves import (
    ANY_READER,
    Abort,
    AbortAttempts,
    Adopt,
    Forsake,
    Move,
    Moved,
    OpenTicket,
    Park,
    Push,
    PushLayers,
    Put,
    Restore,
    blocks_touched,
)
from pdserve.engine.outputs import ToDecode
from pdserve.engine.restorer import Remote, Restorer
from pdserve.errors import (
    BlockMissing,
    Disconnected,
    PdserveError,
    StoreUnavailable,
)
from pdserve.ids import BlockId, BlockKey, RequestId, TicketId
from pdserve.kvstore.answers import PrefixQuote
from pdserve.messages import Address

log = logging.getLogger(__name__)

SUBMITTED_MAX = 8192
"""Loops bound the sequences they hold and the moves of each; reaching this is a bug."""

OFFERED_MAX = 64
"""Moves that wait for an idle moment: about one per sequence that lately ended."""

PARK_WAIT_MS = 200
"""How long a park waits for slots. Moves behind it wait as long, so it is short."""

CLOSE_TIMEOUT_S = 5.0
"""How long what waits may still take when the mover is closed."""


class Blocks(LayeredBlocks, Protocol):
    """What the mover needs of ``model.pool.KvPool``."""

    def read_block(self, block: int, out: memoryview) -> None: ...
    def write_block(self, block: int, data: memoryview) -> None: ...
    def writing(self) -> AbstractContextManager[None]: ...
    def pin(self, memory: Callable[[], Sequence[memoryview]]) -> None: ...
    def unpin(self) -> None: ...


class Store(LayeredStore, Protocol):
    """What the mover needs of ``kvstore.client.StoreClient``, and of its claims ``count`` (blocks
    with keys) and ``has_tail`` (one more behind them)."""

    @property
    def counters(self) -> Mapping[str, int]: ...
    @property
    def has_disk(self) -> bool: ...
    def memory(self) -> Sequence[memoryview]: ...
    def quote(self, keys: Sequence[BlockKey]) -> PrefixQuote: ...
    def claim(self, keys: Sequence[BlockKey], *, fetch: bool = True, tenant: str = "") -> Any: ...
    def read_each(
        self, claim: Any, indices: Sequence[int], take: Callable[[int, memoryview], None]
    ) -> None: ...
    def release(self, claim: Any) -> None: ...
    def put(
        self,
        keys: Sequence[BlockKey],
        first: int,
        fill: Callable[[int, memoryview], None],
        *,
        tenant: str,
    ) -> int: ...
    def open_ticket(
        self,
        request: RequestId,
        attempt: int,
        *,
        reader: str,
        block_count: int,
        wait_ms: int,
        tenant: str,
    ) -> TicketId: ...
    def push(
        self,
        ticket: TicketId,
        keys: Sequence[BlockKey],
        first: int,
        fill: Callable[[int, memoryview], None],
    ) -> None: ...
    def push_tail(self, ticket: TicketId, fill: Callable[[memoryview], None]) -> None: ...
    def seal(self, ticket: TicketId) -> None: ...
    def abort(self, ticket: TicketId) -> None: ...
    def abort_attempts(self, request: RequestId, attempt: int | None) -> None: ...
    def adopt(self, ticket: TicketId) -> Any: ...
    def close(self) -> None: ...


class Mover:
    def __init__(
        self,
        pool: Blocks,
        client_for: Callable[[Address], Store],
        local: Address,
        *,
        announce: Callable[[ToDecode], None] | None = None,
        remote: Remote | None = None,
        threaded: bool = True,
    ) -> None:
        """``announce`` is called on the mover's thread when a push is sealed that says so; without
        it that is left to who collects. ``remote``: prefixes of other hosts. ``threaded=False``
        runs each move where it is submitted: for tests."""
        self.local = local
        self.wake: Callable[[], None] = lambda: None
        self._pool = pool
        self._client_for = client_for
        self._announce = announce
        self._layered = LayeredPushes(pool)
        self._clients: dict[Address, Store] = {}
        self._counted: Counter[str] = Counter()  # by clients that are gone, and by restores
        self._remote = remote
        self.sees_other_hosts = remote is not None
        self._restorer = Restorer(pool, self._counted, monotonic, remote)
        self._submitted: deque[tuple[Move, Any]] = deque()
        self._offered: deque[tuple[Move, Any]] = deque()
        self._moved: deque[Moved] = deque()
        self._work = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="mover", daemon=True)
            self._thread.start()
        else:
            self._connect_local()

    def submit(self, move: Move, owner: Any = None) -> None:
        """``owner`` comes back with the answer."""
        if self._thread is None:
            self._moved.append(self._answer(move, owner))
            return
        with self._work:
            assert len(self._submitted) < SUBMITTED_MAX, f"{SUBMITTED_MAX} moves wait already"
            self._submitted.append((move, owner))
            self._work.notify()

    def offer(self, move: Move, owner: Any = None) -> bool:
        """As ``submit``, but behind everything submitted. False: too many wait, it is not taken."""
        if self._thread is None:
            self._moved.append(self._answer(move, owner))
            return True
        with self._work:
            if len(self._offered) >= OFFERED_MAX:
                return False
            self._offered.append((move, owner))
            self._work.notify()
            return True

    def take_back_offered(self) -> list[Move]:
        """Offered moves that have not begun; they will not."""
        with self._work:
            moves = [move for move, _owner in self._offered]
            self._offered.clear()
        return moves

    def ready(self) -> bool:
        return bool(self._moved) or self._error is not None

    def collect(self) -> list[Moved]:
        """The answers since the last call, oldest first. Raises what ended the mover's thread."""
        if self._error is not None:
            raise RuntimeError("the mover is dead") from self._error
        moved = []
        while self._moved:
            moved.append(self._moved.popleft())
        return moved

    def counters(self) -> dict[str, int]:
        """Sums over all clients, those that are gone included."""
        total = Counter(self._counted)
        for client in tuple(self._clients.values()):
            total.update(client.counters)
        if self._remote is not None:
            total.update(self._remote.counters)
        return dict(total)

    def close(self) -> None:
        """Runs what waits, for at most ``CLOSE_TIMEOUT_S``, and closes the clients."""
        with self._work:
            self._closing = True
            self._work.notify()
        if self._thread is None:
            self._close_clients()
        else:
            self._thread.join(CLOSE_TIMEOUT_S)

    # ── on the mover's thread ────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            self._connect_local()
            while (work := self._next()) is not None:
                self._moved.append(self._answer(*work))
                self.wake()
        except BaseException as error:  # a bug: whoever collects next learns of it
            self._error = error
            self.wake()
        finally:
            self._close_clients()

    def _next(self) -> tuple[Move, Any] | None:
        with self._work:
            while not (self._submitted or self._offered or self._closing):
                self._work.wait()
            if self._submitted:
                return self._submitted.popleft()
            return self._offered.popleft() if self._offered else None

    def _connect_local(self) -> None:
        try:
            self._client(self.local)
        except PdserveError as error:
            log.warning("no connection to the local store yet: %s", error)

    def _client(self, store: Address) -> Store:
        if store not in self._clients:
            client = self._clients[store] = self._client_for(store)
            if store == self.local:
                self._pool.pin(client.memory)
        return self._clients[store]

    def _forget_client(self, store: Address) -> None:
        client = self._clients.pop(store, None)
        if client is not None:
            self._counted.update(client.counters)
            if store == self.local:
                self._pool.unpin()
            client.close()
            self._layered.lost(store)

    def _close_clients(self) -> None:
        for store in tuple(self._clients):
            self._forget_client(store)
        if self._remote is not None:
            self._remote.close()

    def _answer(self, move: Move, owner: Any) -> Moved:
        try:
            count, ticket = self._carry_out(move)
        except PdserveError as error:
            if isinstance(error, StoreUnavailable | Disconnected):
                self._forget_client(move.store)
            return Moved(move, owner, error=error)
        announced = False
        if isinstance(move, Push) and move.announce is not None and self._announce is not None:
            self._announce(move.announce)
            announced = True
        return Moved(move, owner, count=count, ticket=ticket, announced=announced)

    def _carry_out(self, move: Move) -> tuple[int, TicketId | None]:
        """How many blocks, and which ticket."""
        if isinstance(move, Forsake):
            self._forget_client(move.store)
        store = self._client(move.store)
        count, ticket = len(blocks_touched(move)), None
        match move:
            case Restore():
                count = self._restorer.restore(store, move)
            case OpenTicket():
                ticket = store.open_ticket(
                    move.request,
                    move.attempt,
                    reader=move.reader,
                    block_count=move.block_count,
                    wait_ms=move.wait_ms,
                    tenant=move.tenant,
                )
                self._layered.opened(move, ticket)
            case PushLayers():
                self._layered.copy(store, move)
            case Push():
                self._push(store, move)
            case Abort():
                self._layered.ended(move.ticket)
                store.abort(move.ticket)
            case AbortAttempts():
                store.abort_attempts(move.request, move.attempt)
            case Adopt():
                self._adopt(store, move)
            case Put():
                fill = _Filler(self._pool, move.blocks, 0)
                count = store.put(move.keys, 0, fill, tenant=move.tenant)
            case Park():
                ticket = self._park(store, move)
            case Forsake():
                pass  # and connected again
            case _:
                assert_never(move)
        return count, ticket

    def _adopt(self, store: Store, move: Adopt) -> None:
        claim = store.adopt(move.ticket)
        try:
            block_count = claim.count + claim.has_tail
            if block_count != len(move.blocks):
                raise BlockMissing(
                    f"ticket {move.ticket} holds {block_count} blocks, {len(move.blocks)} expected"
                )
            wanted = [
                (index, block) for index, block in enumerate(move.blocks) if block is not None
            ]
            with self._pool.writing():
                store.read_each(
                    claim,
                    [index for index, _ in wanted],
                    lambda position, data: self._pool.write_block(wanted[position][1], data),
                )
        finally:
            store.release(claim)

    def _push(self, store: Store, move: Push) -> None:
        if not self._layered.finish(move):
            if move.blocks:
                fill = _Filler(self._pool, move.blocks, move.first)
                store.push(move.ticket, move.keys, move.first, fill)
            if move.tail is not None:
                store.push_tail(move.ticket, partial(self._pool.read_block, move.tail))
        if move.seal:
            store.seal(move.ticket)
            self._layered.ended(move.ticket)

    def _park(self, store: Store, move: Park) -> TicketId:
        block_count = len(blocks_touched(move))
        ticket = store.open_ticket(
            move.request,
            move.attempt,
            reader=ANY_READER,
            block_count=block_count,
            wait_ms=PARK_WAIT_MS,
            tenant=move.tenant,
        )
        push = Push(move.store, ticket, move.keys, 0, move.blocks, seal=True, tail=move.tail)
        try:
            self._push(store, push)
        except PdserveError:
            store.abort(ticket)
            raise
        return ticket


class _Filler:
    """For ``put`` and ``push``: writes the bytes of the block of key ``index``."""

    def __init__(self, pool: Blocks, blocks: Sequence[BlockId], first: int) -> None:
        self._pool = pool
        self._blocks = blocks
        self._first = first

    def __call__(self, index: int, out: memoryview) -> None:
        self._pool.read_block(self._blocks[index - self._first], out)

    def begin(self, places: Sequence[tuple[int, memoryview]]) -> AbstractContextManager[None]:
        """``kvstore.pipeline.Begins``."""
        blocks = [(self._blocks[index - self._first], out) for index, out in places]
        return self._pool.reading(blocks)
