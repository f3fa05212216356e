"""Blocks over a connection, several under way at a time: read straight into their places, and
written from a staging buffer.

*Reading*: blocks are asked for in pieces, and the next piece is asked for before the one before it
has come, so that the way there and back is paid once. Bytes asked for and not yet received are at
most ``READ_WINDOW_BYTES``. Each block is verified while the next ones fill the socket; they are
delivered in order, and the first one that cannot be had ends it. A block whose checksum failed is
asked for again, with all behind it: the fault may have been the way's.

*Writing*: bytes sent and not yet acknowledged are at most ``WRITE_WINDOW_BYTES``. The node
acknowledges what it has verified in the memory where it stays.

Whoever stops in between, by an error or a cancellation, leaves answers under way. They are
abandoned: dropped when they come, and the connection stays usable.
"""

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from pdserve.errors import BlockMissing, ChecksumMismatch
from pdserve.ids import BlockKey
from pdserve.kvstore import protocol
from pdserve.kvstore.answers import ClaimGrant, WriteGrant
from pdserve.kvstore.arena import block_checksum
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.wire.blocking import Answer, Wait
from pdserve.wire.frame import Buffer

READ_PIECE_BYTES = 4 << 20
"""Asked for in one message; at least one block."""

READ_WINDOW_BYTES = 8 << 20
"""Two pieces: while one is received the node already sends the other."""

WRITE_WINDOW_BYTES = 8 << 20

STAGING_BYTES_MAX = 1 << 20
"""Block bytes that wait in a client to be sent together; at least one block. Eight times as much
is slower: it falls out of the cache between filling, checksum and socket (bench.kvstore)."""

TRANSIT_ATTEMPTS_MAX = 3

Fill = Callable[[int, memoryview], None]
"""Writes the bytes of the block with this index into this buffer."""

Places = Sequence[tuple[int, memoryview]]
"""Blocks by their indices, and where their bytes go."""


@runtime_checkable
class Begins(Protocol):
    """A ``Fill`` that can begin with several blocks before it is called for the first of them."""

    def begin(self, places: Places) -> AbstractContextManager[None]:
        """Within, it is called for each of them; after it, nothing is written there any more."""
        ...


def begun(fill: object, places: Places) -> AbstractContextManager[None]:
    return fill.begin(places) if isinstance(fill, Begins) else contextlib.nullcontext()


Corrupt = Callable[[memoryview], None]
"""For tests: changes bytes on their way, after their checksum was taken."""

Place = Callable[[int], memoryview]
"""Where the block at this position is to be received."""

Done = Callable[[int], None]
"""Told when the block at this position is there, in order."""


class Link(Protocol):
    """What a pipeline needs of ``wire.blocking.BlockingConnection``."""

    def submit(self, message: object, body: Sequence[Buffer] = (), *, wait: Wait) -> int: ...
    def answer_to(self, call: int, *, wait: Wait) -> Answer: ...
    def receive_body(self, view: memoryview, *, wait: Wait) -> None: ...
    def abandon(self) -> None: ...


class Pipeline:
    def __init__(
        self,
        link: Link,
        block_bytes: int,
        counters: Counter[str],
        *,
        verify: bool,
        corrupt: Corrupt | None,
        codec: PayloadCodec | None = None,
    ) -> None:
        self._link = link
        self._codec = codec
        self._block_bytes = block_bytes
        self._counters = counters
        self._verify = verify
        self._corrupt = corrupt
        self._piece_blocks = max(1, READ_PIECE_BYTES // block_bytes)
        self._pieces_max = max(1, READ_WINDOW_BYTES // (self._piece_blocks * block_bytes))
        self._staging_blocks = max(1, STAGING_BYTES_MAX // block_bytes)
        self._writes_max = max(1, WRITE_WINDOW_BYTES // (self._staging_blocks * block_bytes))
        self._staging = memoryview(b"")

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def read(
        self,
        claim: ClaimGrant,
        indices: Sequence[int],
        keys: Sequence[BlockKey | None],
        place: Place,
        done: Done,
        wait: Wait,
    ) -> None:
        """Blocks ``indices`` of a claim, each as ``done`` says; ``keys`` are what they must be.

        Raises:
            BlockMissing, ChecksumMismatch: of the first that ``done`` was not told of.
        """

        def ask(position: int) -> object:
            return protocol.ReadBlocks(
                claim.claim, tuple(indices[position : position + self._piece_blocks])
            )

        def check(position: int, header: protocol.BlockHeader) -> None:
            index, key = indices[position], keys[position]
            is_other = self._codec not in (None, header.codec)
            if is_other or (key is not None and header.key != key):
                raise BlockMissing(f"block {index} of claim {claim.claim} is another one")
            if header.generation != claim.generations[index]:
                raise BlockMissing(f"block {index} of claim {claim.claim} changed")

        stream = _Stream(len(indices), ask, check, place, done)
        self._read_all(stream, wait)
        if stream.position < len(indices):
            raise BlockMissing(f"block {indices[stream.position]} of claim {claim.claim} is gone")

    def fetch(
        self, keys: Sequence[BlockKey], first: int, place: Place, done: Done, wait: Wait
    ) -> int:
        """Blocks ``keys[first:]``, without a claim; how many of them there were.

        A chain longer than a piece is claimed once per piece: what is evicted in between ends it.
        """

        def ask(position: int) -> object:
            end = min(first + position + self._piece_blocks, len(keys))
            return protocol.FetchBlocks(tuple(keys[:end]), first + position, end - first - position)

        def check(position: int, header: protocol.BlockHeader) -> None:
            is_other = self._codec not in (None, header.codec)
            if is_other or header.key != keys[first + position]:
                raise BlockMissing(f"block {first + position} of a fetch is another one")

        stream = _Stream(len(keys) - first, ask, check, place, done)
        self._read_all(stream, wait)
        return stream.position

    def _read_all(self, stream: "_Stream", wait: Wait) -> None:
        """Until everything is there, or the node has no more; attempts are counted per block."""
        failures = 0
        while stream.position < stream.count:
            before = stream.position
            try:
                if not self._read_on(stream, wait):
                    return
            except _Broken:
                failures = 1 if stream.position > before else failures + 1
                self._counters["checksum_failures"] += 1
                if failures == TRANSIT_ATTEMPTS_MAX:
                    raise ChecksumMismatch(
                        f"block {stream.position} of a transfer failed its checksum "
                        f"{TRANSIT_ATTEMPTS_MAX} times; it has to be computed again"
                    ) from None

    def _read_on(self, stream: "_Stream", wait: Wait) -> bool:
        """From where the stream is; False when the node had fewer blocks than were asked for."""
        asked = stream.position
        pending: deque[tuple[int, int]] = deque()  # call, and blocks asked for by it
        try:
            while stream.position < stream.count:
                while asked < stream.count and len(pending) < self._pieces_max:
                    count = min(self._piece_blocks, stream.count - asked)
                    pending.append((self._link.submit(stream.ask(asked), wait=wait), count))
                    asked += count
                call, count = pending.popleft()
                answer = self._link.answer_to(call, wait=wait)
                headers = self._headers(answer, count)
                for header in headers:
                    stream.check(stream.position, header)
                    self._receive(stream.place(stream.position), header, wait)
                    stream.done(stream.position)
                    stream.position += 1
                if len(headers) < count:
                    return False
        finally:
            self._link.abandon()
        return True

    def _headers(self, answer: Answer, count: int) -> Sequence[protocol.BlockHeader]:
        message: protocol.BlockHeaders = answer.message
        headers = message.headers
        if len(headers) > count or answer.body_bytes != len(headers) * self._block_bytes:
            raise BlockMissing(
                f"{answer.body_bytes} bytes came for {len(headers)} of {count} blocks of "
                f"{self._block_bytes}"
            )
        return headers

    def _receive(self, out: memoryview, header: protocol.BlockHeader, wait: Wait) -> None:
        self._link.receive_body(out, wait=wait)
        self._counters["remote_bytes"] += self._block_bytes
        if self._corrupt is not None:
            self._corrupt(out)
        if self._verify:
            if block_checksum(header.key, out) != header.checksum:
                raise _Broken
            self._counters["blocks_verified"] += 1

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    def write(
        self, grant: WriteGrant, keys: Sequence[BlockKey | None], fill: Fill, wait: Wait
    ) -> None:
        """Fill every slot of a write; when this returns the node has verified them all.

        Raises:
            ChecksumMismatch: some blocks changed on their way, again and again.
        """
        count = len(grant.slots)
        todo = deque(
            (range(start, min(start + self._staging_blocks, count)), 1)
            for start in range(0, count, self._staging_blocks)
        )
        pending: deque[tuple[int, range, int]] = deque()
        try:
            while todo or pending:
                if todo and len(pending) < self._writes_max:
                    positions, attempt = todo.popleft()
                    message, views = self._stage(grant, positions, keys, fill)
                    call = self._link.submit(message, views, wait=wait)
                    pending.append((call, positions, attempt))
                    continue
                call, positions, attempt = pending.popleft()
                try:
                    self._link.answer_to(call, wait=wait)
                except ChecksumMismatch:
                    self._counters["checksum_failures"] += 1
                    if attempt == TRANSIT_ATTEMPTS_MAX:
                        raise
                    todo.appendleft((positions, attempt + 1))
        finally:
            self._link.abandon()

    def _stage(
        self, grant: WriteGrant, positions: range, keys: Sequence[BlockKey | None], fill: Fill
    ) -> tuple[protocol.Fill, list[memoryview]]:
        if len(self._staging) < len(positions) * self._block_bytes:
            self._staging = memoryview(bytearray(self._staging_blocks * self._block_bytes))
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
        message = protocol.Fill(grant.write, positions.start, tuple(checksums), verify=self._verify)
        return message, views


class _Broken(Exception):
    """A block's bytes are not what its header says."""


class _Stream:
    """One read: how far it is, and what to do per piece and per block."""

    def __init__(
        self,
        count: int,
        ask: Callable[[int], object],
        check: Callable[[int, Any], None],
        place: Place,
        done: Done,
    ) -> None:
        self.count = count
        self.position = 0  # blocks delivered
        self.ask = ask
        self.check = check
        self.place = place
        self.done = done
