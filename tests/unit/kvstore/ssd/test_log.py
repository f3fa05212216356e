"""The log gives the bytes that it was given, or says why not; whatever a crash left."""

import errno
import os
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.errors import CapacityError, ConfigError
from pdserve.ids import BlockKey
from pdserve.kvstore.arena import block_checksum
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.ssd.disk_file import aligned_buffer
from pdserve.kvstore.ssd.format import PAGE_BYTES
from pdserve.kvstore.ssd.log import Block, SsdLog, open_log

BLOCK_BYTES = 100
RECORDS_PER_SEGMENT = 3
BATCH_BYTES = 2 * PAGE_BYTES  # of one block: the page that names it, and itself
SEGMENT_BYTES = PAGE_BYTES + RECORDS_PER_SEGMENT * BATCH_BYTES + 2 * PAGE_BYTES
SEGMENTS = 4
WHOLE = SEGMENTS * RECORDS_PER_SEGMENT


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "big"))


def payload(number: int, size: int = BLOCK_BYTES) -> bytes:
    return random.Random(number).randbytes(size)


def open_here(directory: Path, **named: Any) -> SsdLog:
    named = {"block_bytes": BLOCK_BYTES, "capacity_bytes": SEGMENTS * SEGMENT_BYTES} | named
    return open_log(directory, segment_bytes=named.pop("segment_bytes", SEGMENT_BYTES), **named)


def block(number: int, size: int = BLOCK_BYTES) -> Block:
    data = memoryview(payload(number, size))
    return Block(key(number), block_checksum(key(number), data), data)


def append(log: SsdLog, *numbers: int) -> list[BlockKey]:
    """One write; what went for it."""
    log.append([block(number, log.kind.block_bytes) for number in numbers])
    return log.take_gone()


def read(log: SsdLog, *numbers: int) -> list[bytes | None]:
    """One call; None for what is not to be had."""
    outs = [memoryview(bytearray(log.kind.block_bytes)) for _ in numbers]
    checksums = log.read([key(number) for number in numbers], outs)
    for number, out, checksum in zip(numbers, outs, checksums, strict=True):
        assert checksum in (None, block_checksum(key(number), out))
    return [
        None if checksum is None else bytes(out)
        for out, checksum in zip(outs, checksums, strict=True)
    ]


def payloads(*numbers: int) -> list[bytes]:
    return [payload(number) for number in numbers]


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.seg"))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(data)


@pytest.mark.parametrize("orderly", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_what_was_appended_is_read_also_after_a_restart(
    tmp_path: Path, batch: int, orderly: bool
) -> None:
    log = open_here(tmp_path)
    numbers = list(range(1, 6))
    for start in range(0, len(numbers), batch):
        assert append(log, *numbers[start : start + batch]) == []
    for opened_again in (False, True):
        if opened_again:
            if orderly:
                log.close()
            else:
                os.close(log._directory_lock)  # as the kernel does after kill -9
            log = open_here(tmp_path)
        assert list(log) == [key(number) for number in numbers]
        assert read(log, *numbers) == payloads(*numbers)
        assert read(log, 9) == [None]
        assert (log.counts.wrong, log.counts.failed) == (0, 0)
    log.close()


@pytest.mark.parametrize("size", [100, PAGE_BYTES, PAGE_BYTES + 32, 3 * PAGE_BYTES])
@pytest.mark.parametrize("aligned", [True, False])
def test_blocks_of_any_size_and_place_in_memory(tmp_path: Path, size: int, aligned: bool) -> None:
    log = open_here(tmp_path, block_bytes=size, segment_bytes=1 << 20, capacity_bytes=4 << 20)
    append(log, *range(1, 8))
    space = aligned_buffer(1 << 20)[0 if aligned else 64 :]
    stride = -(-size // PAGE_BYTES) * PAGE_BYTES
    outs = [space[index * stride : index * stride + size] for index in range(7)]
    assert None not in log.read([key(number) for number in range(1, 8)], outs)
    assert [bytes(out) for out in outs] == [payload(number, size) for number in range(1, 8)]
    log.close()


def test_a_batch_is_one_run_and_a_chain_a_few(tmp_path: Path) -> None:
    log = open_here(tmp_path, segment_bytes=1 << 20, capacity_bytes=4 << 20)
    append(log, 1, 2, 3)
    append(log, 4, 5)
    assert log.runs([key(number) for number in (1, 2, 3, 4, 5, 6)]) == [3, 2, 1]
    assert log.runs([key(number) for number in (2, 3, 1)]) == [2, 1]
    log.close()


def test_the_oldest_segment_goes_and_says_what_was_in_it(tmp_path: Path) -> None:
    log = open_here(tmp_path)
    assert [append(log, number) for number in range(1, WHOLE + 1)] == [[]] * WHOLE
    assert append(log, WHOLE + 1) == [key(1), key(2), key(3)]
    assert len(segments(tmp_path)) == SEGMENTS
    assert key(1) not in log
    assert read(log, 4) == payloads(4)
    log.close()


def test_what_was_read_stays_when_its_segment_goes(tmp_path: Path) -> None:
    log = open_here(tmp_path)
    for number in range(1, WHOLE + 1):
        append(log, number)
    read(log, 2)
    assert append(log, 100) == [key(1), key(3)]
    assert read(log, 2) == payloads(2)
    log.close()
    log = open_here(tmp_path)
    assert read(log, 2) == payloads(2)
    log.close()


def test_dropping_makes_room_though_everything_was_read(tmp_path: Path) -> None:
    log = open_here(tmp_path)
    for number in range(1, 100):
        append(log, number)
        read(log, number)
    assert len(segments(tmp_path)) <= SEGMENTS
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= SEGMENTS * SEGMENT_BYTES
    assert len(log) <= WHOLE
    log.close()


def test_restarts_cost_no_room(tmp_path: Path) -> None:
    """A segment that was hardly begun counts as what it is, not as a whole one."""
    for number in range(1, 3 * SEGMENTS):
        log = open_here(tmp_path, capacity_bytes=8 * SEGMENT_BYTES)
        append(log, number)
        log.close()
    log = open_here(tmp_path, capacity_bytes=8 * SEGMENT_BYTES)
    assert len(log) == 3 * SEGMENTS - 1
    log.close()


@pytest.mark.parametrize("where", [0, BLOCK_BYTES - 1])
def test_a_flipped_bit_is_found_and_the_block_forgotten(tmp_path: Path, where: int) -> None:
    log = open_here(tmp_path)
    append(log, 1, 2, 3)
    (file,) = segments(tmp_path)
    offset = 2 * PAGE_BYTES + PAGE_BYTES + where  # in the second block
    overwrite(file, offset, bytes([file.read_bytes()[offset] ^ 4]))
    assert read(log, 1, 2, 3) == [payload(1), None, payload(3)]
    assert log.counts.wrong == 1
    assert log.take_gone() == [key(2)]
    assert read(log, 2) == [None]
    assert log.counts.wrong == 1
    log.close()


@settings(deadline=None, max_examples=60)
@given(
    cut=st.integers(0, SEGMENT_BYTES),
    flips=st.lists(st.integers(0, SEGMENT_BYTES - 1)),
    orderly=st.booleans(),
    batches=st.sampled_from([((1,), (2,), (3,)), ((1, 2, 3),), ((1,), (2, 3))]),
)
def test_whatever_a_crash_left_nothing_wrong_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    cut: int,
    flips: list[int],
    orderly: bool,
    batches: Sequence[Sequence[int]],
) -> None:
    directory = tmp_path_factory.mktemp("log")
    log = open_here(directory)
    for batch in batches:
        append(log, *batch)
    if orderly:
        log.close()
    else:
        os.close(log._directory_lock)
    (first,) = segments(directory)
    data = bytearray(first.read_bytes())
    whole = len(data)
    data = data[:cut]
    for flip in flips:
        if flip < len(data):
            data[flip] ^= 0xFF
    first.write_bytes(data)
    log = open_here(directory)
    for number, found in zip((1, 2, 3), read(log, 1, 2, 3), strict=True):
        assert found == payload(number) or (found is None and (cut < whole or flips))
    append(log, 7)  # and it goes on
    assert read(log, 7) == payloads(7)
    log.close()


def test_a_torn_page_ends_its_segment(tmp_path: Path) -> None:
    log = open_here(tmp_path)
    for number in range(1, 6):
        append(log, number)
    os.close(log._directory_lock)
    first, _ = segments(tmp_path)
    overwrite(first, PAGE_BYTES + BATCH_BYTES + 40, b"\xff")  # the second batch's page
    os.truncate(first, PAGE_BYTES + 3 * BATCH_BYTES)  # without its index
    log = open_here(tmp_path)
    assert list(log) == [key(1), key(4), key(5)]
    log.close()
    assert list(open_here(tmp_path)) == [key(1), key(4), key(5)], "and has an index now"


def test_opening_reads_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 64 * PAGE_BYTES
    where = {"block_bytes": size, "segment_bytes": 16 * size, "capacity_bytes": 200 * size}
    log = open_here(tmp_path, **where)
    for start in range(1, 41, 4):
        append(log, *range(start, start + 4))
    os.close(log._directory_lock)
    real, asked = os.preadv, 0

    def counted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal asked
        asked += sum(len(buffer) for buffer in buffers)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    log = open_here(tmp_path, **where)
    assert len(log) == 40
    assert asked <= 4 * PAGE_BYTES * (len(segments(tmp_path)) + 10) < 2 * size
    log.close()


@pytest.mark.parametrize("other", [{"block_bytes": BLOCK_BYTES + 1}, {"codec": PayloadCodec.INT8}])
def test_blocks_of_another_kind_are_removed(
    tmp_path: Path, other: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    log = open_here(tmp_path)
    append(log, 1)
    log.close()
    with caplog.at_level("INFO"):
        log = open_here(tmp_path, **other)
    assert "1 segments of another version or kind of blocks are discarded" in caplog.text
    assert list(log) == []
    assert segments(tmp_path) == []
    log.close()


def test_a_batch_of_another_codec_is_no_batch(tmp_path: Path) -> None:
    """Though its segment says otherwise: the codec stands with the blocks."""
    log = open_here(tmp_path, codec=PayloadCodec.INT8)
    append(log, 1)
    os.close(log._directory_lock)
    (file,) = segments(tmp_path)
    other = open_here(tmp_path / "other", codec=PayloadCodec.FP8)
    append(other, 2)
    (of_other,) = segments(tmp_path / "other")
    overwrite(file, 0, of_other.read_bytes()[:PAGE_BYTES])
    other.close()
    log = open_here(tmp_path, codec=PayloadCodec.FP8)
    assert list(log) == []
    log.close()


def test_a_smaller_bound_keeps_the_youngest(tmp_path: Path) -> None:
    log = open_here(tmp_path)
    for number in range(1, 3 * RECORDS_PER_SEGMENT + 1):
        append(log, number)
    log.close()
    log = open_here(tmp_path, capacity_bytes=2 * SEGMENT_BYTES)
    assert list(log) == [key(number) for number in range(4, 10)]
    assert append(log, 10) == [key(4), key(5), key(6)]
    log.close()


@pytest.mark.parametrize("name", ["pwritev", "open"])
def test_a_full_disk_is_said_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    log = open_here(tmp_path)
    append(log, 1, 2, 3)
    append(log, 4)
    append(log, 5)
    if name == "open":
        append(log, 6)
        append(log, 7)  # and the next one needs a segment

    def refuses(*arguments: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    for each in (name, "pwrite") if name == "pwritev" else (name,):
        monkeypatch.setattr(os, each, refuses)
    for _ in range(3):
        with pytest.raises(CapacityError, match="No space left"):
            append(log, 8)
    assert read(log, 3) == payloads(3)
    monkeypatch.undo()
    append(log, 8)
    assert read(log, 1, 8) == payloads(1, 8)
    log.close()


def test_half_a_write_is_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_here(tmp_path)
    append(log, 1)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:PAGE_BYTES], at))
    real_all = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: real_all(fd, parts[:1], at))
    with pytest.raises(CapacityError, match="full"):
        append(log, 2)
    monkeypatch.undo()
    assert key(2) not in log
    append(log, 3)
    os.close(log._directory_lock)
    log = open_here(tmp_path)
    assert list(log) == [key(1), key(3)]
    log.close()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_of_several_writes_those_before_the_first_that_fails_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """They are under way at the same time; what comes behind a gap would not be found again."""
    where = {"segment_bytes": 4 << 20, "capacity_bytes": 16 << 20}
    log = open_here(tmp_path, **where)
    count = log.kind.batch_blocks
    fails_at = PAGE_BYTES + failing * (count + 1) * PAGE_BYTES
    real = os.pwrite

    def full(descriptor: int, data: Any, offset: int) -> int:
        if offset == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CapacityError, match="No space left"):
        append(log, *range(3 * count))
    assert list(log) == [key(number) for number in range(failing * count)]
    monkeypatch.undo()
    append(log, *range(3 * count))
    for _ in range(2):
        assert list(log) == [key(number) for number in range(3 * count)]
        assert read(log, *range(3 * count)) == payloads(*range(3 * count))
        os.close(log._directory_lock)
        log = open_here(tmp_path, **where)


def test_a_bad_place_costs_the_blocks_there_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_here(tmp_path)
    append(log, 1, 2, 3)
    real = os.preadv

    def fails(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = sum(len(buffer) for buffer in buffers)
        if offset <= 3 * PAGE_BYTES < offset + count:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", fails)
    assert read(log, 1, 2, 3) == [payload(1), None, payload(3)]
    assert log.counts.failed == 1
    assert log.take_gone() == [key(2)]
    log.close()


def test_a_file_system_without_o_direct_is_used_by_way_of_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def refuses(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuses)
    with caplog.at_level("INFO"):
        log = open_here(tmp_path)
    assert not log.is_direct
    assert "it has no O_DIRECT" in caplog.text
    append(log, 1, 2)
    assert read(log, 1, 2) == payloads(1, 2)
    log.close()
    monkeypatch.undo()
    log = open_here(tmp_path)  # the bytes are the same
    assert read(log, 1, 2) == payloads(1, 2)
    log.close()


def test_a_segment_that_goes_is_closed_by_its_last_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file may have its descriptor's number by then."""
    log = open_here(tmp_path)
    for number in range(1, WHOLE + 1):
        append(log, number)
    real, reading, goes_on = os.preadv, threading.Event(), threading.Event()

    def slow(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        reading.set()
        assert goes_on.wait(10)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    found: list[bytes | None] = []
    reader = threading.Thread(target=lambda: found.extend(read(log, 1)))
    reader.start()
    assert reading.wait(10)
    monkeypatch.setattr(os, "preadv", real)
    assert key(1) in append(log, 100)
    append(log, 101, 102)
    goes_on.set()
    reader.join()
    assert found == payloads(1)
    log.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    log = open_here(tmp_path)
    with pytest.raises(ConfigError, match="another store node has"):
        open_here(tmp_path)
    log.close()
    open_here(tmp_path).close()


def test_a_bound_below_two_segments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store\.ssd_bytes is 20000, must be at least 73728"):
        open_here(tmp_path, capacity_bytes=20_000)


def test_a_place_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot use"):
        open_here(tmp_path / "file" / "below")
