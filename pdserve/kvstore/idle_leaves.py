"""The blocks that may be evicted now, by turn and last use, in sorted columns.

Blocks become candidates nearly always in the order in which they will go: the one used last comes
last. So those of one turn are a *run*, two columns of numbers to whose end a block is added, and
whose head goes first. Who comes out of order (a parent whose last child has been evicted, a pin
that has ended) waits in a small heap, together with the heads of the runs; when that heap is full,
the late ones become a run of their own, merged with those that are not much longer (O'Neil et al.,
"The Log-Structured Merge-Tree", 1996). An entry takes 16 bytes.

An entry is out of date once its block was used again, and is skipped when its turn comes.
"""

import heapq
from array import array
from collections.abc import Callable
from itertools import count

import numpy as np
from numpy.typing import NDArray

from pdserve.ids import SlotId
from pdserve.kvstore.eviction import Eviction

LATE_MAX = 256
"""Out of order, in the heap of one turn."""

MERGED_RATIO = 2
"""A run so many times as long as what is to be merged is left alone: there are few runs, and an
entry is moved seldom."""

FORGOTTEN_MIN = 4096
"""Entries at a run's head that are given back together, once they are half of it."""

_LATE = -1
_DEPTH_MAX = (1 << 32) - 1
_SLOT_MASK = (1 << 32) - 1

IsCurrent = Callable[[SlotId, int, int], bool]
"""Of a slot, its turn and its last use: whether it may still be evicted and has not been used
since."""


Worth = tuple[float, int]
"""By the policy, and of equals by last use."""


def rank_of(slot: int, depth: int) -> int:
    """Of those used at the same time the deepest goes first, then the first slot."""
    return (_DEPTH_MAX - depth) << 32 | slot


class _Run:
    """Entries in order; those before ``head`` have left."""

    __slots__ = ("head", "ranks", "uses")

    def __init__(self) -> None:
        self.uses = array("Q")
        self.ranks = array("Q")
        self.head = 0

    def __len__(self) -> int:
        return len(self.uses) - self.head

    def append(self, last_use: int, rank: int) -> None:
        self.uses.append(last_use)
        self.ranks.append(rank)

    def take(self) -> tuple[int, int]:
        head = self.head
        entry = self.uses[head], self.ranks[head]
        self.head = head + 1
        if self.head >= FORGOTTEN_MIN and 2 * self.head >= len(self.uses):
            del self.uses[: self.head], self.ranks[: self.head]
            self.head = 0
        return entry

    def columns(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Copies of what is left."""
        uses = np.frombuffer(self.uses, np.uint64) if self.uses else np.empty(0, np.uint64)
        ranks = np.frombuffer(self.ranks, np.uint64) if self.ranks else np.empty(0, np.uint64)
        return uses[self.head :].copy(), ranks[self.head :].copy()

    @classmethod
    def sorted_of(cls, uses: NDArray[np.uint64], ranks: NDArray[np.uint64]) -> "_Run":
        order = np.lexsort((ranks, uses))
        run = cls()
        run.uses.frombytes(uses[order].tobytes())
        run.ranks.frombytes(ranks[order].tobytes())
        return run


class _Turn:
    """Candidates of one turn. Each run that has entries has its first one in ``front``."""

    __slots__ = ("_late_count", "_newest", "_numbers", "_runs", "_tail", "front")

    def __init__(self) -> None:
        self.front: list[tuple[int, int, int]] = []  # heap of (last use, rank, number of a run)
        self._numbers = count()
        self._late_count = 0
        self._runs: dict[int, _Run] = {}
        self._open_tail()

    def _open_tail(self) -> None:
        self._tail = next(self._numbers)
        self._runs[self._tail] = _Run()
        self._newest: tuple[int, int] | None = None  # None: none of the tail is in ``front``

    def __len__(self) -> int:
        return len(self.front) + sum(map(len, self._runs.values()))

    def entries(self) -> list[tuple[int, int]]:
        """(last use, rank) of all, in no order. For tests."""
        found = [(last_use, rank) for last_use, rank, _ in self.front]
        for run in self._runs.values():
            uses, ranks = run.columns()
            found += zip(uses.tolist(), ranks.tolist(), strict=True)
        return found

    def add(self, last_use: int, rank: int) -> None:
        entry = (last_use, rank)
        if self._newest is None:
            self._newest = entry
            heapq.heappush(self.front, (last_use, rank, self._tail))
        elif entry >= self._newest:
            self._newest = entry
            self._runs[self._tail].append(last_use, rank)
        else:
            heapq.heappush(self.front, (last_use, rank, _LATE))
            self._late_count += 1
            if self._late_count > LATE_MAX:
                self._make_run_of_the_late()

    def fill(self, uses: NDArray[np.uint64], ranks: NDArray[np.uint64]) -> None:
        """Many at once, in whatever order."""
        self._enter(_Run.sorted_of(uses, ranks))

    def pop(self) -> tuple[int, int]:
        """The first."""
        last_use, rank, number = self.front[0]
        if number == _LATE:
            heapq.heappop(self.front)
            self._late_count -= 1
            return last_use, rank
        run = self._runs[number]
        if len(run):
            heapq.heapreplace(self.front, (*run.take(), number))
            return last_use, rank
        heapq.heappop(self.front)
        if number == self._tail:
            self._newest = None
        else:
            del self._runs[number]
        return last_use, rank

    def _enter(self, run: _Run) -> None:
        number = next(self._numbers)
        self._runs[number] = run
        heapq.heappush(self.front, (*run.take(), number))

    def _make_run_of_the_late(self) -> None:
        late = [entry for entry in self.front if entry[2] == _LATE]
        parts = [
            (
                np.array([entry[0] for entry in late], np.uint64),
                np.array([entry[1] for entry in late], np.uint64),
            )
        ]
        total = len(late)
        merged = {_LATE}
        others = sorted((len(run), number) for number, run in self._runs.items())
        for length, number in others:
            if number == self._tail:
                continue
            if length > MERGED_RATIO * total:
                break
            parts.append(self._runs.pop(number).columns())
            heads = [entry for entry in self.front if entry[2] == number]
            parts.append(
                (
                    np.array([entry[0] for entry in heads], np.uint64),
                    np.array([entry[1] for entry in heads], np.uint64),
                )
            )
            merged.add(number)
            total += length + 1
        self.front = [entry for entry in self.front if entry[2] not in merged]
        heapq.heapify(self.front)
        self._late_count = 0
        uses, ranks = (np.concatenate(column) for column in zip(*parts, strict=True))
        self._enter(_Run.sorted_of(uses, ranks))


class IdleLeaves:
    """Within one turn the oldest is the candidate: the chance of going on falls with age, but for
    the time somebody needs to read and think, which all of a turn go through alike."""

    def __init__(self, eviction: Eviction) -> None:
        self._eviction = eviction
        self._turns: dict[int, _Turn] = {}

    def __len__(self) -> int:
        """Those out of date included."""
        return sum(map(len, self._turns.values()))

    def __contains__(self, leaf: tuple[SlotId, int, int]) -> bool:
        """Linear; for tests."""
        slot, turn, last_use = leaf
        entries = self._turns[turn].entries() if turn in self._turns else ()
        return any(entry[0] == last_use and entry[1] & _SLOT_MASK == slot for entry in entries)

    def add(self, slot: SlotId, turn: int, last_use: int, depth: int) -> None:
        self._of_turn(turn).add(last_use, rank_of(slot, depth))

    def fill(self, turn: int, uses: NDArray[np.uint64], ranks: NDArray[np.uint64]) -> None:
        """``add`` of many of one turn, at least one, with their ``rank_of``."""
        self._of_turn(turn).fill(uses, ranks)

    def take(self, now: int, is_current: IsCurrent) -> SlotId | None:
        """The one worth least; None when there is none."""
        best = self._best(now, is_current)
        if best is None:
            return None
        _, rank = self._turns[best[2]].pop()
        return SlotId(rank & _SLOT_MASK)

    def first(self, now: int, is_current: IsCurrent) -> tuple[Worth, SlotId] | None:
        """What ``take`` would take, and what it is worth."""
        best = self._best(now, is_current)
        if best is None:
            return None
        worth, last_use, turn = best
        return (worth, last_use), SlotId(self._turns[turn].front[0][1] & _SLOT_MASK)

    def _best(self, now: int, is_current: IsCurrent) -> tuple[float, int, int] | None:
        """Worth, last use and turn of the one worth least."""
        best: tuple[float, int, int] | None = None
        for turn, entries in self._turns.items():
            front = entries.front
            while front and not is_current(SlotId(front[0][1] & _SLOT_MASK), turn, front[0][0]):
                entries.pop()
                front = entries.front
            if front:
                last_use = front[0][0]
                worth = self._eviction.worth(turn, now - last_use), last_use, turn
                best = worth if best is None else min(best, worth)
        return best

    def _of_turn(self, turn: int) -> _Turn:
        entries = self._turns.get(turn)
        if entries is None:
            entries = self._turns[turn] = _Turn()
        return entries
