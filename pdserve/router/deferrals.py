"""Who has stepped out of line, to wait for a worker better for it than those that are free.

Pricing a request at all workers takes microseconds for each of them, and whoever waits for a worker
that has its prefix would be priced again at every event, in front of all those behind it. So it
stands aside until one of the workers it waits for is open, or it has waited as long as is worth it;
then it is back in its line, where its key puts it.

Many wait for the same workers, those of the host that has the prefix. They stand together, the
least key first, so that whom an open worker calls is found by a look at each such *group*, however
many there are in it.
"""

import math
from collections.abc import Iterator

from pdserve.ids import RequestId
from pdserve.router.deadlines import Deadlines
from pdserve.router.entry import Entry
from pdserve.router.orders.base import Order
from pdserve.router.orders.heap import KeyedHeap


class _Group:
    """Those who wait for the same workers. No dataclass, for the reason of ``Choice``."""

    __slots__ = ("awaited_bits", "count", "ranked")

    def __init__(self, awaited_bits: int) -> None:
        self.awaited_bits = awaited_bits  # bit set of slots
        self.count = 0
        self.ranked = KeyedHeap[float]()  # whose keys were looked up


class _Aside:
    __slots__ = ("entry", "group", "serial")

    def __init__(self, entry: Entry, serial: int, group: _Group) -> None:
        self.entry = entry
        self.serial = serial  # of those who ever stood aside
        self.group = group


class Deferrals:
    def __init__(self) -> None:
        self._aside: dict[RequestId, _Aside] = {}
        self._groups: dict[int, _Group] = {}  # by whom they wait for
        self._fresh: dict[RequestId, _Aside] = {}  # whose keys have not been looked up
        self._ends = Deadlines()
        self._serial = 0
        self._key_basis: object = None  # of all keys looked up
        self._next_ns: float = math.inf  # nobody has waited enough before
        self._awaited_bits = 0  # no other worker is waited for; some of these perhaps no more

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
        group = self._groups.get(awaited_bits)
        if group is None:
            group = self._groups[awaited_bits] = _Group(awaited_bits)
            self._awaited_bits |= awaited_bits
        group.count += 1
        self._serial += 1
        one = _Aside(entry, self._serial, group)
        self._aside[entry.id] = self._fresh[entry.id] = one
        self._ends.add(entry.id, until_ns)
        self._next_ns = min(self._next_ns, until_ns)

    def remove(self, entry: Entry) -> None:
        self._take(entry.id)
        self._ends.remove(entry.id)

    def take_due(self, open_bits: int, now_ns: int, order: Order) -> list[Entry]:
        """Those who go back to their line, and are here no more: who has waited enough, and of
        those who wait for workers that are open the one with the least key. More might be wanted
        by one worker, which is open for one."""
        if now_ns < self._next_ns and not open_bits & self._awaited_bits:
            return []
        due = [self._take(request) for request in self._ends.due(now_ns)]
        if due:
            due.sort(key=_serial_of)
        else:
            self._rank(order, now_ns)
            wanting = self._first_for(open_bits)
            if wanting is not None:
                due = [self._take(wanting.id)]
                self._ends.remove(wanting.id)
            else:
                self._forget_unwanted()
        next_ns = self._ends.next_ns()
        self._next_ns = math.inf if next_ns is None else next_ns
        return [one.entry for one in due]

    def _take(self, request: RequestId) -> _Aside:
        one = self._aside.pop(request)
        group = one.group
        if self._fresh.pop(request, None) is None:
            group.ranked.remove(one.entry)
        group.count -= 1
        if not group.count:
            del self._groups[group.awaited_bits]
        return one

    def _forget_unwanted(self) -> None:
        """Workers for which nobody waits any more. Groups come and go all the time, so this is done
        only where one of those workers is open, and has been taken for waited for."""
        self._awaited_bits = 0
        for awaited_bits in self._groups:
            self._awaited_bits |= awaited_bits

    def _first_for(self, open_bits: int) -> Entry | None:
        """The one with the least key of those who wait for any of these workers."""
        first: tuple[float, int] | None = None
        wanting: Entry | None = None
        for awaited_bits, group in self._groups.items():
            if open_bits & awaited_bits:
                key_ns, number, _, entry = group.ranked.top
                if first is None or (key_ns, number) < first:
                    first, wanting = (key_ns, number), entry
        return wanting

    def _rank(self, order: Order, now_ns: int) -> None:
        """Keys are the same as long as their basis is, so most are looked up once."""
        basis = order.key_basis
        if basis != self._key_basis:
            self._key_basis = basis
            for group in self._groups.values():
                group.ranked.rekey(lambda entry: order.key_ns(entry, now_ns))
        for one in self._fresh.values():
            one.group.ranked.push(one.entry, order.key_ns(one.entry, now_ns))
        self._fresh.clear()

    def check(self, order: Order) -> None:
        """Assert that groups are whole, and keys what the line says now. Linear; for tests."""
        members = 0
        for awaited_bits, group in self._groups.items():
            assert group.awaited_bits == awaited_bits
            assert awaited_bits & ~self._awaited_bits == 0
            group.ranked.check()
            fresh = sum(one.group is group for one in self._fresh.values())
            assert group.count == len(group.ranked) + fresh > 0
            members += group.count
            if self._key_basis == order.key_basis:
                for key_ns, _, _, entry in group.ranked.places():
                    assert key_ns == order.key_ns(entry, 0), entry.id
        assert members == len(self._aside)


def _serial_of(one: _Aside) -> int:
    return one.serial
