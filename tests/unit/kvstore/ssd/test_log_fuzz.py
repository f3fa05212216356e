"""A log whose files somebody has been at: the block that was appended, or it is not there."""

import os
import tempfile
import tracemalloc
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pdserve.kvstore.ssd.format import PAGE_BYTES
from pdserve.kvstore.ssd.log import SsdLog
from tests.unit.kvstore.ssd.test_log import (
    BATCH_BYTES,
    BLOCK_BYTES,
    RECORDS_PER_SEGMENT,
    SEGMENT_BYTES,
    SEGMENTS,
    WHOLE,
    append,
    key,
    open_here,
    payload,
    segments,
)

RECORDS = WHOLE - 2
PAGES = SEGMENT_BYTES // PAGE_BYTES
FIRST_BLOCK = 2 * PAGE_BYTES
LENGTHS = st.integers(0, 2 * SEGMENT_BYTES) | st.just(1 << 40)

damage = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, SEGMENT_BYTES - 1), st.integers(1, 255)),
    st.tuples(st.just("cut"), LENGTHS, st.just(0)),
    st.tuples(st.just("copy"), st.integers(0, PAGES), st.integers(0, PAGES)),  # page over page
    st.tuples(st.just("batch"), *[st.integers(0, RECORDS_PER_SEGMENT - 1)] * 2),
    st.tuples(st.just("shift"), st.integers(0, SEGMENT_BYTES - 1), st.integers(1, PAGE_BYTES)),
)


def do_damage(path: Path, what: str, one: int, other: int) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        match what:
            case "flip":
                byte = os.pread(descriptor, 1, one)
                os.pwrite(descriptor, bytes([byte[0] ^ other]), one) if byte else None
            case "cut":
                os.truncate(path, one)
            case "copy":
                page = os.pread(descriptor, PAGE_BYTES, one * PAGE_BYTES)
                os.pwrite(descriptor, page, other * PAGE_BYTES)
            case "batch":
                batch = os.pread(descriptor, BATCH_BYTES, PAGE_BYTES + one * BATCH_BYTES)
                os.pwrite(descriptor, batch, PAGE_BYTES + other * BATCH_BYTES)
            case "shift":
                os.pwrite(descriptor, os.pread(descriptor, SEGMENT_BYTES, one), one + other)
    finally:
        os.close(descriptor)


def read_all(log: SsdLog) -> set[int]:
    """The numbers of the blocks that are read, each byte compared."""
    out = bytearray(BLOCK_BYTES)
    found = set()
    for number in range(RECORDS + 1):
        if log.read([key(number)], [memoryview(out)]) != [None]:
            assert bytes(out) == payload(number)
            found.add(number)
    return found


@given(st.lists(st.tuples(st.integers(0, SEGMENTS - 1), damage), max_size=6), st.booleans())
def test_a_damaged_log_gives_what_was_appended_or_nothing(
    spoils: list[tuple[int, tuple[str, int, int]]], while_open: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        log = open_here(directory)
        for number in range(RECORDS):
            append(log, number)
        if not while_open:
            log.close()
        files = segments(directory)
        for which, (what, one, other) in spoils:
            do_damage(files[which % len(files)], what, one, other)
        tracemalloc.start()
        try:
            if not while_open:
                log = open_here(directory)
            read_all(log)
            append(log, RECORDS)
            assert RECORDS in read_all(log), "it takes new blocks all the same"
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            log.close()
        assert peak_bytes < 1 << 20, "whatever a file's length says"
        again = open_here(directory)
        read_all(again)
        again.close()


def test_a_segment_goes_that_has_a_block_twice(tmp_path: Path) -> None:
    """It was found to be wrong, and stored again into the segment where it was."""
    log = open_here(tmp_path)
    append(log, 0)
    do_damage(segments(tmp_path)[0], "flip", FIRST_BLOCK, 1)
    assert read_all(log) == set()
    for number in range(WHOLE - 1):
        append(log, number)
    assert key(0) in log
    log.close()
    again = open_here(tmp_path)
    gone = append(again, WHOLE)
    assert gone == [key(0), key(1)], "with the oldest segment"
    again.close()


def test_what_such_a_segment_keeps_it_keeps_once(tmp_path: Path) -> None:
    log = open_here(tmp_path)
    append(log, 0)
    do_damage(segments(tmp_path)[0], "flip", FIRST_BLOCK, 1)
    assert read_all(log) == set()
    append(log, 0)
    assert read_all(log) == {0}, "so it is in use"
    for number in range(1, WHOLE - 1):
        append(log, number)
    assert append(log, WHOLE) == [key(1)], "what nobody reads goes"
    newest = segments(tmp_path)[-1].read_bytes()
    assert newest.count(payload(0)) == 1
    log.close()


def test_an_untouched_log_gives_everything(tmp_path: Path) -> None:
    """Or the test above would be content with nothing."""
    log = open_here(tmp_path)
    for number in range(RECORDS):
        append(log, number)
    assert read_all(log) == set(range(RECORDS))
    do_damage(segments(tmp_path)[0], "flip", FIRST_BLOCK + BLOCK_BYTES // 2, 1)
    assert len(read_all(log)) == RECORDS - 1
    log.close()
