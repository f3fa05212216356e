"""Who has stepped out of line, to wait for a worker better for it than those that are free.

Pricing a request at all workers takes microseconds for each of them, and whoever waits for a worker
that has its prefix would be priced again at every event, in front of all those behind it. So it
stands aside until one of the workers it waits for is open, or it has waited as long as is worth it;
then it is back in its line, where its key puts it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from pdserve.ids import RequestId
from pdserve.router.entry import Entry
from pdserve.router.orders.base import Order


@dataclass(slots=True, eq=False)
class _Aside:
    entry: Entry
    until_ns: int
    awaited_bits: int  # bit set of slots
    place: tuple[float, int] | None = None  # its key and order of arrival; None: not looked up


_place_of = attrgetter("place")


class Deferrals:
    def __init__(self) -> None:
        self._aside: dict[RequestId, _Aside] = {}
        self._key_basis: object = None  # of all places
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

    def take_due(self, open_bits: int, now_ns: int, order: Order) -> list[Entry]:
        """Those who go back to their line, and are here no more: who has waited enough, and of
        those who wait for workers that are open the one with the least key. More might be wanted
        by one worker, which is open for one."""
        if now_ns < self._next_ns and not open_bits & self._awaited_bits:
            return []
        aside = self._aside
        due = [one for one in aside.values() if now_ns >= one.until_ns]
        if not due:
            self._rank(order, now_ns)
            wanting = [one for one in aside.values() if open_bits & one.awaited_bits]
            due = [min(wanting, key=_place_of)] if wanting else []
        for one in due:
            del aside[one.entry.id]
        self._next_ns = min([one.until_ns for one in aside.values()], default=math.inf)
        self._awaited_bits = 0
        for one in aside.values():
            self._awaited_bits |= one.awaited_bits
        return [one.entry for one in due]

    def _rank(self, order: Order, now_ns: int) -> None:
        """Keys are the same as long as their basis is, so most are looked up once."""
        basis = order.key_basis
        is_same = basis == self._key_basis
        self._key_basis = basis
        for one in self._aside.values():
            if one.place is None or not is_same:
                one.place = (order.key_ns(one.entry, now_ns), one.entry.order)

    def check(self, order: Order) -> None:
        """Assert that places are what the line says now. Linear; for tests."""
        for one in self._aside.values():
            place = (order.key_ns(one.entry, 0), one.entry.order)
            assert one.place in (None, place) or self._key_basis != order.key_basis
