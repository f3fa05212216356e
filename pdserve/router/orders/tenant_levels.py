"""The rungs of one tenant's levels, and who comes first of all on them.

The least of the rungs' heads comes next; whoever asks for one further back needs all rungs merged
up to there. So the first few are kept in order as entries come and go, and merged anew only when
they have gone: a pick then costs the same however many wait, and however far back it looks.
"""

import heapq
from bisect import insort
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final

from pdserve.router.entry import Entry
from pdserve.router.levels import Rung

FRONT_MAX: Final = 16

Item = tuple[int, int, Any]
"""Key, order of arrival (no two are equal), who: an ``Entry``."""


class TenantLevels:
    """Invariant, asserted by ``check``: the front is the first ones of all, in order."""

    def __init__(self, boosts_ns: Sequence[int]) -> None:
        self._boosts_ns = boosts_ns
        self._rungs: dict[int, Rung] = {}  # on which somebody has stood
        self._count = 0
        self._front: list[Item] = []

    def set_boosts(self, boosts_ns: Sequence[int]) -> None:
        """Rungs keep their order; only how they stand to one another changes."""
        self._boosts_ns = boosts_ns
        self._front.clear()

    def __len__(self) -> int:
        return self._count

    def lengths(self) -> Iterator[tuple[int, int]]:
        """(rung, how many stand on it)."""
        return ((number, len(rung)) for number, rung in self._rungs.items())

    def push(self, entry: Entry, virtual_ns: int) -> None:
        rung = self._rungs.get(entry.rung)
        if rung is None:
            rung = self._rungs[entry.rung] = Rung()
        rung.push(entry, virtual_ns)
        front = self._front
        item = (virtual_ns - self._boosts_ns[entry.rung], entry.order, entry)
        if front and item < front[-1]:
            insort(front, item)
            del front[FRONT_MAX:]
        elif len(front) == self._count < FRONT_MAX:
            front.append(item)
        self._count += 1

    def remove(self, entry: Entry) -> None:
        self._rungs[entry.rung].remove(entry.id)
        self._count -= 1
        for index, item in enumerate(self._front):
            if item[2] is entry:
                del self._front[index]
                break

    @property
    def head(self) -> Entry | None:
        """The entry with the least key, ties to who came first."""
        if not self._front:
            if not self._count:
                return None
            self._front = list(islice(self._merged(), FRONT_MAX))
        entry: Entry = self._front[0][2]
        return entry

    def __iter__(self) -> Iterator[Item]:
        """From the first on. Nobody may come or go meanwhile."""
        seen = len(self._front)
        yield from self._front
        if seen < self._count:
            yield from islice(self._merged(), seen, None)

    def _merged(self) -> Iterator[Item]:
        boosts_ns = self._boosts_ns
        filled = ((rung, boosts_ns[number]) for number, rung in self._rungs.items() if rung)
        return heapq.merge(*(_items(rung, boost_ns) for rung, boost_ns in filled))

    def check(self) -> None:
        """Linear; for tests."""
        for number, rung in self._rungs.items():
            rung.check()
            assert all(entry.rung == number for *_, entry in rung)
        assert sum(map(len, self._rungs.values())) == self._count
        assert len(self._front) <= FRONT_MAX
        assert self._front == list(islice(self._merged(), len(self._front)))


def _items(rung: Rung, boost_ns: int) -> Iterator[Item]:
    for virtual_ns, order, _, entry in rung:
        yield virtual_ns - boost_ns, order, entry
