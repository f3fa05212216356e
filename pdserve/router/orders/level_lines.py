"""Who waits, by level and by place within the level; two ways to keep it.

A *place* is a number: new ones at the back are larger than all before, new ones at the front are
smaller. ``LevelHeap`` finds the first in O(log n) however long the lines are. ``LevelLists`` is a
list per level, from whose front entries are taken and at whose front they are put back, each of
which moves all that stand behind: what FastServe's code does, and kept to show what it costs.
"""

from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator
from operator import itemgetter
from typing import Protocol

from pdserve.router.entry import Entry
from pdserve.router.orders.heap import KeyedHeap


class LevelLines(Protocol):
    def push(self, entry: Entry, place: int) -> None:
        """It stands in the line of ``entry.level``, which does not change while it does."""

    def remove(self, entry: Entry) -> None: ...

    def __iter__(self) -> Iterator[Entry]:
        """Level 0 first, least place first."""


class LevelHeap:
    def __init__(self) -> None:
        self._heap: KeyedHeap[tuple[int, int]] = KeyedHeap()

    def push(self, entry: Entry, place: int) -> None:
        self._heap.push(entry, (entry.level, place))

    def remove(self, entry: Entry) -> None:
        self._heap.remove(entry)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._heap)


class LevelLists:
    def __init__(self) -> None:
        self._lines: defaultdict[int, list[tuple[int, Entry]]] = defaultdict(list)

    def push(self, entry: Entry, place: int) -> None:
        line = self._lines[entry.level]
        line.insert(bisect(line, place, key=itemgetter(0)), (place, entry))

    def remove(self, entry: Entry) -> None:
        line = self._lines[entry.level]
        del line[next(index for index, (_, other) in enumerate(line) if other is entry)]
        if not line:
            del self._lines[entry.level]

    def __iter__(self) -> Iterator[Entry]:
        for level in sorted(self._lines):
            for _, entry in self._lines[level]:
                yield entry
