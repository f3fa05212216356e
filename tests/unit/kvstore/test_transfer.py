"""How bytes are checked on their way, in shared memory and over a (pretended) socket."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pdserve.errors import BlockMissing, ChecksumMismatch
from pdserve.ids import BlockKey, SlotId, StoreId
from pdserve.kvstore import protocol
from pdserve.kvstore.answers import ClaimGrant, WriteGrant
from pdserve.kvstore.arena import Arena, Geometry, block_checksum, create_arena, open_arena
from pdserve.kvstore.slots import Slot, SlotState
from pdserve.kvstore.transfer import TRANSIT_ATTEMPTS_MAX, Corrupt, SharedMemory, Sockets
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
        transfer.receive(CLAIM, 0, KEY, out)
    assert bytes(out) == b"x" * BLOCK_BYTES
    assert counters["blocks_verified"] == 1
    _set_header(arena, generation=6)
    transfer.receive(ClaimGrant(2, (SlotId(0),), (6,), has_tail=False), 0, KEY, out)
    assert counters["blocks_verified"] == 2


def test_a_flipped_bit_is_found_in_shared_memory(arena: Arena, tmp_path: Path) -> None:
    flip(arena.payload(SlotId(0)))
    transfer, counters = shared(tmp_path)
    with pytest.raises(ChecksumMismatch, match="slot 0 fails its checksum"):
        transfer.receive(CLAIM, 0, KEY, memoryview(bytearray(BLOCK_BYTES)))
    assert counters["checksum_failures"] == 1


def test_without_verification_bytes_come_as_they_are(arena: Arena, tmp_path: Path) -> None:
    flip(arena.payload(SlotId(0)))
    transfer, counters = shared(tmp_path, verify=False)
    out = memoryview(bytearray(BLOCK_BYTES))
    transfer.receive(CLAIM, 0, KEY, out)
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
        transfer.receive(CLAIM, 0, KEY, memoryview(bytearray(BLOCK_BYTES)))


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
        transfer.receive(CLAIM, 0, KEY, out)
        armed = True
    with pytest.raises(BlockMissing, match="changed while it was read"):
        transfer.receive(CLAIM, 0, KEY, out)
    assert counters["checksum_failures"] == 0


@pytest.mark.usefixtures("arena")
def test_another_keys_bytes_are_never_delivered(tmp_path: Path) -> None:
    transfer, _ = shared(tmp_path)
    with pytest.raises(BlockMissing, match="is another one"):
        transfer.receive(CLAIM, 0, OTHER_KEY, memoryview(bytearray(BLOCK_BYTES)))


class FakeNode:
    """Answers as a node does, from one block in memory; may be handed broken bytes."""

    def __init__(self) -> None:
        self.block = memoryview(bytearray(b"x" * BLOCK_BYTES))
        self.checksum = block_checksum(KEY, self.block)
        self.generation = 5
        self.fills = 0

    def __call__(
        self, message: object, body: Sequence[Buffer] = (), *, into: memoryview | None = None
    ) -> Frame:
        answer: Any
        match message:
            case protocol.ReadBlock():
                assert into is not None
                into[:] = self.block
                answer = protocol.BlockHeader(self.generation, self.checksum, KEY)
                return Frame(answer, into, 1)
            case protocol.Fill(checksums=(checksum,), verify=verify):
                self.fills += 1
                self.block[:] = memoryview(body[0])
                if verify and block_checksum(KEY, self.block) != checksum:
                    raise ChecksumMismatch("changed on its way")
                self.checksum = checksum
                answer = protocol.Done()
            case protocol.Commit(checksums=None):
                answer = protocol.Committed(1)
        return Frame(answer, memoryview(b""), 1)


def sockets(
    node: FakeNode, *, verify: bool = True, corrupt: Corrupt | None = None
) -> tuple[Sockets, Counter[str]]:
    counters: Counter[str] = Counter()
    return Sockets(node, BLOCK_BYTES, counters, verify=verify, corrupt=corrupt), counters


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
    transfer.receive(CLAIM, 0, KEY, out)
    assert bytes(out) == b"y" * BLOCK_BYTES
    assert counters["checksum_failures"] == failures


@pytest.mark.parametrize(
    "step",
    [
        lambda transfer: transfer.send(GRANT, [KEY], fill),
        lambda transfer: transfer.receive(CLAIM, 0, KEY, memoryview(bytearray(BLOCK_BYTES))),
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
        transfer.receive(CLAIM, 0, OTHER_KEY, out)
    node.generation = 6
    with pytest.raises(BlockMissing, match="changed"):
        transfer.receive(CLAIM, 0, KEY, out)
