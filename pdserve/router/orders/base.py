"""The seam between the planner and an order of service.

An order holds the entries that wait for a prefill worker (all of them, or those bound to one
worker) and ranks them. It may keep levels in ``entry.level``, and figures of its own by request.
Time is an argument; an order has neither clock nor chance. Its calls, in the life of one entry:

    push ──> [refresh] ──> dispatched, remove ──> (runs) served, … ──> push again, preempted
                                                                 └──> forget, done or gone
"""

from collections.abc import Iterator
from typing import Protocol

from pdserve.ids import RequestId
from pdserve.router.entry import Entry


class Order(Protocol):
    preempts: bool
    """Whether running prefills may have to yield at all."""

    def push(self, entry: Entry, now_ns: int) -> None:
        """It waits from now on. ``entry.work_ns`` and ``entry.uncached_tokens`` say what is left;
        ``entry.arrived_ns`` is its first arrival, ``entry.queued_at_ns`` is now."""

    def remove(self, entry: Entry) -> None:
        """It waits no more: dispatched, cancelled or lost."""

    def refresh(self, entry: Entry, now_ns: int) -> None:
        """``entry.work_ns`` has changed while it waits (its cached prefix came or went)."""

    def dispatched(self, entry: Entry, now_ns: int) -> None:
        """It is sent to a worker; ``remove`` follows."""

    def served(self, entry: Entry, elapsed_us: int, now_ns: int) -> None:
        """A worker computed one more chunk of it; ``entry.work_ns`` is what is left."""

    def forget(self, entry: Entry) -> None:
        """Its prefill is over or will never be: drop what is kept about it."""

    def may_stand_aside(self, entry: Entry) -> bool:
        """Whether it may be removed for a while, and stand where it stood when pushed again."""
        ...

    def ranked(self, now_ns: int) -> Iterator[Entry]:
        """Those that wait, the next one first; lazily. The order is not changed meanwhile."""

    def key_ns(self, entry: Entry, now_ns: int) -> float:
        """Where it would stand if it waited now with what it has left: smaller goes first."""
        ...

    @property
    def key_basis(self) -> object:
        """While it stays equal, so do the keys of those that were removed for a while."""

    def yields(self, running: Entry, waiting: Entry, margin_ns: int, now_ns: int) -> bool:
        """Whether ``running`` should stop at its next chunk boundary so that ``waiting`` goes
        first. ``margin_ns``: what must at least be gained, about a chunk. That it has more than a
        chunk left and has not yielded too often is the planner's to check."""

    def __len__(self) -> int: ...

    def __contains__(self, request: RequestId) -> bool: ...

    def lengths(self) -> tuple[int, ...]:
        """Entries by level, level 0 first; one figure where there are no levels."""

    def check(self) -> None:
        """Assert what must hold inside. Linear; for tests."""
