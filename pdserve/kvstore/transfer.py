"""How block bytes get from a client to its store node and back: shared memory, or a socket.

Both ways keep the same promises. Writing: the bytes are in the slots, and their checksums at the
node, before the commit. Reading: what is in ``out`` afterwards has the checksum that the writer
took, or an error says why not.

A block whose checksum failed on a socket is sent again, up to ``TRANSIT_ATTEMPTS_MAX`` times in
all: the fault may have been the way's. In shared memory there is no way that could have one.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from pdserve.errors import BlockMissing, ChecksumMismatch
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore import protocol
from pdserve.kvstore.answers import ClaimGrant, WriteGrant
from pdserve.kvstore.arena import Arena, block_checksum
from pdserve.kvstore.slots import SlotState
from pdserve.wire.frame import Buffer, Frame

Fill = Callable[[int, memoryview], None]
"""Writes the bytes of the block with this index into this buffer."""

Corrupt = Callable[[memoryview], None]
"""For tests: changes bytes on their way, after their checksum was taken."""

STAGING_BYTES_MAX = 1 << 20
"""Block bytes that wait in a client to be sent together; at least one block. Eight times as much
is slower: it falls out of the cache between filling, checksum and socket (bench.kvstore)."""

TRANSIT_ATTEMPTS_MAX = 3

_READABLE = (SlotState.COMMITTED, SlotState.PRIVATE)


class Call(Protocol):
    def __call__(
        self, message: object, body: Sequence[Buffer] = (), *, into: memoryview | None = None
    ) -> Frame: ...


class Transfer(Protocol):
    def send(self, grant: WriteGrant, keys: Sequence[BlockKey | None], fill: Fill) -> int:
        """Fill the slots of a write and commit it; how many keys are stored then.

        ``keys`` are those of all blocks of the chain, or one None for a tail block.
        """
        ...

    def receive(self, claim: ClaimGrant, index: int, key: BlockKey | None, out: memoryview) -> None:
        """Copy a claimed block to ``out``. ``key`` is what it must be, None where unknown.

        Raises:
            BlockMissing: it is not readable any more.
            ChecksumMismatch: it is not what its writer wrote.
        """
        ...


class SharedMemory:
    """For clients on the node's host: they write and read the arena itself."""

    def __init__(
        self,
        call: Call,
        readable: Arena,
        open_writable: Callable[[], Arena],
        counters: Counter[str],
        *,
        verify: bool,
        corrupt: Corrupt | None,
    ) -> None:
        self._call = call
        self._readable = readable
        self._open_writable = open_writable
        self._writable: Arena | None = None
        self._counters = counters
        self._verify = verify
        self._corrupt = corrupt
        self._verified: dict[SlotId, int] = {}  # the generation; at most one per slot

    def warm(self) -> None:
        """Make the first write to each slot as fast as later ones; goes on in the background."""
        self._writable = self._open_writable()
        threading.Thread(
            target=self._writable.populate, args=(time.sleep,), name="arena warming", daemon=True
        ).start()

    def send(self, grant: WriteGrant, keys: Sequence[BlockKey | None], fill: Fill) -> int:
        if self._writable is None:
            self._writable = self._open_writable()
        checksums = []
        for index, slot in enumerate(grant.slots, start=grant.first_index):
            payload = self._writable.payload(slot)
            fill(index, payload)
            checksums.append(block_checksum(keys[index], payload))
            if self._corrupt is not None:
                self._corrupt(payload)
        answer = self._call(protocol.Commit(grant.write, tuple(checksums)))
        return _stored_count(answer)

    def receive(self, claim: ClaimGrant, index: int, key: BlockKey | None, out: memoryview) -> None:
        slot, generation = claim.slots[index], claim.generations[index]
        header = self._readable.header(slot)
        if header.generation != generation or header.state not in _READABLE:
            raise BlockMissing(f"block {index} of claim {claim.claim} is {header.state} now")
        if key is not None and header.key != key:
            raise BlockMissing(f"block {index} of claim {claim.claim} is another one")
        self._readable.read(slot, out)
        if self._corrupt is not None:
            self._corrupt(out)
        # A pin keeps a slot from being reused; this notices if a node ever forgot one.
        if self._readable.header(slot).generation != generation:
            raise BlockMissing(f"block {index} of claim {claim.claim} changed while it was read")
        if not self._verify or self._verified.get(slot) == generation:
            return
        if block_checksum(header.key, out) != header.checksum:
            self._counters["checksum_failures"] += 1
            raise ChecksumMismatch(
                f"block {index} of claim {claim.claim} in slot {slot} fails its checksum; it has "
                "to be computed again"
            )
        self._verified[slot] = generation
        self._counters["blocks_verified"] += 1


class Sockets:
    """For everybody else: bytes travel in the bodies of messages."""

    def __init__(
        self,
        call: Call,
        block_bytes: int,
        counters: Counter[str],
        *,
        verify: bool,
        corrupt: Corrupt | None,
    ) -> None:
        self._call = call
        self._block_bytes = block_bytes
        self._counters = counters
        self._verify = verify
        self._corrupt = corrupt
        self._staging_blocks = max(1, STAGING_BYTES_MAX // block_bytes)
        self._staging = memoryview(b"")

    def send(self, grant: WriteGrant, keys: Sequence[BlockKey | None], fill: Fill) -> int:
        count = len(grant.slots)
        for position in range(0, count, self._staging_blocks):
            end = min(position + self._staging_blocks, count)
            self._send_some(grant, range(position, end), keys, fill)
        return _stored_count(self._call(protocol.Commit(grant.write, None)))

    def receive(self, claim: ClaimGrant, index: int, key: BlockKey | None, out: memoryview) -> None:
        for _ in range(TRANSIT_ATTEMPTS_MAX):
            frame = self._call(protocol.ReadBlock(claim.claim, index), into=out)
            header: protocol.BlockHeader = frame.message
            self._counters["remote_bytes"] += len(frame.body)
            if len(frame.body) != self._block_bytes or (key is not None and header.key != key):
                raise BlockMissing(f"block {index} of claim {claim.claim} is another one")
            if header.generation != claim.generations[index]:
                raise BlockMissing(f"block {index} of claim {claim.claim} changed")
            if self._corrupt is not None:
                self._corrupt(out)
            if not self._verify:
                return
            if block_checksum(header.key, out) == header.checksum:
                self._counters["blocks_verified"] += 1
                return
            self._counters["checksum_failures"] += 1
        raise ChecksumMismatch(
            f"block {index} of claim {claim.claim} failed its checksum {TRANSIT_ATTEMPTS_MAX} "
            "times; it has to be computed again"
        )

    def _send_some(
        self, grant: WriteGrant, positions: range, keys: Sequence[BlockKey | None], fill: Fill
    ) -> None:
        if len(self._staging) < len(positions) * self._block_bytes:
            self._staging = memoryview(bytearray(len(positions) * self._block_bytes))
        for attempt in range(1, TRANSIT_ATTEMPTS_MAX + 1):
            checksums = []
            views = []
            for place, position in enumerate(positions):
                view = self._staging[place * self._block_bytes : (place + 1) * self._block_bytes]
                index = grant.first_index + position
                fill(index, view)
                checksums.append(block_checksum(keys[index], view))
                if self._corrupt is not None:
                    self._corrupt(view)
                views.append(view)
            self._counters["remote_bytes"] += len(positions) * self._block_bytes
            message = protocol.Fill(
                grant.write, positions.start, tuple(checksums), verify=self._verify
            )
            try:
                self._call(message, views)
            except ChecksumMismatch:
                self._counters["checksum_failures"] += 1
                if attempt == TRANSIT_ATTEMPTS_MAX:
                    raise
            else:
                return


def _stored_count(frame: Frame) -> int:
    answer: protocol.Committed = frame.message
    return answer.stored_count
