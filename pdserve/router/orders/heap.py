"""Entries by a key that stays the same while they wait: a binary heap with lazy deletion.

A removed entry's place stays in the heap, dead, until it comes to the top or there are too many
dead ones. So joining and leaving cost O(log n), amortised, and the first ``k`` are found in
O(k log k) without disturbing the rest: a walk down the heap that takes the least place it has seen
next. Dead places in its way are walked over; there are never many more than live ones.
"""

import heapq
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from pdserve.router.entry import Entry
from pdserve.router.places import DEAD_PLACES_MAX, Place, Places

Key = TypeVar("Key", float, tuple[int, int])


class KeyedHeap(Places, Generic[Key]):
    """Least key first; at equal keys who came first.

    Invariants, asserted by ``check``:
        the top is live, if anybody is;
        live places + dead places == places, dead ≤ live + DEAD_PLACES_MAX.
    """

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[Place] = []

    def push(self, entry: Entry, key: Key) -> None:
        heapq.heappush(self._heap, self._place(entry, key))

    def remove(self, entry: Entry) -> None:
        assert entry.id in self._live, f"{entry.id} does not wait"
        del self._live[entry.id]
        heap = self._heap
        while heap and not self._is_live(heap[0]):
            heapq.heappop(heap)
        if len(heap) > 2 * len(self._live) + DEAD_PLACES_MAX:
            self._heap = self.places()
            heapq.heapify(self._heap)

    @property
    def top(self) -> Place:
        """The first place; there must be one."""
        return self._heap[0]

    def places(self) -> list[Place]:
        """Live ones, in no order."""
        return [place for place in self._heap if self._is_live(place)]

    def rekey(self, key: Callable[[Entry], Key]) -> None:
        """Everybody's key anew. Linear."""
        entries = [place[3] for place in self.places()]
        self._heap = []
        self._live = {}
        for entry in entries:
            self.push(entry, key(entry))

    def __iter__(self) -> Iterator[Entry]:
        heap = self._heap
        seen = [(heap[0], 0)] if heap else []
        while seen:
            place, index = heapq.heappop(seen)
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(heap):
                    heapq.heappush(seen, (heap[child], child))
            if self._is_live(place):
                yield place[3]

    def check(self) -> None:
        """Assert the invariants. Linear; for tests."""
        live = self.places()
        assert len(live) == len(self._live)
        assert len(self._heap) - len(live) <= len(live) + DEAD_PLACES_MAX
        assert not self._heap or self._is_live(self._heap[0])
