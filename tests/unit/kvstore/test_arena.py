"""The arena file: geometry, headers, and who may map what."""

import mmap
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.errors import ConfigError, StoreUnavailable
from pdserve.ids import BlockKey, SlotId, StoreId
from pdserve.kvstore.arena import (
    ALIGNMENT_BYTES,
    BUSY_REST_S,
    SLOTS_MAX,
    TOUCHED_BYTES,
    Geometry,
    allocate,
    block_checksum,
    create_arena,
    geometry_of,
    open_arena,
    touch,
)
from pdserve.kvstore.headers import HEADER_BYTES
from pdserve.kvstore.slot_states import Slot, SlotState

STORE = StoreId("store-1")
KEY = BlockKey(b"k" * 16)


@pytest.mark.parametrize("block_bytes", [1, 63, 64, 65, 4096, 368_640])
def test_slots_neither_overlap_nor_leave_the_file(block_bytes: int) -> None:
    geometry = geometry_of(10 * 368_640, block_bytes)
    assert geometry.stride_bytes >= block_bytes
    assert geometry.stride_bytes % ALIGNMENT_BYTES == 0
    assert geometry.payload_offset >= mmap.PAGESIZE + HEADER_BYTES * geometry.slot_count
    end = geometry.payload_offset + geometry.slot_count * geometry.stride_bytes
    assert end <= geometry.file_bytes


@pytest.mark.parametrize(
    ("arena_bytes", "block_bytes", "message"),
    [
        (1000, 0, "block_bytes is 0"),
        (63, 64, "holds 0 blocks"),
        (64 * (SLOTS_MAX + 1), 64, f"holds {SLOTS_MAX + 1} blocks"),
    ],
)
def test_an_arena_that_makes_no_sense_is_refused(
    arena_bytes: int, block_bytes: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        geometry_of(arena_bytes, block_bytes)


def test_an_arena_larger_than_the_memory_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lower store\.arena_bytes"):
        create_arena(tmp_path / "arena", Geometry(1 << 17, 1 << 30), STORE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("state", list(SlotState))
def test_a_header_reads_as_it_was_written(tmp_path: Path, state: SlotState) -> None:
    arena = create_arena(tmp_path / "arena", Geometry(3, 100), STORE)
    key = None if state is SlotState.FREE else KEY
    record = Slot(state=state, generation=5, key=key, checksum=(1 << 64) - 1)
    arena.write_header(SlotId(1), record)
    seen = open_arena(tmp_path / "arena", STORE, writable=False).header(SlotId(1))
    assert (seen.state, seen.generation, seen.key, seen.checksum) == (
        state,
        5,
        key,
        (1 << 64) - 1,
    )
    for other in (0, 2):
        assert arena.header(SlotId(other)).state is SlotState.FREE


def test_bytes_written_through_one_mapping_are_read_through_another(tmp_path: Path) -> None:
    create_arena(tmp_path / "arena", Geometry(3, 100), STORE)
    writer = open_arena(tmp_path / "arena", STORE, writable=True)
    reader = open_arena(tmp_path / "arena", STORE, writable=False)
    writer.payload(SlotId(0))[:] = b"a" * 100
    writer.write(SlotId(1), memoryview(b"b" * 100))
    out = bytearray(100)
    for slot, content in ((0, b"a"), (1, b"b"), (2, b"\0")):
        reader.read(SlotId(slot), memoryview(out))
        assert bytes(out) == content * 100


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    create_arena(tmp_path / "arena", Geometry(1, 100), STORE)
    reader = open_arena(tmp_path / "arena", STORE, writable=False)
    with pytest.raises(TypeError, match="read-only"):
        reader.payload(SlotId(0))[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        reader.write(SlotId(0), memoryview(bytes(100)))


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    create_arena(tmp_path / "arena", Geometry(1, 100), STORE)
    assert (tmp_path / "arena").stat().st_mode & 0o777 == 0o600


def test_another_nodes_arena_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with pytest.raises(StoreUnavailable, match="No such file"):
        open_arena(path, STORE, writable=False)
    create_arena(path, Geometry(1, 100), STORE)
    with pytest.raises(StoreUnavailable, match="not the arena of store-2"):
        open_arena(path, StoreId("store-2"), writable=False)
    path.write_bytes(b"short")
    with pytest.raises(StoreUnavailable, match="not the arena"):
        open_arena(path, STORE, writable=False)


def test_memory_is_taken_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    create_arena(path, Geometry(10, 1 << 20), STORE)
    size = path.stat().st_size
    assert path.stat().st_blocks * 512 < size
    assert allocate(path, 0) == size
    assert path.stat().st_blocks * 512 >= size


def test_touched_pages_need_no_clearing(shared_memory: Path) -> None:
    """They are mapped with their neighbours then, by one fault for several."""
    path = shared_memory / "arena"
    create_arena(path, Geometry(500, mmap.PAGESIZE), STORE)
    allocate(path, 0)
    touch(path, lambda _: None)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        assert not any(mapped[at] for at in range(mmap.PAGESIZE * 10, len(mapped), mmap.PAGESIZE))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 250


def test_touching_ends_when_it_is_told_to(shared_memory: Path) -> None:
    path = shared_memory / "arena"
    create_arena(path, Geometry(5, 4 << 20), STORE)
    asked = iter([False, True])
    touch(path, lambda _: next(asked))
    assert path.stat().st_blocks * 512 <= 8 << 20


def test_who_touches_pages_rests_while_it_has_no_core_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    path.write_bytes(bytes(3 * TOUCHED_BYTES))
    times = [(0.0, 7.0), (0.010, 7.006), (1.0, 8.0), (1.010, 8.004), (2.0, 9.0), (2.5, 9.5)]
    clocks = iter(times)
    rests: list[float] = []
    touch(path, rests.append, clocks=lambda: next(clocks))
    assert rests == [0.0, BUSY_REST_S, 0.0]


def test_a_checksum_covers_key_and_payload() -> None:
    payload = bytearray(100)
    checksum = block_checksum(KEY, memoryview(payload))
    assert block_checksum(None, memoryview(payload)) != checksum
    payload[99] ^= 1
    assert block_checksum(KEY, memoryview(payload)) != checksum


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pdserve-test-", dir="/dev/shm") as directory:
        yield Path(directory)


def test_a_populated_mapping_is_written_without_page_faults(shared_memory: Path) -> None:
    geometry = Geometry(500, mmap.PAGESIZE)
    create_arena(shared_memory / "arena", geometry, STORE)
    arena = open_arena(shared_memory / "arena", STORE, writable=True)
    rests: list[float] = []
    arena.populate(rests.append)
    assert all(rest_s > 0 for rest_s in rests)
    assert rests
    data = memoryview(b"x" * mmap.PAGESIZE)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for slot in range(geometry.slot_count):
        arena.write(SlotId(slot), data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < geometry.slot_count // 10
