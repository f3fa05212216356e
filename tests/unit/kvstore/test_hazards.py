"""Boards for pins, and what the node makes of them."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pdserve.errors import StoreUnavailable
from pdserve.ids import SlotId
from pdserve.kvstore import hazards, lending
from pdserve.kvstore.hazards import Boards, ReaderBoard, pins_max
from pdserve.kvstore.lending import Lending

SLOT_COUNT = 16


def numbers(*slots: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.array(slots, np.uint32)


@pytest.fixture
def boards() -> Boards:
    return Boards(SLOT_COUNT)


def reader(boards: Boards, connection: int = 1) -> ReaderBoard:
    board = boards.open(connection)
    try:
        return ReaderBoard(board.descriptor)
    finally:
        os.close(board.descriptor)


def held(boards: Boards) -> set[int]:
    return set(boards.held_of([SlotId(slot) for slot in range(SLOT_COUNT)]))


def test_what_is_on_any_board_is_held_until_it_is_taken_off(boards: Boards) -> None:
    one, two = reader(boards, 1), reader(boards, 2)
    first, second = one.pin(numbers(0, 5, 15)), two.pin(numbers(5))
    assert first is not None
    assert second is not None
    assert held(boards) == {0, 5, 15}
    one.unpin(first)
    one.unpin(first)
    assert held(boards) == {5}
    boards.close(2)
    assert held(boards) == set()
    boards.close(2)


def test_a_board_has_room_for_half_of_the_arena(boards: Boards) -> None:
    board = reader(boards)
    runs = [board.pin(numbers(slot, slot + 1)) for slot in (0, 2, 4, 6)]
    assert None not in runs
    assert board.pin(numbers(9)) is None
    assert runs[1] is not None
    assert runs[2] is not None
    board.unpin(runs[1])
    assert board.pin(numbers(9, 10, 11)) is None, "the gap is of two"
    board.unpin(runs[2])
    assert board.pin(numbers(9, 10, 11)) is not None
    assert board.pin(numbers(12)) is not None
    assert board.pin(numbers(13)) is None
    assert held(boards) == {0, 1, 6, 7, 9, 10, 11, 12}
    assert pins_max(1) == 0
    assert pins_max(1 << 30) == hazards.PINS_MAX


def test_the_node_looks_again_only_at_boards_that_have_changed(boards: Boards) -> None:
    one, two = reader(boards, 1), reader(boards, 2)
    run = one.pin(numbers(3))
    assert run is not None
    assert list(boards.changed()) == [(1, [3])]
    assert list(boards.changed()) == []
    one.unpin(run)
    two.pin(numbers(4))
    assert list(boards.changed()) == [(1, []), (2, [4])]


def test_a_board_may_say_anything(boards: Boards) -> None:
    board = reader(boards)
    board._entries[:] = [1, 2, 17, 0, 0xFFFFFFFF, 12, 1, 1]
    board._header[:] = 1 << 60
    assert held(boards) == {0, 1, 11}
    assert list(boards.changed()) == [(1, [0, 1, 11, 0, 0])]


def test_a_board_can_be_made_neither_shorter_nor_longer(boards: Boards) -> None:
    board = boards.open(1)
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(board.descriptor, size)
    os.close(board.descriptor)


def test_a_board_of_nothing_is_refused() -> None:
    descriptor = os.memfd_create("short")
    with pytest.raises(StoreUnavailable, match="a board for pins of 0 bytes"):
        ReaderBoard(descriptor)
    os.close(descriptor)


# ── lending ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def arena(tmp_path: Path) -> Path:
    path = tmp_path / "arena"
    path.write_bytes(bytes(mmap.PAGESIZE))
    return path


@pytest.fixture
def lender(arena: Path) -> Iterator[Lending]:
    lender = Lending(arena, SLOT_COUNT, can_fence=lambda: True, fence=lambda: True)
    yield lender
    lender.close()


def test_what_is_lent_for_reading_cannot_be_written(lender: Lending) -> None:
    with lender.lend(1, pins=True) as lent:
        assert set(lent) == {lending.ARENA, lending.INDEX, lending.PINS}
        for name in (lending.ARENA, lending.INDEX):
            with pytest.raises(PermissionError):
                mmap.mmap(lent[name], mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(lent[name], b"x", 0)
        pins = lent[lending.PINS]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pins)


def test_who_cannot_pin_gets_the_arena_alone(lender: Lending) -> None:
    with lender.lend(1, pins=False) as lent:
        assert set(lent) == {lending.ARENA}


def test_a_node_that_cannot_fence_lends_no_pins(arena: Path) -> None:
    lender = Lending(arena, SLOT_COUNT, can_fence=lambda: False)
    with lender.lend(1, pins=True) as lent:
        assert set(lent) == {lending.ARENA}
    lender.close()


def test_a_node_without_files_left_lends_no_pins(
    lender: Lending, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with lender.lend(1, pins=True) as lent:
        assert set(lent) == {lending.ARENA}


def test_without_its_fence_everything_may_be_held(arena: Path) -> None:
    lender = Lending(arena, SLOT_COUNT, can_fence=lambda: True, fence=lambda: False)
    slots = [SlotId(1), SlotId(2)]
    assert set(lender.hide(slots)) == set(), "nobody is there who could hold it"
    with lender.lend(1, pins=True):
        assert set(lender.hide(slots)) == {1, 2}
    lender.end(1)
    assert set(lender.hide(slots)) == set()
    lender.close()


@pytest.mark.parametrize("answer", [-1, 0, 1 << 1])
def test_a_kernel_without_membarrier_cannot_fence(
    monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    monkeypatch.setattr(hazards, "_membarrier", lambda command: answer)
    assert not hazards.can_fence()
    assert not hazards.register()


def test_a_processor_that_reorders_cannot_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hazards, "ORDERED", False)
    assert not hazards.register()
