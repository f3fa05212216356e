"""How bytes are checked on their way, in shared memory and over a (pretended) socket."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pdserve.errors import BlockMissing, Cancelled, ChecksumMismatch
from pdserve.ids import BlockKey, SlotId, StoreId
from pdserve.kvstore import pipeline, protocol
from pdserve.kvstore.answers import ClaimGrant, WriteGrant
from pdserve.kvstore.arena import (
    PIECE_BYTES,
    Arena,
    Geometry,
    block_checksum,
    create_arena,
    open_arena,
)
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.pipeline import TRANSIT_ATTEMPTS_MAX, Corrupt
from pdserve.kvstore.protocol import ReadBlocks
from pdserve.kvstore.slot_states import Slot, SlotState
from pdserve.kvstore.transfer import SharedMemory, Sockets, Transfer
from pdserve.wire.blocking import Answer, Wait
from pdserve.wire.frame import Buffer, Frame

STORE = StoreId("store-1")
KEY = BlockKey(b"k" * 16)
OTHER_KEY = BlockKey(b"o" * 16)
BLOCK_BYTES = 100
CLAIM = ClaimGrant(1, (SlotId(0),), (5,), has_tail=False)
GRANT = WriteGrant(9, 0, (SlotId(0),), 0)


def flip(view: memoryview) -> None:
    view[7] ^= 1


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    """Slot 0 holds a committed block of generation 5."""
    arena = create_arena(tmp_path / "arena", Geometry(1, BLOCK_BYTES), STORE)
    arena.write(SlotId(0), memoryview(b"x" * BLOCK_BYTES))
    _set_header(arena)
    return arena


def _set_header(
    arena: Arena, *, generation: int = 5, state: SlotState = SlotState.COMMITTED
) -> None:
    checksum = block_checksum(KEY, memoryview(b"x" * BLOCK_BYTES))
    arena.write_header(
        SlotId(0), Slot(state=state, generation=generation, key=KEY, checksum=checksum)
    )


def no_call(
    message: object, body: Sequence[Buffer] = (), *, into: memoryview | None = None
) -> Frame:
    raise AssertionError(f"reading shared memory needs no {message}")


def shared(
    path: Path, *, verify: bool = True, corrupt: Corrupt | None = None
) -> tuple[SharedMemory, Counter[str]]:
    counters: Counter[str] = Counter()
    return (
        SharedMemory(
            no_call,
            open_arena(path / "arena", STORE, writable=False),
            lambda: open_arena(path / "arena", STORE, writable=True),
            counters,
            verify=verify,
            corrupt=corrupt,
        ),
        counters,
    )


def test_a_block_is_verified_once_per_generation(arena: Arena, tmp_path: Path) -> None:
    transfer, counters = shared(tmp_path)
    out = memoryview(bytearray(BLOCK_BYTES))
    for _ in range(3):
        receive(transfer, CLAIM, KEY, out)
    assert bytes(out) == b"x" * BLOCK_BYTES
    assert counters["blocks_verified"] == 1
    _set_header(arena, generation=6)
    receive(transfer, ClaimGrant(2, (SlotId(0),), (6,), has_tail=False), KEY, out)
    assert counters["blocks_verified"] == 2


def test_a_flipped_bit_is_found_in_shared_memory(arena: Arena, tmp_path: Path) -> None:
    flip(arena.payload(SlotId(0)))
    transfer, counters = shared(tmp_path)
    with pytest.raises(ChecksumMismatch, match="slot 0 fails its checksum"):
        receive(transfer, CLAIM, KEY, memoryview(bytearray(BLOCK_BYTES)))
    assert counters["checksum_failures"] == 1


def test_a_view_is_verified_as_a_copy_is(arena: Arena, tmp_path: Path) -> None:
    transfer, counters = shared(tmp_path)
    for _ in range(2):
        assert transfer.view(CLAIM, 0, KEY) == b"x" * BLOCK_BYTES
    assert counters["blocks_verified"] == 1
    flip(arena.payload(SlotId(0)))
    transfer, counters = shared(tmp_path)
    with pytest.raises(ChecksumMismatch, match="slot 0 fails its checksum"):
        transfer.view(CLAIM, 0, KEY)
    with pytest.raises(BlockMissing, match="is another one"):
        transfer.view(CLAIM, 0, OTHER_KEY)


def test_what_drains_is_read_by_who_holds_it_and_verified_again(
    arena: Arena, tmp_path: Path
) -> None:
    """It may drain because somebody else found it wrong."""
    transfer, _ = shared(tmp_path)
    transfer.view(CLAIM, 0, KEY)
    _set_header(arena, state=SlotState.DRAINING)
    assert transfer.view(CLAIM, 0, KEY) == b"x" * BLOCK_BYTES
    flip(arena.payload(SlotId(0)))
    with pytest.raises(ChecksumMismatch):
        transfer.view(CLAIM, 0, KEY)
    with pytest.raises(ChecksumMismatch):
        receive(transfer, CLAIM, KEY, memoryview(bytearray(BLOCK_BYTES)))


def test_a_block_of_several_pieces_is_hashed_whole(tmp_path: Path) -> None:
    block_bytes = 2 * PIECE_BYTES + 5
    arena = create_arena(tmp_path / "arena", Geometry(1, block_bytes), STORE)
    data = memoryview(bytes(range(256)) * (block_bytes // 256 + 1))[:block_bytes]
    arena.write(SlotId(0), data)
    out = memoryview(bytearray(block_bytes))
    assert arena.read_hashed(SlotId(0), KEY, out) == block_checksum(KEY, data)
    assert out == data


def test_without_verification_bytes_come_as_they_are(arena: Arena, tmp_path: Path) -> None:
    flip(arena.payload(SlotId(0)))
    transfer, counters = shared(tmp_path, verify=False)
    out = memoryview(bytearray(BLOCK_BYTES))
    receive(transfer, CLAIM, KEY, out)
    assert out[7] == ord("x") ^ 1
    assert counters["checksum_failures"] == 0


@pytest.mark.parametrize(
    ("generation", "state"), [(6, SlotState.COMMITTED), (5, SlotState.QUARANTINED)]
)
def test_a_slot_that_is_another_block_now_is_not_read(
    arena: Arena, tmp_path: Path, generation: int, state: SlotState
) -> None:
    _set_header(arena, generation=generation, state=state)
    transfer, _ = shared(tmp_path)
    with pytest.raises(BlockMissing):
        receive(transfer, CLAIM, KEY, memoryview(bytearray(BLOCK_BYTES)))


@pytest.mark.parametrize("verified_before", [True, False])
def test_a_slot_that_is_reused_while_it_is_read_is_noticed(
    arena: Arena, tmp_path: Path, verified_before: bool
) -> None:
    armed = not verified_before
    transfer, counters = shared(
        tmp_path, corrupt=lambda _: _set_header(arena, generation=6) if armed else None
    )
    out = memoryview(bytearray(BLOCK_BYTES))
    if verified_before:
        receive(transfer, CLAIM, KEY, out)
        armed = True
    with pytest.raises(BlockMissing, match="changed while it was read"):
        receive(transfer, CLAIM, KEY, out)
    assert counters["checksum_failures"] == 0


@pytest.mark.usefixtures("arena")
def test_another_keys_bytes_are_never_delivered(tmp_path: Path) -> None:
    transfer, _ = shared(tmp_path)
    with pytest.raises(BlockMissing, match="is another one"):
        receive(transfer, CLAIM, OTHER_KEY, memoryview(bytearray(BLOCK_BYTES)))


def receive(transfer: Transfer, claim: ClaimGrant, key: BlockKey, out: memoryview) -> None:
    """Block 0, alone."""
    transfer.receive(claim, [0], [key], lambda _: out, lambda _: None, Wait.of(10))


class FakeNode:
    """Answers as a node does, from one block in memory; may be handed broken bytes. The link of a
    pipeline: questions are answered when their answers are taken."""

    def __init__(self) -> None:
        self.block = memoryview(bytearray(b"x" * BLOCK_BYTES))
        self.checksum = block_checksum(KEY, self.block)
        self.generation = 5
        self.fills = 0
        self.asked: deque[tuple[object, Sequence[Buffer]]] = deque()
        self.asked_bytes_max = 0
        self.abandoned = 0

    def __call__(
        self, message: object, body: Sequence[Buffer] = (), *, into: memoryview | None = None
    ) -> Frame:
        assert message == protocol.Commit(GRANT.write, None)
        return Frame(protocol.Committed(1), memoryview(b""), 1)

    def submit(self, message: object, body: Sequence[Buffer] = (), *, wait: Wait) -> int:
        self.asked.append((message, [bytes(view) for view in body]))
        asked = sum(len(each.indices) for each, _ in self.asked if isinstance(each, ReadBlocks))
        self.asked_bytes_max = max(self.asked_bytes_max, asked * BLOCK_BYTES)
        return len(self.asked)

    def answer_to(self, call: int, *, wait: Wait) -> Answer:
        wait.check()
        match self.asked.popleft():
            case ReadBlocks(indices=indices), _:
                header = protocol.BlockHeader(self.generation, self.checksum, KEY)
                answer = protocol.BlockHeaders((header,) * len(indices))
                return Answer(answer, len(indices) * BLOCK_BYTES)
            case protocol.Fill(checksums=(checksum,), verify=verify), body:
                self.fills += 1
                self.block[:] = memoryview(body[0])
                if verify and block_checksum(KEY, self.block) != checksum:
                    raise ChecksumMismatch("changed on its way")
                self.checksum = checksum
                return Answer(protocol.Done(), 0)
            case other:
                raise AssertionError(other)

    def receive_body(self, view: memoryview, *, wait: Wait) -> None:
        wait.check()
        view[:] = self.block

    def abandon(self) -> None:
        self.abandoned += len(self.asked)
        self.asked.clear()


def sockets(
    node: FakeNode,
    *,
    verify: bool = True,
    corrupt: Corrupt | None = None,
    codec: PayloadCodec | None = None,
) -> tuple[Sockets, Counter[str]]:
    counters: Counter[str] = Counter()
    transfer = Sockets(
        node, node, BLOCK_BYTES, counters, verify=verify, corrupt=corrupt, codec=codec
    )
    return transfer, counters


def times(count: int, action: Corrupt) -> Corrupt:
    """``action``, but only the first ``count`` times."""
    left = [count]

    def limited(view: memoryview) -> None:
        if left[0]:
            left[0] -= 1
            action(view)

    return limited


def fill(_: int, out: memoryview) -> None:
    out[:] = b"y" * BLOCK_BYTES


@pytest.mark.parametrize("failures", [0, 1, TRANSIT_ATTEMPTS_MAX - 1])
def test_a_block_that_breaks_on_the_way_is_sent_again(failures: int) -> None:
    node = FakeNode()
    transfer, counters = sockets(node, corrupt=times(failures, flip))
    assert transfer.send(GRANT, [KEY], fill) == 1
    assert bytes(node.block) == b"y" * BLOCK_BYTES
    assert counters["checksum_failures"] == failures
    assert counters["remote_bytes"] == (failures + 1) * BLOCK_BYTES

    transfer, counters = sockets(node, corrupt=times(failures, flip))
    out = memoryview(bytearray(BLOCK_BYTES))
    receive(transfer, CLAIM, KEY, out)
    assert bytes(out) == b"y" * BLOCK_BYTES
    assert counters["checksum_failures"] == failures


@pytest.mark.parametrize(
    "step",
    [
        lambda transfer: transfer.send(GRANT, [KEY], fill),
        lambda transfer: receive(transfer, CLAIM, KEY, memoryview(bytearray(BLOCK_BYTES))),
    ],
    ids=["send", "receive"],
)
def test_a_way_that_always_breaks_blocks_is_given_up(step: Callable[[Sockets], object]) -> None:
    transfer, counters = sockets(FakeNode(), corrupt=flip)
    with pytest.raises(ChecksumMismatch):
        step(transfer)
    assert counters["checksum_failures"] == TRANSIT_ATTEMPTS_MAX


def test_without_verification_a_flip_goes_through_a_socket_unseen() -> None:
    node = FakeNode()
    transfer, counters = sockets(node, verify=False, corrupt=flip)
    transfer.send(GRANT, [KEY], fill)
    assert node.block[7] == ord("y") ^ 1
    assert node.fills == 1
    assert counters["checksum_failures"] == 0


def test_a_remote_block_of_another_generation_or_key_is_missing() -> None:
    node = FakeNode()
    out = memoryview(bytearray(BLOCK_BYTES))
    transfer, _ = sockets(node)
    with pytest.raises(BlockMissing, match="is another one"):
        receive(transfer, CLAIM, OTHER_KEY, out)
    node.generation = 6
    with pytest.raises(BlockMissing, match="changed"):
        receive(transfer, CLAIM, KEY, out)


def test_a_remote_block_of_another_codec_is_missing() -> None:
    node = FakeNode()
    receive(sockets(node, codec=PayloadCodec.UNSTATED)[0], CLAIM, KEY, node.block)
    with pytest.raises(BlockMissing, match="is another one"):
        receive(sockets(node, codec=PayloadCodec.INT8)[0], CLAIM, KEY, node.block)


MANY = ClaimGrant(1, (SlotId(0),) * 100, (5,) * 100, has_tail=False)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten blocks a piece, two pieces under way."""
    monkeypatch.setattr(pipeline, "READ_PIECE_BYTES", 10 * BLOCK_BYTES)
    monkeypatch.setattr(pipeline, "READ_WINDOW_BYTES", 20 * BLOCK_BYTES)


@pytest.mark.usefixtures("small_pieces")
def test_many_blocks_are_under_way_but_never_more_bytes_than_the_window() -> None:
    node = FakeNode()
    transfer, counters = sockets(node)
    out = memoryview(bytearray(BLOCK_BYTES))
    delivered: list[int] = []
    indices = range(len(MANY.slots))
    keys = [KEY] * len(indices)
    transfer.receive(MANY, indices, keys, lambda _: out, delivered.append, Wait.of(60))
    assert delivered == list(indices)
    assert node.asked_bytes_max == 20 * BLOCK_BYTES
    assert counters["blocks_verified"] == len(indices)


def test_a_block_that_breaks_amid_many_is_asked_for_again_with_all_behind_it() -> None:
    node = FakeNode()
    left = [0, 0, 1, 1]  # the third block, twice

    def corrupt(view: memoryview) -> None:
        if left and left.pop(0):
            flip(view)

    transfer, counters = sockets(node, corrupt=corrupt)
    out = memoryview(bytearray(BLOCK_BYTES))
    delivered: list[int] = []
    transfer.receive(MANY, range(5), [KEY] * 5, lambda _: out, delivered.append, Wait.of(10))
    assert delivered == [0, 1, 2, 3, 4]
    assert counters["checksum_failures"] == 2
    assert node.asked == deque()


@pytest.mark.usefixtures("small_pieces")
def test_a_cancelled_read_wants_nothing_of_what_is_under_way() -> None:
    node = FakeNode()
    transfer, _ = sockets(node)
    out, cancelled = memoryview(bytearray(BLOCK_BYTES)), threading.Event()
    delivered: list[int] = []

    def done(position: int) -> None:
        delivered.append(position)
        if position == 2:
            cancelled.set()

    wait = Wait.of(10, cancelled)
    with pytest.raises(Cancelled):
        transfer.receive(MANY, range(100), [KEY] * 100, lambda _: out, done, wait)
    assert delivered == [0, 1, 2]
    assert node.abandoned == 1, "the second piece was asked for already"
