"""Servers that draw from an order, to see what its ranking means for those who wait.

Each of ``count`` servers takes the next entry when it is free and computes it to the end. Nothing
is preempted, cached or fetched.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.router.entry import Entry
from pdserve.router.orders.skip_join import SkipJoin


@dataclass(frozen=True, slots=True)
class Served:
    entry: Entry
    began_ns: int
    bound_ns: int | None  # of its claim to be rescued, if it had one
    rescued: bool  # it went out of turn

    @property
    def wait_ns(self) -> int:
        return self.began_ns - self.entry.arrived_ns

    @property
    def response_ns(self) -> int:
        return self.wait_ns + self.entry.work_ns


def serve_all(order: SkipJoin, arrivals: Sequence[Entry], count: int) -> list[Served]:
    """Who was served, in order; ``arrivals`` by instant."""
    order.set_workers(count)
    free = [0] * count  # heap of the instants at which servers are free
    served: list[Served] = []
    coming = 0
    while coming < len(arrivals) or len(order):
        now_ns = free[0]
        if not len(order):
            now_ns = max(now_ns, arrivals[coming].arrived_ns)
        while coming < len(arrivals) and arrivals[coming].arrived_ns <= now_ns:
            order.push(arrivals[coming], arrivals[coming].arrived_ns)
            coming += 1
        entry = next(order.ranked(now_ns))
        bound_ns, in_turn = order.bound_ns(entry), order._first(now_ns) is entry
        order.dispatched(entry, now_ns)
        order.remove(entry)
        order.forget(entry)
        heapq.heapreplace(free, now_ns + entry.work_ns)
        served.append(Served(entry, now_ns, bound_ns, not in_turn))
    return served
