"""Every interleaving of a reader that pins by itself with an eviction: never another block's bytes.

Goal: whatever step of the node comes between which steps of a reader, and however long the reader's
stores stay in its core's store buffer, a reader that was let through reads its block's bytes for
as long as it holds it.

Method: the code itself runs, over one index and two copies of a board: the reader's, and what the
node sees of it. A store of the reader is on its own copy until a *flush* carries it over, which is
tried at every place; the fence carries it over too, as ``membarrier`` does. The reader's steps and
flushes are dealt out, in their order and in all ways, to the gaps between the node's steps: before
it hides the slot, before its fence, after it, and after the slot was written by somebody else.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.hazards import ReaderBoard, Run
from pdserve.kvstore.lending import INDEX, PINS, Lending
from pdserve.kvstore.shared_index import IndexReader, SharedIndex, map_index

OLD, NEW = BlockKey(b"old block" + bytes(7)), BlockKey(b"new block" + bytes(7))
SLOT = SlotId(0)
GAPS = 4  # before the node's first step, before its fence, after it, after the slot was reused


@dataclass
class Reader:
    """The steps of ``LocalReads.claim``, apart; ``flush`` makes what it stored visible."""

    index: IndexReader
    board: ReaderBoard  # its own view
    seen: ReaderBoard  # the node's
    memory: dict[SlotId, BlockKey]
    run: Run | None = None
    slots: object = None
    is_through: bool = False
    wrong: list[str] = field(default_factory=list)

    def look_up(self) -> None:
        self.slots = self.index.lookup(OLD)

    def pin(self) -> None:
        if len(self.slots):  # type: ignore[arg-type]
            self.run = self.board.pin(self.slots)  # type: ignore[arg-type]

    def confirm(self) -> None:
        if self.run is None:
            return
        self.is_through = self.index.confirm(self.slots, OLD) is not None  # type: ignore[arg-type]
        if not self.is_through:
            self.board.unpin(self.run)

    def read(self) -> None:
        if self.is_through and self.memory[SLOT] != OLD:
            self.wrong.append(f"read {self.memory[SLOT]!r}")

    def release(self) -> None:
        if self.is_through and self.run is not None:
            self.board.unpin(self.run)
            self.is_through = False

    def flush(self) -> None:
        self.seen._header[:] = self.board._header
        self.seen._entries[:] = self.board._entries


Step = Callable[[Reader], None]
PROGRAM: tuple[Step, ...] = (
    Reader.look_up,
    Reader.pin,
    Reader.confirm,
    Reader.read,
    Reader.read,
    Reader.release,
)


def programs() -> Iterator[tuple[Step, ...]]:
    """The reader's steps with a flush somewhere behind its first store, or in the fence alone."""
    yield PROGRAM
    for place in range(2, len(PROGRAM) + 1):
        yield (*PROGRAM[:place], Reader.flush, *PROGRAM[place:])


def interleavings() -> Iterator[tuple[tuple[Step, ...], tuple[int, ...]]]:
    """Each program, and where it is cut: steps up to ``cuts[gap]`` run in or before that gap."""
    for program in programs():
        for cuts in itertools.combinations_with_replacement(range(len(program) + 1), GAPS):
            yield program, cuts


class Scene:
    """A store of two slots in which ``OLD`` lies in ``SLOT`` and is to be evicted."""

    def __init__(self, directory: Path, *, fences: bool = True) -> None:
        (directory / "arena").write_bytes(b"")
        self._fences = fences
        self.lending = Lending(directory / "arena", 2, can_fence=lambda: True, fence=self._fence)
        self.between: Callable[[int], None] = lambda gap: None
        with self.lending.lend(1, pins=True) as lent:
            index, seen = map_index(lent[INDEX]), ReaderBoard(lent[PINS])
        descriptor = os.memfd_create("own")
        os.ftruncate(descriptor, 64 + seen._entries.nbytes)
        self.memory: dict[SlotId, BlockKey] = {}
        self.reader = Reader(index, ReaderBoard(descriptor), seen, self.memory)
        os.close(descriptor)

    def prepare(self) -> None:
        """Everything as at the beginning; files and mappings are made once."""
        reader = self.reader
        self.reader = Reader(reader.index, reader.board, reader.seen, self.memory)
        for board in (reader.board, reader.seen):
            board._header[:] = 0
            board._entries[:] = 0
            board._runs.clear()
        self.between = lambda gap: None
        self.core = StoreCore(2, readers=self.lending)
        self.owner = self.core.connect("w")
        self.put(OLD)
        self.put(BlockKey(b"beside" + bytes(10)))

    def put(self, key: BlockKey) -> bool:
        """As a writer does, that fills its slot as soon as it has it."""
        grant = self.core.reserve(self.owner, [key], 0)
        self.settle()
        if grant.write == 0:
            return False
        self.memory[grant.slots[0]] = key
        self.core.filled(self.owner, grant.write, 0, 0)
        self.core.commit(self.owner, grant.write)
        self.settle()
        return True

    def settle(self) -> None:
        for slot, record in self.core.take_changed_slots().items():
            self.lending.note(slot, record)

    def _fence(self) -> bool:
        self.between(1)
        if self._fences:
            self.reader.flush()
        self.between(2)
        return True

    def play(self, program: tuple[Step, ...], cuts: tuple[int, ...]) -> list[str]:
        """What the reader saw that it should not have; ``NEW`` is put meanwhile."""
        self.prepare()
        position = 0

        def run_until(gap: int) -> None:
            nonlocal position
            while position < cuts[gap]:
                program[position](self.reader)
                position += 1

        run_until(0)
        self.between = run_until
        self.put(NEW)
        self.between = lambda gap: None
        run_until(3)
        for step in program[position:]:
            step(self.reader)
        self.reader.flush()
        self.core.room.look()
        self.settle()
        self.core.check()
        assert self.core.stat().slots_draining == 0, "a slot that nobody holds is not free"
        return self.reader.wrong


def wrong_plays(scene: Scene) -> Iterator[str]:
    for program, cuts in interleavings():
        seen = scene.play(program, cuts)
        if seen:
            yield f"{[step.__name__ for step in program]} cut at {cuts}: {seen}"


def test_no_interleaving_lets_a_reader_see_another_block(tmp_path: Path) -> None:
    assert list(wrong_plays(Scene(tmp_path))) == []


def test_every_step_is_tried_everywhere() -> None:
    tried = list(interleavings())
    assert len(tried) == len(set(tried)) > 1500


def test_without_the_fence_some_interleaving_does(tmp_path: Path) -> None:
    assert next(wrong_plays(Scene(tmp_path, fences=False)), None) is not None


def test_without_the_check_behind_the_pin_some_interleaving_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IndexReader, "confirm", lambda *_: True)
    assert next(wrong_plays(Scene(tmp_path)), None) is not None


def test_without_hiding_first_some_interleaving_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SharedIndex, "hide", lambda *_: None)
    assert next(wrong_plays(Scene(tmp_path)), None) is not None
