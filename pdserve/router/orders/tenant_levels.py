"""The levels of one tenant, and who comes first of all in them.

The least of the levels' heads comes next; whoever asks for one further back needs all levels merged
up to there. So the first few are kept in order as entries come and go, and merged anew only when
they have gone: a pick then costs the same however many wait, and however far back it looks.
"""

import heapq
from bisect import insort
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final

from pdserve.router.entry import Entry
from pdserve.router.levels import Level

FRONT_MAX: Final = 16

Item = tuple[int, int, Any]
"""Key, order of arrival (no two are equal), who: an ``Entry``."""


class TenantLevels:
    """Invariant, asserted by ``check``: the front is the first ones of all, in order."""

    def __init__(self, boosts_ns: Sequence[int]) -> None:
        self._boosts_ns = boosts_ns
        self._levels = [Level() for _ in boosts_ns]
        self._count = 0
        self._front: list[Item] = []

    def set_boosts(self, boosts_ns: Sequence[int]) -> None:
        """Levels keep their order; only how they stand to one another changes."""
        self._boosts_ns = boosts_ns
        self._front.clear()

    def __len__(self) -> int:
        return self._count

    def lengths(self) -> list[int]:
        return list(map(len, self._levels))

    def push(self, entry: Entry, virtual_ns: int) -> None:
        level = entry.level
        self._levels[level].push(entry, virtual_ns)
        front = self._front
        item = (virtual_ns - self._boosts_ns[level], entry.order, entry)
        if front and item < front[-1]:
            insort(front, item)
            del front[FRONT_MAX:]
        elif len(front) == self._count < FRONT_MAX:
            front.append(item)
        self._count += 1

    def remove(self, entry: Entry) -> None:
        self._levels[entry.level].remove(entry.id)
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
        filled = (
            (level, boost_ns)
            for level, boost_ns in zip(self._levels, self._boosts_ns, strict=True)
            if level
        )
        return heapq.merge(*(_items(level, boost_ns) for level, boost_ns in filled))

    def check(self) -> None:
        """Linear; for tests."""
        for index, level in enumerate(self._levels):
            level.check()
            assert all(entry.level == index for *_, entry in level)
        assert sum(self.lengths()) == self._count
        assert len(self._front) <= FRONT_MAX
        assert self._front == list(islice(self._merged(), len(self._front)))


def _items(level: Level, boost_ns: int) -> Iterator[Item]:
    for virtual_ns, order, _, entry in level:
        yield virtual_ns - boost_ns, order, entry
