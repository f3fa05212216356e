"""The seam between the planner and an order of service.

An order holds the entries that wait for a prefill worker (all of them, or those bound to one
worker) and ranks them. It may keep levels in ``entry.level``, and figures of its own by request.
Time is an argument; an order has neither clock nor chance. It is a base class and no ``Protocol``:
compiled, a call then goes through a table instead of a search by name, a dozen times per decision.
Its calls, in the life of one entry:

    push ──> [refresh] ──> dispatched, remove ──> (runs) served, … ──> push again, preempted
                                                                 └──> forget, done or gone
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from pdserve.ids import RequestId
from pdserve.router.entry import Entry


class Order(ABC):
    preempts: bool = False
    """Whether running prefills may have to yield at all."""

    key_basis: object = None
    """While it stays equal, so do the keys of those that were removed for a while. None: nobody
    is."""

    @abstractmethod
    def push(self, entry: Entry, now_ns: int) -> None:
        """It waits from now on. ``entry.work_ns`` and ``entry.uncached_tokens`` say what is left;
        ``entry.arrived_ns`` is its first arrival, ``entry.queued_at_ns`` is now."""

    @abstractmethod
    def remove(self, entry: Entry) -> None:
        """It waits no more: dispatched, cancelled or lost."""

    @abstractmethod
    def refresh(self, entry: Entry, now_ns: int) -> None:
        """``entry.work_ns`` has changed while it waits (its cached prefix came or went)."""

    @abstractmethod
    def dispatched(self, entry: Entry, now_ns: int) -> None:
        """It is sent to a worker; ``remove`` follows."""

    @abstractmethod
    def served(self, entry: Entry, elapsed_us: int, now_ns: int) -> None:
        """A worker computed one more chunk of it; ``entry.work_ns`` is what is left."""

    @abstractmethod
    def forget(self, entry: Entry) -> None:
        """Its prefill is over or will never be: drop what is kept about it."""

    @abstractmethod
    def may_stand_aside(self, entry: Entry) -> bool:
        """Whether it may be removed for a while, and stand where it stood when pushed again."""

    @abstractmethod
    def ranked(self, now_ns: int) -> Iterator[Entry]:
        """Those that wait, the next one first; lazily. The order is not changed meanwhile."""

    @abstractmethod
    def key_ns(self, entry: Entry, now_ns: int) -> float:
        """Where it would stand if it waited now with what it has left: smaller goes first."""

    def kept_share(self, running: Entry, now_ns: int) -> float:
        """The part of every chunk that ``running`` keeps while it lets others go first."""
        return 0.0

    @abstractmethod
    def yields(self, running: Entry, waiting: Entry, margin_ns: int, now_ns: int) -> bool:
        """Whether ``running`` should stop at its next chunk boundary so that ``waiting`` goes
        first. ``margin_ns``: what must at least be gained, about a chunk. That it has more than a
        chunk left and has not yielded too often is the planner's to check."""

    @abstractmethod
    def __len__(self) -> int:
        """How many wait."""

    @abstractmethod
    def __contains__(self, request: RequestId) -> bool:
        """Whether it waits."""

    @abstractmethod
    def lengths(self) -> tuple[int, ...]:
        """Entries by level, level 0 first; one figure where there are no levels."""

    @abstractmethod
    def check(self) -> None:
        """Assert what must hold inside. Linear; for tests."""
