"""What a worker uses of a store node: claim and read blocks, put blocks, hand tickets on.

A ``StoreClient`` is one connection, blocking, for one thread at a time. On the node's host it maps
the arena; elsewhere, or where shared memory is forbidden, the same calls move bytes over the
socket. What it holds at the node (claims, unfinished writes, tickets) lives as long as its
connection. When that is gone every call raises ``StoreUnavailable`` at once: the blocks are lost to
this client, not to the request, which can be computed again; make a new client when the node, or
its successor, is there.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.errors import (
    ChecksumMismatch,
    DeadlineExceeded,
    Disconnected,
    StoreError,
    StoreUnavailable,
    WireError,
)
from pdserve.ids import BlockKey, HostId, RequestId, StoreId, TicketId
from pdserve.kvstore import protocol
from pdserve.kvstore.answers import ClaimGrant, StoreChanges, StoreStat, WriteGrant
from pdserve.kvstore.arena import open_arena
from pdserve.kvstore.transfer import Corrupt, Fill, SharedMemory, Sockets, Transfer
from pdserve.messages import Address
from pdserve.wire.blocking import connect_blocking
from pdserve.wire.frame import Buffer, Frame

CALL_TIMEOUT_S = 10.0
"""For an answer that a live node gives in microseconds; longer means that it is not alive."""

COUNTERS = (
    "blocks_put",  # written by ``put``
    "blocks_pushed",  # written by ``push`` and ``push_tail``
    "bytes_pushed",
    "blocks_present",  # asked to be written, but stored already
    "blocks_restored",  # read
    "bytes_restored",
    "blocks_verified",  # read with their checksum computed
    "checksum_failures",
    "remote_bytes",  # block bytes that went over a socket, either way
)


@dataclass(frozen=True, slots=True)
class Claim:
    """Blocks that stay as they are until ``StoreClient.release``.

    Block ``index`` < ``count`` is the prefix's block of that index. With ``has_tail`` there is one
    more, the unfinished last block of a ticket, at index ``count``.
    """

    grant: ClaimGrant
    keys: tuple[BlockKey, ...]  # of the first blocks, as far as the reader knows them

    @property
    def count(self) -> int:
        return len(self.grant.slots) - self.grant.has_tail

    @property
    def has_tail(self) -> bool:
        return self.grant.has_tail


class StoreClient:
    def __init__(
        self,
        address: Address,
        *,
        host: HostId,
        owner: str,
        verify: bool = True,
        shared_memory: bool = True,
        warm: bool = False,
        corrupt: Corrupt | None = None,
    ) -> None:
        """Connect to a node.

        Args:
            host: of this process.
            owner: who this is; tickets name their reader so.
            verify: False delivers bytes as they come.
            shared_memory: False sends bytes over the socket even on the node's host.
            warm: pay for the first touch of shared memory now, beside everything else, for a client
                whose writes somebody waits for.
            corrupt: for tests; called on bytes on their way, after their checksum was taken.

        Raises:
            StoreUnavailable: nobody answers there.
        """
        self.address = address
        try:
            self._connection = connect_blocking(address, host=host, codec=protocol.PROTOCOL)
        except WireError as error:
            raise StoreUnavailable(f"the store node cannot be reached: {error}") from error
        try:
            welcome: protocol.Welcome = self._call(protocol.Greet(owner)).message
            self.store_id: StoreId = welcome.store_id
            self.block_bytes = welcome.block_bytes
            self._counters = Counter(dict.fromkeys(COUNTERS, 0))
            self._transfer: Transfer
            if shared_memory and address.host == host:
                path = Path(welcome.arena_path)
                self._transfer = shared = SharedMemory(
                    self._call,
                    open_arena(path, self.store_id, writable=False),
                    lambda: open_arena(path, self.store_id, writable=True),
                    self._counters,
                    verify=verify,
                    corrupt=corrupt,
                )
                if warm:
                    shared.warm()
            else:
                self._transfer = Sockets(
                    self._call, self.block_bytes, self._counters, verify=verify, corrupt=corrupt
                )
        except StoreError:
            self.close()
            raise

    @property
    def counters(self) -> Mapping[str, int]:
        """Totals since this client was made; ``COUNTERS`` has the names."""
        return self._counters

    # ── reading ──────────────────────────────────────────────────────────────────────────────────

    def claim(self, keys: Sequence[BlockKey]) -> Claim:
        """Hold the longest prefix of ``keys`` that is stored; it may be empty."""
        grant: ClaimGrant = self._call(protocol.ClaimPrefix(tuple(keys))).message
        return Claim(grant, tuple(keys[: len(grant.slots)]))

    def read(self, claim: Claim, index: int, out: memoryview) -> None:
        """Copy a claimed block to ``out``, which has ``block_bytes`` bytes.

        Its checksum is verified once per block and process in shared memory, each time over a
        socket.

        Raises:
            BlockMissing: it was found to be wrong after it was claimed.
            ChecksumMismatch: it is wrong; from now on nobody finds it.
        """
        assert 0 <= index < len(claim.grant.slots), f"block {index} of {len(claim.grant.slots)}"
        flat = out.cast("B") if out.nbytes != len(out) else out
        assert len(flat) == self.block_bytes, f"{len(flat)} bytes for {self.block_bytes}"
        key = claim.keys[index] if index < len(claim.keys) else None
        try:
            self._transfer.receive(claim.grant, index, key, flat)
        except ChecksumMismatch:
            self._call(protocol.CondemnBlock(claim.grant.claim, index))
            raise
        self._counters["blocks_restored"] += 1
        self._counters["bytes_restored"] += self.block_bytes

    def release(self, claim: Claim) -> None:
        """Idempotent. A node that is gone holds nothing, so that is no error here."""
        if claim.grant.claim:
            self._call_unless_gone(protocol.ReleaseClaim(claim.grant.claim))

    # ── writing ──────────────────────────────────────────────────────────────────────────────────

    def put(self, keys: Sequence[BlockKey], first: int, fill: Fill) -> int:
        """Store the blocks ``keys[first:]``; those that are stored already are not written again.

        Args:
            keys: of the whole chain, from its first block.
            fill: ``fill(i, out)`` writes the bytes of block ``keys[i]`` into ``out``.

        Returns:
            how many of ``keys[first:]`` are stored now, from ``keys[first]`` on. Fewer than all
            when memory is short, 0 when the block before ``first`` is not stored.
        """
        grant: WriteGrant = self._call(protocol.Reserve(tuple(keys), first)).message
        self._counters["blocks_put"] += len(grant.slots)
        return self._write(grant, keys, first, fill)

    def open_ticket(
        self, request: RequestId, attempt: int, *, reader: str, block_count: int, wait_ms: int
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
            protocol.OpenTicket(request, attempt, reader, block_count, wait_ms),
            timeout_s=CALL_TIMEOUT_S + wait_ms / 1000,
        )
        answer: protocol.TicketOpened = frame.message
        return answer.ticket

    def push(self, ticket: TicketId, keys: Sequence[BlockKey], first: int, fill: Fill) -> None:
        """Put ``keys[first:]`` under a ticket, which must have the blocks before them already.

        Raises:
            TicketGone: it was aborted.
        """
        message = protocol.ReservePush(ticket, tuple(keys), first)
        grant: WriteGrant = self._call(message).message
        self._write(grant, keys, first, fill)
        self._count_pushed(grant)

    def push_tail(self, ticket: TicketId, fill: Callable[[memoryview], None]) -> None:
        """The request's unfinished last block; it has no key, and is its reader's alone."""
        grant: WriteGrant = self._call(protocol.ReserveTail(ticket)).message
        self._write(grant, [None], 0, lambda _, out: fill(out))
        self._count_pushed(grant)

    def seal(self, ticket: TicketId) -> None:
        """Everything is pushed: from now on the ticket is its reader's, whatever happens here."""
        self._call(protocol.SealTicket(ticket))

    def abort(self, ticket: TicketId) -> None:
        """End a ticket, anybody's. Its blocks that have keys stay stored. Idempotent."""
        self._call_unless_gone(protocol.AbortTicket(ticket))

    def adopt(self, ticket: TicketId) -> Claim:
        """Take over a sealed ticket's blocks as a claim. The ticket is gone.

        Raises:
            TicketGone: it was aborted, has been adopted, is not sealed, or is somebody else's.
        """
        grant: ClaimGrant = self._call(protocol.AdoptTicket(ticket)).message
        return Claim(grant, ())

    # ── what there is ────────────────────────────────────────────────────────────────────────────

    def changes(self, after: int) -> StoreChanges:
        """What entered and left the store since sequence number ``after``, 0 being its start."""
        answer: StoreChanges = self._call(protocol.ListChanges(after)).message
        return answer

    def stat(self) -> StoreStat:
        answer: StoreStat = self._call(protocol.AskStat()).message
        return answer

    def close(self) -> None:
        """Give up everything that is held through this connection. Idempotent."""
        self._connection.close()

    # ── inside ───────────────────────────────────────────────────────────────────────────────────

    def _write(
        self, grant: WriteGrant, keys: Sequence[BlockKey | None], first: int, fill: Fill
    ) -> int:
        self._counters["blocks_present"] += max(0, min(grant.first_index, len(keys)) - first)
        if grant.write == 0:
            return grant.stored_count
        try:
            return self._transfer.send(grant, keys, fill)
        except BaseException:  # whatever ``fill`` raises; the slots must not stay reserved
            self._call_unless_gone(protocol.Abandon(grant.write))
            raise

    def _count_pushed(self, grant: WriteGrant) -> None:
        self._counters["blocks_pushed"] += len(grant.slots)
        self._counters["bytes_pushed"] += len(grant.slots) * self.block_bytes

    def _call_unless_gone(self, message: object) -> None:
        with contextlib.suppress(StoreUnavailable):
            self._call(message)

    def _call(
        self,
        message: object,
        body: Sequence[Buffer] = (),
        *,
        into: memoryview | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Frame:
        try:
            return self._connection.call(message, body, timeout_s=timeout_s, into=into)
        except (Disconnected, DeadlineExceeded) as error:
            raise StoreUnavailable(f"the store node is gone: {error}") from error
