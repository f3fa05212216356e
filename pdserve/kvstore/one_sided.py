"""Block bytes by one-sided reads, beside the connection that says what is where.

*Reading*: the client claims as ever, asks for the headers, and reads the slots itself. Its claim
pins them until it says otherwise, or its connection ends; what comes is verified as over a socket.
When the client gives up a transfer that has not ended, its staging buffer is not used again before
it has.

*Writing*: the client fills its staging buffer and asks the node to fetch from there. The slots are
the writer's until the node's transfer has ended: meanwhile the node looks at no other message of
that connection, not even at its end.
"""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Sequence

from pdserve.errors import BlockMissing, ChecksumMismatch, StoreUnavailable
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore import protocol
from pdserve.kvstore.answers import ClaimGrant, WriteGrant
from pdserve.kvstore.arena import Arena, block_checksum
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.mooncake import OneSidedEngine, Staging, wait_ended
from pdserve.kvstore.pipeline import (
    STAGING_BYTES_MAX,
    TRANSIT_ATTEMPTS_MAX,
    Corrupt,
    Done,
    Fill,
    Place,
)
from pdserve.kvstore.tickets import OwnerId
from pdserve.kvstore.transfer import Call, Transfer, stored_count, view_of_copy
from pdserve.wire.blocking import Wait

STAGINGS_MAX = 4
"""Buffers of one client that wait for the end of transfers it gave up; then it is cut off."""


class OneSided(Transfer):
    """The client's side; a ``Transfer``."""

    def __init__(
        self,
        call: Call,
        engine: OneSidedEngine,
        welcome: protocol.Welcome,
        counters: Counter[str],
        *,
        verify: bool,
        corrupt: Corrupt | None,
        codec: PayloadCodec | None = None,
    ) -> None:
        self._call = call
        self._codec = codec
        self._engine = engine
        self._segment = welcome.segment
        self._payload_address = welcome.payload_address
        self._stride_bytes = welcome.stride_bytes
        self._block_bytes = welcome.block_bytes
        self._counters = counters
        self._verify = verify
        self._corrupt = corrupt
        self._piece_blocks = max(1, STAGING_BYTES_MAX // self._block_bytes)
        self._stagings: list[Staging] = []

    def close(self) -> None:
        for staging in self._stagings:
            staging.close()

    def send(self, grant: WriteGrant, keys: Sequence[BlockKey | None], fill: Fill) -> int:
        count = len(grant.slots)
        for start in range(0, count, self._piece_blocks):
            positions = range(start, min(start + self._piece_blocks, count))
            for attempt in range(1, TRANSIT_ATTEMPTS_MAX + 1):
                staging = self._free_staging()
                message = self._stage(staging, grant, positions, keys, fill)
                try:
                    with staging.lent():
                        self._call(message)
                    break
                except ChecksumMismatch:
                    self._counters["checksum_failures"] += 1
                    if attempt == TRANSIT_ATTEMPTS_MAX:
                        raise
        return stored_count(self._call(protocol.Commit(grant.write, None)))

    def receive(
        self,
        claim: ClaimGrant,
        indices: Sequence[int],
        keys: Sequence[BlockKey | None],
        place: Place,
        done: Done,
        wait: Wait,
    ) -> None:
        position = failures = 0
        while position < len(indices):
            wanted = list(indices[position : position + self._piece_blocks])
            message = protocol.DescribeBlocks(claim.claim, tuple(wanted))
            headers: protocol.BlockHeaders = self._call(message).message
            wanted = wanted[: len(headers.headers)]
            staging = self._fetch(claim, wanted, wait)
            for offset, (index, header) in enumerate(zip(wanted, headers.headers, strict=True)):
                self._check(claim, index, keys[position], header)
                out = place(position)
                start = offset * self._block_bytes
                out[:] = staging.view[start : start + self._block_bytes]
                if not self._is_right(out, header):
                    failures += 1
                    break
                failures = 0
                done(position)
                position += 1
                wait.check()
            if failures == TRANSIT_ATTEMPTS_MAX:
                raise ChecksumMismatch(
                    f"block {indices[position]} of claim {claim.claim} failed its checksum "
                    f"{TRANSIT_ATTEMPTS_MAX} times; it has to be computed again"
                )

    def view(self, claim: ClaimGrant, index: int, key: BlockKey | None) -> memoryview:
        return view_of_copy(self, self._block_bytes, claim, index, key)

    def _fetch(self, claim: ClaimGrant, indices: Sequence[int], wait: Wait) -> Staging:
        staging = self._free_staging()
        pieces = [
            (
                place * self._block_bytes,
                self._payload_address + claim.slots[index] * self._stride_bytes,
                self._block_bytes,
            )
            for place, index in enumerate(indices)
        ]
        staging.read(self._segment, pieces, wait.check)
        self._counters["remote_bytes"] += len(indices) * self._block_bytes
        return staging

    def _check(
        self, claim: ClaimGrant, index: int, key: BlockKey | None, header: protocol.BlockHeader
    ) -> None:
        is_other = self._codec not in (None, header.codec)
        if is_other or (key is not None and header.key != key):
            raise BlockMissing(f"block {index} of claim {claim.claim} is another one")
        if header.generation != claim.generations[index]:
            raise BlockMissing(f"block {index} of claim {claim.claim} changed")

    def _is_right(self, out: memoryview, header: protocol.BlockHeader) -> bool:
        if self._corrupt is not None:
            self._corrupt(out)
        if not self._verify:
            return True
        if block_checksum(header.key, out) == header.checksum:
            self._counters["blocks_verified"] += 1
            return True
        self._counters["checksum_failures"] += 1
        return False

    def _stage(
        self,
        staging: Staging,
        grant: WriteGrant,
        positions: range,
        keys: Sequence[BlockKey | None],
        fill: Fill,
    ) -> protocol.PullBlocks:
        checksums = []
        for place, position in enumerate(positions):
            view = staging.view[place * self._block_bytes : (place + 1) * self._block_bytes]
            index = grant.first_index + position
            fill(index, view)
            checksums.append(block_checksum(keys[index], view))
            if self._corrupt is not None:
                self._corrupt(view)
        self._counters["remote_bytes"] += len(positions) * self._block_bytes
        return protocol.PullBlocks(
            grant.write,
            positions.start,
            tuple(checksums),
            self._verify,
            self._engine.segment,
            staging.address,
        )

    def _free_staging(self) -> Staging:
        for staging in self._stagings:
            if staging.is_free():
                return staging
        if len(self._stagings) >= STAGINGS_MAX:
            raise StoreUnavailable(
                f"{STAGINGS_MAX} transfers that were given up have not ended; the node stalls"
            )
        staging = Staging(self._engine, self._piece_blocks * self._block_bytes)
        self._stagings.append(staging)
        return staging


class OneSidedNode:
    """The node's side: fetches from clients into the slots of their writes."""

    def __init__(self, engine: OneSidedEngine, arena: Arena) -> None:
        self._engine = engine
        self._arena = arena
        engine.register(arena.address, arena.geometry.file_bytes)

    def welcome(self, welcome: protocol.Welcome) -> protocol.Welcome:
        return dataclasses.replace(
            welcome,
            segment=self._engine.segment,
            payload_address=self._arena.address + self._arena.geometry.payload_offset,
            stride_bytes=self._arena.geometry.stride_bytes,
        )

    async def pull(
        self, core: StoreCore, owner: OwnerId, message: protocol.PullBlocks
    ) -> protocol.Done:
        """When this returns, or raises, however it does, no transfer may touch the slots.

        Raises:
            ChecksumMismatch: what came is not what was sent.
            StoreUnavailable: the client's memory could not be read.
        """
        slots = [
            core.to_fill(owner, message.write, message.position + index)
            for index in range(len(message.checksums))
        ]
        pulling = asyncio.ensure_future(asyncio.to_thread(self._pull, message, slots))
        try:
            await asyncio.shield(pulling)
        except asyncio.CancelledError:
            await asyncio.wait((pulling,))
            raise
        for index, checksum in enumerate(message.checksums):
            core.filled(owner, message.write, message.position + index, checksum)
        return protocol.Done()

    def _pull(
        self, message: protocol.PullBlocks, slots: Sequence[tuple[SlotId, BlockKey | None]]
    ) -> None:
        geometry = self._arena.geometry
        base = self._arena.address + geometry.payload_offset
        begun = []
        try:
            for index, (slot, _) in enumerate(slots):
                local = base + slot * geometry.stride_bytes
                remote = message.address + index * geometry.block_bytes
                begun.append(
                    self._engine.begin(message.segment, local, remote, geometry.block_bytes)
                )
        finally:
            ended = wait_ended(self._engine, begun, lambda: None)
        if not all(ended.values()):
            raise StoreUnavailable(f"the memory at {message.segment} could not be read")
        for index, (slot, key) in enumerate(slots):
            arrived = block_checksum(key, self._arena.payload(slot))
            if message.verify and arrived != message.checksums[index]:
                raise ChecksumMismatch(
                    f"block {message.position + index} of a write changed on its way here"
                )
