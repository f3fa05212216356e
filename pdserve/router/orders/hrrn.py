"""Highest response ratio next: waited time over uncached tokens, greatest first.

Ratios grow at different speeds, so the order of two waiting requests changes by itself and nothing
can be kept sorted: the first costs O(n), each further one O(log n).

Source: Brinch Hansen, 1971; as a prefill order SGLang PR #32911.
"""

import heapq
from collections.abc import Iterator

from pdserve.ids import RequestId
from pdserve.router.entry import Entry
from pdserve.router.orders.base import Order


class HighestResponseRatio(Order):
    def __init__(self) -> None:
        self._waiting: dict[RequestId, Entry] = {}

    def push(self, entry: Entry, now_ns: int) -> None:
        assert entry.id not in self._waiting, f"{entry.id} waits already"
        self._waiting[entry.id] = entry

    def remove(self, entry: Entry) -> None:
        assert entry.id in self._waiting, f"{entry.id} does not wait"
        del self._waiting[entry.id]

    def refresh(self, entry: Entry, now_ns: int) -> None:
        assert entry.id in self._waiting, f"{entry.id} does not wait"

    def dispatched(self, entry: Entry, now_ns: int) -> None:
        pass

    def served(self, entry: Entry, elapsed_us: int, now_ns: int) -> None:
        pass

    def forget(self, entry: Entry) -> None:
        assert entry.id not in self._waiting, f"{entry.id} waits, it cannot be forgotten"

    def may_stand_aside(self, entry: Entry) -> bool:
        return False

    def ranked(self, now_ns: int) -> Iterator[Entry]:
        # Orders of arrival differ, so two entries are never compared themselves.
        heap = [(self.key_ns(e, now_ns), e.order, e) for e in self._waiting.values()]
        heapq.heapify(heap)
        while heap:
            yield heapq.heappop(heap)[2]

    def key_ns(self, entry: Entry, now_ns: int) -> float:
        return -(now_ns - entry.arrived_ns) / max(1, entry.uncached_tokens)

    def yields(self, running: Entry, waiting: Entry, margin_ns: int, now_ns: int) -> bool:
        return False

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._waiting

    def lengths(self) -> tuple[int, ...]:
        return (len(self._waiting),)

    def check(self) -> None:
        for request, entry in self._waiting.items():
            assert entry.id == request
