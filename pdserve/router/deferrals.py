"""Who has stepped out of line, to wait for a worker better for it than those that are free.

Pricing a request at all workers takes microseconds for each of them, and whoever waits for a worker
that has its prefix would be priced again at every event, in front of all those behind it. So it
stands aside until one of the workers it waits for is open, or it has waited as long as is worth it;
then it is back in its line, where its key puts it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pdserve.ids import RequestId
from pdserve.router.entry import Entry


@dataclass(frozen=True, slots=True)
class _Aside:
    entry: Entry
    until_ns: int
    awaited_bits: int  # bit set of slots


class Deferrals:
    def __init__(self) -> None:
        self._aside: dict[RequestId, _Aside] = {}
        self._next_ns: float = math.inf  # nobody has waited enough before
        self._awaited_bits = 0  # no other worker is waited for

    def __len__(self) -> int:
        return len(self._aside)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._aside

    def __iter__(self) -> Iterator[Entry]:
        return (aside.entry for aside in self._aside.values())

    @property
    def next_ns(self) -> float:
        """When somebody may have waited enough; ``math.inf``: nobody is here."""
        return self._next_ns

    def add(self, entry: Entry, until_ns: int, awaited_bits: int) -> None:
        assert entry.id not in self._aside, f"{entry.id} stands aside already"
        self._aside[entry.id] = _Aside(entry, until_ns, awaited_bits)
        self._next_ns = min(self._next_ns, until_ns)
        self._awaited_bits |= awaited_bits

    def remove(self, entry: Entry) -> None:
        """What was waited for because of it is forgotten with the next who goes back."""
        del self._aside[entry.id]

    def take_due(self, open_bits: int, now_ns: int, key: Callable[[Entry], float]) -> list[Entry]:
        """Those who go back to their line, and are here no more: who has waited enough, and of
        those who wait for workers that are open the one with the least key. More might be wanted
        by one worker, which is open for one."""
        if now_ns < self._next_ns and not open_bits & self._awaited_bits:
            return []
        aside = self._aside
        due = [one.entry for one in aside.values() if now_ns >= one.until_ns]
        wanting = [one.entry for one in aside.values() if open_bits & one.awaited_bits]
        if wanting and not due:
            due = [min(wanting, key=lambda entry: (key(entry), entry.order))]
        for entry in due:
            del aside[entry.id]
        self._next_ns, self._awaited_bits = math.inf, 0
        for one in aside.values():
            self._next_ns = min(self._next_ns, one.until_ns)
            self._awaited_bits |= one.awaited_bits
        return due
