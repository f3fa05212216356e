"""Pushes that begin before their blocks are computed: layer by layer, beside the step.

    step computes   │ layer 0 .. 3 │ layer 4 .. 7 │   …   │ head, sampling │
    mover copies                   │ layer 0 .. 3 │ 4 .. 7│     …     last │ commit, seal

The last chunk's blocks are what a first token waits for. As soon as a stretch of layers is in the
device pool, ``PushLayers`` has it copied into slots of the hand-off's ticket; the ``Push`` that
comes when the step is over finds all but the last stretch there, and commits.

Nothing rests on it: a push that did not begin so, or whose beginning failed, is made whole by that
``Push``, and an ``Abort`` gives its slots back.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

from pdserve.engine.moves import OpenTicket, Push, PushLayers
from pdserve.errors import PdserveError
from pdserve.ids import BlockId, BlockKey, RequestId, TicketId
from pdserve.messages import Address


class LayeredBlocks(Protocol):
    """What it needs of ``model.pool.KvPool``."""

    @property
    def layer_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    def await_layers(self, done: Any) -> None: ...
    def read_layers(self, block: int, first: int, end: int, out: memoryview) -> None: ...
    def reading(
        self, places: Sequence[tuple[int, memoryview]], layers: range | None = None
    ) -> AbstractContextManager[None]: ...


class LayeredStore(Protocol):
    """What it needs of ``kvstore.client.StoreClient``."""

    def begin_push(
        self, ticket: TicketId, keys: tuple[BlockKey, ...], first: int
    ) -> Any | None: ...
    def begin_tail(self, ticket: TicketId) -> Any | None: ...
    def finish(self, write: Any) -> None: ...
    def give_up(self, write: Any) -> None: ...


class LayeredPush:
    """One push under way. ``layers`` of each block are copied."""

    def __init__(self, store: LayeredStore, ticket: TicketId, move: PushLayers) -> None:
        """Raises what the store says when it has no slots for it; nothing is held then."""
        self.of = (move.keys, move.first, move.blocks, move.tail)
        self._store = store
        self._layers = 0
        self._writes: list[tuple[Any, dict[int, BlockId]]] = []
        try:
            if move.blocks:
                write = store.begin_push(ticket, move.keys, move.first)
                self._writes.append((write, dict(enumerate(move.blocks, move.first))))
            if move.tail is not None:
                self._writes.append((store.begin_tail(ticket), {0: move.tail}))
        except PdserveError:
            self.give_up()
            raise

    @property
    def goes_whole(self) -> bool:
        """The store takes no pieces: there is nothing to do before the push itself."""
        return any(write is None for write, _ in self._writes)

    def copy(self, pool: LayeredBlocks, end: int) -> None:
        """Up to layer ``end``; their bytes are in the pool."""
        if end <= self._layers:
            return
        layers = range(self._layers, end)
        count = len(layers) * pool.layer_bytes
        for write, blocks in self._writes:
            pieces = [(blocks[index], piece) for index, piece in write.next_pieces(count)]
            with pool.reading(pieces, layers):
                for index in write.indices:
                    fill = partial(pool.read_layers, blocks[index], layers.start, end)
                    write.add(index, count, fill)
        self._layers = end

    def finish(self, pool: LayeredBlocks) -> None:
        """Copy what is left, and commit: blocks first, then the tail."""
        self.copy(pool, pool.block_bytes // pool.layer_bytes)
        while self._writes:
            self._store.finish(self._writes[0][0])
            del self._writes[0]  # else it is given up

    def give_up(self) -> None:
        for write, _ in self._writes:
            if write is not None:
                self._store.give_up(write)
        self._writes = []


class LayeredPushes:
    """Of one mover, on its thread. A ticket is here from its opening until a push seals it, or it
    is aborted."""

    def __init__(self, pool: LayeredBlocks) -> None:
        self._pool = pool
        self._tickets: dict[tuple[Address, RequestId, int], TicketId] = {}
        self._pushes: dict[TicketId, LayeredPush | None] = {}  # None: it goes whole

    def opened(self, move: OpenTicket, ticket: TicketId) -> None:
        """The loop asks for layers of a request before it knows that its ticket is open."""
        self._tickets[move.store, move.request, move.attempt] = ticket

    def copy(self, store: LayeredStore, move: PushLayers) -> None:
        ticket = self._tickets.get((move.store, move.request, move.attempt))
        if ticket is None:
            return  # it still waits for slots, or is gone
        if ticket not in self._pushes:
            self._pushes[ticket] = None
            push = LayeredPush(store, ticket, move)
            if push.goes_whole:
                push.give_up()
            else:
                self._pushes[ticket] = push
        began = self._pushes[ticket]
        if began is not None:
            assert began.of == (move.keys, move.first, move.blocks, move.tail)
            self._pool.await_layers(move.done)
            began.copy(self._pool, move.layers)

    def finish(self, move: Push) -> bool:
        """Whether the blocks of ``move`` were begun here; then they are in the store now.

        Raises what the store says; nothing is held then.
        """
        push = self._pushes.pop(move.ticket, None)
        if push is None:
            return False
        if push.of != (move.keys, move.first, move.blocks, move.tail):
            push.give_up()
            return False
        try:
            push.finish(self._pool)
        except PdserveError:
            push.give_up()
            raise
        return True

    def ended(self, ticket: TicketId) -> None:
        """It is sealed, or about to be aborted: whatever was begun for it is given up."""
        push = self._pushes.pop(ticket, None)
        if push is not None:
            push.give_up()
        for key in [key for key, value in self._tickets.items() if value == ticket]:
            del self._tickets[key]

    def lost(self, store: Address) -> None:
        """The connection is closed, and with it all that was held there is given up."""
        for ticket in [ticket for key, ticket in self._tickets.items() if key[0] == store]:
            self.ended(ticket)
