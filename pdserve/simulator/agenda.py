"""What will happen, and when. Equal instants keep the order in which they were entered."""

import heapq
from typing import Any, Final

from pdserve.simulator.surroundings import Action

ORDER_BITS: Final = 40
"""Of an entry's number the lowest, so this bounds the entries of one simulation."""


class Agenda:
    """A heap of plain numbers, instant and order in one: they are compared in a third of the time
    of pairs, and comparing is most of what a heap does."""

    __slots__ = ("_heap", "_order", "_what")

    def __init__(self) -> None:
        self._heap: list[int] = []
        self._what: dict[int, tuple[Action, Any]] = {}
        self._order = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, when_ns: int, action: Action, argument: object) -> None:
        self._order += 1
        number = when_ns << ORDER_BITS | self._order
        self._what[number] = action, argument
        heapq.heappush(self._heap, number)

    def take(self) -> tuple[int, Action, Any]:
        """The next one: its instant, in ns, and what happens then with what."""
        number = heapq.heappop(self._heap)
        action, argument = self._what[number]
        del self._what[number]
        return number >> ORDER_BITS, action, argument
