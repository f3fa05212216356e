"""How a client of a store node writes: blocks under their keys, and hand-offs under a ticket."""

import contextlib
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence

from pdserve.errors import StoreUnavailable
from pdserve.ids import BlockKey, RequestId, TicketId
from pdserve.kvstore import protocol
from pdserve.kvstore.answers import WriteGrant
from pdserve.kvstore.capability import own_keys
from pdserve.kvstore.phases import Phases
from pdserve.kvstore.pieces import PiecewiseWrite
from pdserve.kvstore.pipeline import Fill
from pdserve.kvstore.transfer import CALL_TIMEOUT_S, SharedMemory, Transfer, unless_gone
from pdserve.wire.frame import Buffer, Frame


class Writing(ABC):
    """The half of ``client.StoreClient`` that writes."""

    block_bytes: int
    _key_prefix: bytes
    _transfer: Transfer
    _counters: Counter[str]
    _phases: Phases
    _tier: str

    def put(self, keys: Sequence[BlockKey], first: int, fill: Fill, *, tenant: str = "") -> int:
        """Store the blocks ``keys[first:]``; those that are stored already are not written again.

        Args:
            keys: of the whole chain, from its first block.
            fill: ``fill(i, out)`` writes the bytes of block ``keys[i]`` into ``out``.
            tenant: whose share of the arena they count against.

        Returns:
            how many of ``keys[first:]`` are stored now, from ``keys[first]`` on. Fewer than all
            when memory is short, 0 when the block before ``first`` is not stored.
        """
        keys = self._own(keys)
        grant: WriteGrant = self._call(protocol.Reserve(tuple(keys), first, tenant)).message
        self._counters["blocks_put"] += len(grant.slots)
        return self._write(grant, keys, first, fill)

    def open_ticket(
        self,
        request: RequestId,
        attempt: int,
        *,
        reader: str,
        block_count: int,
        wait_ms: int,
        tenant: str = "",
    ) -> TicketId:
        """Reserve ``block_count`` slots for one request's blocks, its unfinished last one included.

        Waits for up to ``wait_ms``, behind those who came earlier.

        Args:
            reader: the owner whose it is once sealed; ``"*"`` for whoever adopts it first, until
                when it stays this connection's.

        Raises:
            OutOfBlocks: they can never fit, or did not in time.
        """
        frame = self._call(
            protocol.OpenTicket(request, attempt, reader, block_count, wait_ms, tenant),
            timeout_s=CALL_TIMEOUT_S + wait_ms / 1000,
        )
        answer: protocol.TicketOpened = frame.message
        return answer.ticket

    def push(self, ticket: TicketId, keys: Sequence[BlockKey], first: int, fill: Fill) -> None:
        """Put ``keys[first:]`` under a ticket, which must have the blocks before them already.

        Raises:
            TicketGone: it was aborted.
        """
        keys = self._own(keys)
        message = protocol.ReservePush(ticket, tuple(keys), first)
        grant: WriteGrant = self._call(message).message
        self._write(grant, keys, first, fill)
        self._count_pushed(grant)

    def push_tail(self, ticket: TicketId, fill: Callable[[memoryview], None]) -> None:
        """The request's unfinished last block; it has no key, and is its reader's alone."""
        grant: WriteGrant = self._call(protocol.ReserveTail(ticket)).message
        self._write(grant, [None], 0, lambda _, out: fill(out))
        self._count_pushed(grant)

    def begin_push(
        self, ticket: TicketId, keys: Sequence[BlockKey], first: int
    ) -> PiecewiseWrite | None:
        """``push``, but its blocks are filled piece by piece, until ``finish``. None: there is no
        shared memory, and blocks go whole.

        Raises:
            TicketGone: it was aborted.
        """
        shared = self._shared()
        if shared is None:
            return None
        keys = self._own(keys)
        message = protocol.ReservePush(ticket, tuple(keys), first)
        grant: WriteGrant = self._call(message).message
        self._count_present(grant, keys, first)
        return shared.begin(grant, keys)

    def begin_tail(self, ticket: TicketId) -> PiecewiseWrite | None:
        """``push_tail`` in pieces; also while blocks with keys of its ticket are being filled."""
        shared = self._shared()
        if shared is None:
            return None
        grant: WriteGrant = self._call(protocol.ReserveTail(ticket)).message
        return shared.begin(grant, [None])

    def finish(self, write: PiecewiseWrite) -> None:
        """All pieces are there: what was filled can be found.

        Raises:
            TicketGone: it was aborted meanwhile; nothing is kept.
        """
        if write.grant.write:
            shared = self._shared()
            assert shared is not None, "there are no pieces without"
            shared.finish(write)
            self._count_pushed(write.grant)

    def give_up(self, write: PiecewiseWrite) -> None:
        """The slots are touched no more. As ``release`` where the node is gone."""
        if write.grant.write:
            self._call_unless_gone(protocol.Abandon(write.grant.write))

    def seal(self, ticket: TicketId) -> None:
        """Everything is pushed: from now on the ticket is its reader's, whatever happens here."""
        self._call(protocol.SealTicket(ticket))

    def abort(self, ticket: TicketId) -> None:
        """End a ticket, anybody's. Its blocks that have keys stay stored. Idempotent."""
        self._call_unless_gone(protocol.AbortTicket(ticket))

    def abort_attempts(self, request: RequestId, attempt: int | None) -> None:
        """End the tickets whose reader this is to be, for ``attempt`` (None: any) and those before.

        For a reader that is told to forget a request before it is told of its ticket: the writer
        may be gone, and nobody else knows of it. Idempotent.
        """
        self._call_unless_gone(protocol.AbortAttempts(request, attempt))

    # ── inside ───────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def _call(
        self,
        message: object,
        body: Sequence[Buffer] = (),
        *,
        into: memoryview | None = None,
        files: list[int] | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Frame: ...

    def _shared(self) -> SharedMemory | None:
        return self._transfer if isinstance(self._transfer, SharedMemory) else None

    def _own(self, keys: Sequence[BlockKey]) -> Sequence[BlockKey]:
        """The keys as they are in the store: a tenant's have its bytes at their beginning."""
        return own_keys(self._key_prefix, keys) if self._key_prefix else keys

    def _write(
        self, grant: WriteGrant, keys: Sequence[BlockKey | None], first: int, fill: Fill
    ) -> int:
        self._count_present(grant, keys, first)
        if grant.write == 0:
            return grant.stored_count
        began_ns = time.perf_counter_ns()
        try:
            with unless_gone:
                stored_count = self._transfer.send(grant, keys, fill)
        except BaseException:  # whatever ``fill`` raises; the slots must not stay reserved
            self._call_unless_gone(protocol.Abandon(grant.write))
            raise
        self._phases.note(("put", self._tier), time.perf_counter_ns() - began_ns)
        return stored_count

    def _count_present(
        self, grant: WriteGrant, keys: Sequence[BlockKey | None], first: int
    ) -> None:
        self._counters["blocks_present"] += max(0, min(grant.first_index, len(keys)) - first)

    def _count_pushed(self, grant: WriteGrant) -> None:
        self._counters["blocks_pushed"] += len(grant.slots)
        self._counters["bytes_pushed"] += len(grant.slots) * self.block_bytes

    def _call_unless_gone(self, message: object) -> None:
        with contextlib.suppress(StoreUnavailable):
            self._call(message)
