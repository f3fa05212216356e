"""When which request must be over. Removal is lazy; the heap stays within twice its use."""

import heapq
from typing import Final

from pdserve.ids import RequestId

DEAD_DEADLINES_MAX: Final = 64
"""Deadlines of requests that are over, kept beyond as many as there are live ones."""


class Deadlines:
    def __init__(self) -> None:
        self._instants: dict[RequestId, int] = {}
        self._heap: list[tuple[int, RequestId]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: RequestId, deadline_ns: int) -> None:
        self._instants[request] = deadline_ns
        heapq.heappush(self._heap, (deadline_ns, request))

    def remove(self, request: RequestId) -> None:
        self._instants.pop(request, None)
        if len(self._heap) > 2 * len(self._instants) + DEAD_DEADLINES_MAX:
            self._heap = [(instant, request) for request, instant in self._instants.items()]
            heapq.heapify(self._heap)

    def next_ns(self) -> int | None:
        while self._heap and self._instants.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now_ns: int) -> list[RequestId]:
        """Takes out those whose deadline has passed, earliest first."""
        passed = []
        while (instant_ns := self.next_ns()) is not None and instant_ns <= now_ns:
            _, request = heapq.heappop(self._heap)
            del self._instants[request]
            passed.append(request)
        return passed
