"""How block bytes get from a client to its store node and back: shared memory, or a socket.

Both ways keep the same promises. Writing: the bytes are in the slots, and their checksums at the
node, before the commit. Reading: what is in ``out`` afterwards has the checksum that the writer
took, or an error says why not.

A block whose checksum failed on a socket is sent again, see ``pipeline``: the fault may have been
the way's. In shared memory there is no way that could have one.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from pdserve.errors import (
    BlockMissing,
    ChecksumMismatch,
    DeadlineExceeded,
    Disconnected,
    StoreUnavailable,
)
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore import protocol
from pdserve.kvstore.answers import ClaimGrant, WriteGrant
from pdserve.kvstore.arena import Arena, block_checksum
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.headers import Header
from pdserve.kvstore.phases import Phases
from pdserve.kvstore.pieces import PiecewiseWrite
from pdserve.kvstore.pipeline import Corrupt, Done, Fill, Link, Pipeline, Place, begun
from pdserve.kvstore.slot_states import SlotState
from pdserve.wire.blocking import Wait
from pdserve.wire.frame import Buffer, Frame

CALL_TIMEOUT_S = 10.0
"""For an answer that a live node gives in microseconds; longer means that it is not alive."""

SLOW_BYTES_PER_S = 20_000_000
"""A node that moves fewer counts as gone too."""


def patience_s(size: int) -> float:
    """How long moving ``size`` bytes may take."""
    return CALL_TIMEOUT_S + size / SLOW_BYTES_PER_S


class _UnlessGone:
    """Says of a connection that ended that the node is gone."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Disconnected | DeadlineExceeded):
            raise StoreUnavailable(f"the store node is gone: {error}") from error


unless_gone = _UnlessGone()

_READABLE = (SlotState.COMMITTED, SlotState.PRIVATE, SlotState.DRAINING)
"""By who holds it. A DRAINING block may have failed somebody's checksum before, so it is verified
each time."""


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

    def receive(
        self,
        claim: ClaimGrant,
        indices: Sequence[int],
        keys: Sequence[BlockKey | None],
        place: Place,
        done: Done,
        wait: Wait,
    ) -> None:
        """Copy claimed blocks, in order, each to ``place(position)``; ``done(position)`` says that
        it is there. ``keys`` are what they must be, None where unknown.

        Raises:
            BlockMissing: the next one is not readable any more.
            ChecksumMismatch: the next one is not what its writer wrote.
            Cancelled: by ``wait``.
        """
        ...

    def copy(self, claim: ClaimGrant, index: int, key: BlockKey | None, out: memoryview) -> None:
        """``receive`` of one block, to ``out``."""
        wait = Wait.of(patience_s(len(out)))
        self.receive(claim, [index], [key], lambda _: out, lambda _: None, wait)

    def view(self, claim: ClaimGrant, index: int, key: BlockKey | None) -> memoryview:
        """A claimed block's bytes, read-only; raises what ``receive`` raises. Its ``obj`` is an
        array that nothing but users of the view refer to."""
        ...

    def fetch(
        self,
        keys: Sequence[BlockKey],  # noqa: ARG002  (here and below: of those that have one)
        first: int,  # noqa: ARG002
        place: Place,  # noqa: ARG002
        done: Done,  # noqa: ARG002
        wait: Wait,  # noqa: ARG002
    ) -> int | None:
        """As ``receive``, of what is stored of ``keys[first:]``, without a claim; how many. None:
        nothing happened, this way has none shorter than a claim."""
        return None

    def close(self) -> None:
        """Let go of the memory behind it, but for what views still show."""
        return


class Closed(Transfer):
    """Of a client that was closed: nothing is mapped for it."""

    def send(self, *_: object) -> int:
        raise StoreUnavailable("this client of the store was closed")

    def receive(self, *_: object) -> None:
        raise StoreUnavailable("this client of the store was closed")

    def view(self, *_: object) -> memoryview:
        raise StoreUnavailable("this client of the store was closed")


class SharedMemory(Transfer):
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
        codec: PayloadCodec | None = None,
        phases: Phases | None = None,
    ) -> None:
        self._call = call
        self._codec = codec
        self._readable = readable
        self._open_writable = open_writable
        self._writable: Arena | None = None
        self._closing = threading.Event()
        self._counters = counters
        self._verify = verify
        self._corrupt = corrupt
        self._phases = phases or Phases()
        self._verified: dict[SlotId, int] = {}  # the generation; at most one per slot

    def warm(self) -> None:
        """Make the first write to each slot as fast as later ones; goes on in the background."""
        self._writable = self._open_writable()
        threading.Thread(
            target=self._writable.populate,
            args=(self._closing.wait,),
            name="arena warming",
            daemon=True,
        ).start()

    def close(self) -> None:
        self._closing.set()

    def begin(self, grant: WriteGrant, keys: Sequence[BlockKey | None]) -> PiecewiseWrite:
        """As ``send``, but the caller brings the bytes, until ``finish``."""
        return PiecewiseWrite(grant, keys, self._arena())

    def finish(self, write: PiecewiseWrite) -> int:
        payloads, checksums = write.complete()
        if self._corrupt is not None:
            for payload in payloads:
                self._corrupt(payload)
        return stored_count(self._call(protocol.Commit(write.grant.write, checksums)))

    def _arena(self) -> Arena:
        if self._writable is None:
            self._writable = self._open_writable()
        return self._writable

    def send(self, grant: WriteGrant, keys: Sequence[BlockKey | None], fill: Fill) -> int:
        payloads = map(self._arena().payload, grant.slots)
        places = list(enumerate(payloads, start=grant.first_index))
        checksums = []
        with begun(fill, places):
            for index, payload in places:
                fill(index, payload)
                checksums.append(block_checksum(keys[index], payload))
                if self._corrupt is not None:
                    self._corrupt(payload)
        answer = self._call(protocol.Commit(grant.write, tuple(checksums)))
        return stored_count(answer)

    def receive(
        self,
        claim: ClaimGrant,
        indices: Sequence[int],
        keys: Sequence[BlockKey | None],
        place: Place,
        done: Done,
        wait: Wait,
    ) -> None:
        for position, (index, key) in enumerate(zip(indices, keys, strict=True)):
            self.copy(claim, index, key, place(position))
            done(position)
            wait.check()

    def copy(self, claim: ClaimGrant, index: int, key: BlockKey | None, out: memoryview) -> None:
        slot, generation = claim.slots[index], claim.generations[index]
        header = self._header(claim, index, key)
        verifies = self._is_to_verify(slot, header)
        checksum = None
        began_ns = time.perf_counter_ns()
        if verifies and self._corrupt is None:
            checksum = self._readable.read_hashed(slot, header.key, out)
        else:
            self._readable.read(slot, out)
        self._phases.note(("copy", "memory"), time.perf_counter_ns() - began_ns)
        if self._corrupt is not None:
            self._corrupt(out)
            checksum = block_checksum(header.key, out)
        # A pin keeps a slot from being reused; this notices if a node ever forgot one.
        if self._readable.generation(slot) != generation:
            raise BlockMissing(f"block {index} of claim {claim.claim} changed while it was read")
        if verifies:
            self._check(claim, index, header, checksum)

    def memory(self) -> Sequence[memoryview]:
        """The arena where it is mapped: to be read, and to be written."""
        return self._readable.whole, self._arena().whole

    def each(
        self,
        claim: ClaimGrant,
        indices: Sequence[int],
        keys: Sequence[BlockKey | None],
        take: Callable[[int, memoryview], None],
        done: Done,
        wait: Wait,
    ) -> None:
        """``receive``, but ``take(position, bytes)`` gets each where it lies."""
        for position, (index, key) in enumerate(zip(indices, keys, strict=True)):
            take(position, self.view(claim, index, key))
            done(position)
            # As in ``copy``. Who goes on copying rests on the claim alone.
            if self._readable.generation(claim.slots[index]) != claim.generations[index]:
                raise BlockMissing(
                    f"block {index} of claim {claim.claim} changed while it was read"
                )
            wait.check()

    def view(self, claim: ClaimGrant, index: int, key: BlockKey | None) -> memoryview:
        slot = claim.slots[index]
        header = self._header(claim, index, key)
        payload = self._readable.view(slot)
        if self._is_to_verify(slot, header):
            checksum = _timed_checksum(self._phases, "memory", header.key, payload)
            self._check(claim, index, header, checksum)
        return payload

    def _header(self, claim: ClaimGrant, index: int, key: BlockKey | None) -> Header:
        header = self._readable.header(claim.slots[index])
        if header.generation != claim.generations[index] or header.state not in _READABLE:
            raise BlockMissing(f"block {index} of claim {claim.claim} is {header.state} now")
        is_other = self._codec not in (None, header.codec)
        if is_other or (key is not None and header.key != key):
            raise BlockMissing(f"block {index} of claim {claim.claim} is another one")
        return header

    def _is_to_verify(self, slot: SlotId, header: Header) -> bool:
        is_verified = self._verified.get(slot) == header.generation
        return self._verify and not (is_verified and header.state is not SlotState.DRAINING)

    def _check(self, claim: ClaimGrant, index: int, header: Header, checksum: int | None) -> None:
        slot = claim.slots[index]
        if checksum != header.checksum:
            self._counters["checksum_failures"] += 1
            raise ChecksumMismatch(
                f"block {index} of claim {claim.claim} in slot {slot} fails its checksum; it has "
                "to be computed again"
            )
        self._verified[slot] = header.generation
        self._counters["blocks_verified"] += 1


class Sockets(Transfer):
    """For everybody else: bytes travel in the bodies of messages, several under way at a time."""

    def __init__(
        self,
        call: Call,
        link: Link,
        block_bytes: int,
        counters: Counter[str],
        *,
        verify: bool,
        corrupt: Corrupt | None,
        codec: PayloadCodec | None = None,
        phases: Phases | None = None,
    ) -> None:
        self._call = call
        self._block_bytes = block_bytes
        self._phases = phases or Phases()
        self._pipeline = Pipeline(
            link, block_bytes, counters, verify=verify, corrupt=corrupt, codec=codec
        )

    def send(self, grant: WriteGrant, keys: Sequence[BlockKey | None], fill: Fill) -> int:
        wait = Wait.of(patience_s(len(grant.slots) * self._block_bytes))
        self._pipeline.write(grant, keys, fill, wait)
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
        began_ns = time.perf_counter_ns()
        self._pipeline.read(claim, indices, keys, place, done, wait)
        self._phases.note(("network", "remote"), time.perf_counter_ns() - began_ns)

    def view(self, claim: ClaimGrant, index: int, key: BlockKey | None) -> memoryview:
        return view_of_copy(self, self._block_bytes, claim, index, key)

    def fetch(
        self, keys: Sequence[BlockKey], first: int, place: Place, done: Done, wait: Wait
    ) -> int:
        return self._pipeline.fetch(keys, first, place, done, wait)


def _timed_checksum(phases: Phases, tier: str, key: BlockKey | None, payload: memoryview) -> int:
    began_ns = time.perf_counter_ns()
    checksum = block_checksum(key, payload)
    phases.note(("verify", tier), time.perf_counter_ns() - began_ns)
    return checksum


def view_of_copy(
    transfer: Transfer, block_bytes: int, claim: ClaimGrant, index: int, key: BlockKey | None
) -> memoryview:
    """``Transfer.view`` where there is no memory to look at."""
    out = np.empty(block_bytes, np.uint8).data
    wait = Wait.of(patience_s(block_bytes))
    transfer.receive(claim, [index], [key], lambda _: out, lambda _: None, wait)
    return out.toreadonly()


def stored_count(frame: Frame) -> int:
    answer: protocol.Committed = frame.message
    return answer.stored_count
