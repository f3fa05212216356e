"""Where prompts wait: in one line that all workers draw from, or in one line per worker.

One line is *late binding*: who is served where is decided when a worker is free, so no estimate of
queues can be stale and cancelling is cheap. A line per worker is what placement on arrival means.
"""

from collections.abc import Callable, Iterator

from pdserve.ids import WorkerId
from pdserve.router.deferrals import Deferrals
from pdserve.router.entry import Entry
from pdserve.router.orders.base import Order
from pdserve.router.orders.skip_join import SkipJoin


class Lines:
    def __init__(self, new_order: Callable[[], Order]) -> None:
        self._new_order = new_order
        self.shared = new_order()
        self.aside = Deferrals()  # of the shared line
        self._own: dict[WorkerId, Order] = {}

    def of(self, entry: Entry) -> Order:
        return self.shared if entry.bound_to is None else self._own[entry.bound_to]

    def own(self, worker: WorkerId) -> Order:
        """The line of one worker."""
        if worker not in self._own:
            self._own[worker] = self._new_order()
        return self._own[worker]

    def drop(self, worker: WorkerId) -> None:
        """The worker is gone, and so is everybody who waited for it."""
        order = self._own.pop(worker, None)
        assert order is None or not len(order), f"somebody waits for {worker}"

    def all(self) -> Iterator[Order]:
        yield self.shared
        yield from self._own.values()

    @property
    def some_are_bound(self) -> bool:
        """Whether anybody waits in the line of one worker."""
        return any(map(len, self._own.values())) if self._own else False

    def __len__(self) -> int:
        own = sum(map(len, self._own.values())) if self._own else 0
        return len(self.shared) + len(self.aside) + own

    def lengths(self) -> tuple[int, ...]:
        """Entries by level, over all lines."""
        columns = zip(*(order.lengths() for order in self.all()), strict=True)
        counts = [sum(column) for column in columns]
        for entry in self.aside:
            counts[min(entry.level, len(counts) - 1)] += 1
        return tuple(counts)


def first_of(order: Order, now_ns: int) -> Entry:
    """The next one of those that wait; there must be one."""
    if isinstance(order, SkipJoin):  # asked for at every event, and cheap here
        first = order.head(now_ns)
        assert first is not None
        return first
    return next(order.ranked(now_ns))
