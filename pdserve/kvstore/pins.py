"""Prefixes that an operator or a request wants kept: soft and hard pins, each with a lifetime.

A *soft pin* puts a block behind all others in the order of eviction until its time is up: it goes
when nothing else is left (``shares`` has the one exception). A *hard pin* keeps a block from being
evicted at all, as a reader's pin does, so the blocks with hard pins are bounded by a quota of the
arena. After its time a block is like any other.

Pins are on whole prefixes, as far as these are stored, and there is one of each kind per block: the
one that lasts longer. They belong to the node and end with it. A wrong block loses its hard pin, so
its slot becomes free once nobody reads it.

No safety hangs on these times: a pin that ends makes a block evictable, and what may be evicted is
decided by who holds it.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from pdserve.errors import CapacityError
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.slot_states import SlotState
from pdserve.kvstore.slots import SlotTable
from pdserve.kvstore.tickets import RETRY_AFTER_MS

FOREVER_NS = 1 << 62
"""The end of a pin without one."""


class PinBook:
    """Invariants, asserted by ``check``: every slot here is COMMITTED; the parent of a pinned one
    is pinned as long; slots with hard pins are at most ``hard_max``."""

    def __init__(self, slots: SlotTable, hard_max: int, freed: Callable[[], None]) -> None:
        """``freed`` is called after slots may have become available."""
        self.hard_max = hard_max
        self._slots = slots
        self._freed = freed
        self._hard: dict[SlotId, int] = {}  # until when
        self._soft = slots.order.soft
        self._ends: list[tuple[int, SlotId]] = []  # heap; what is out of date is skipped

    @property
    def hard(self) -> Collection[SlotId]:
        """Slots with one pin each in the slot table."""
        return self._hard.keys()

    @property
    def soft_count(self) -> int:
        return len(self._soft)

    def pin(self, keys: Sequence[BlockKey], *, hard: bool, until_ns: int = FOREVER_NS) -> int:
        """How many leading blocks are stored, and pinned at least until then.

        Raises:
            CapacityError: too many slots would have hard pins; nothing has changed.
        """
        prefix = self._slots.lookup(keys)
        if hard:
            new = [slot for slot in prefix if slot not in self._hard]
            self._refuse_beyond_quota(len(new))
            self._slots.pin(new)
            self._lengthen(self._hard, prefix, until_ns)
        else:
            self._lengthen(self._soft, prefix, until_ns)
            self._slots.reorder(prefix)
        return len(prefix)

    def unpin(self, slots: Sequence[SlotId]) -> int:
        """End the pins of these blocks, but for those that a pinned block builds on. How many."""
        ended: set[SlotId] = set()
        deepest_first = sorted(slots, key=lambda slot: -self._slots.depth(slot))
        for pinned in (self._hard, self._soft):
            children = Counter(self._slots.parent(slot) for slot in pinned)
            for slot in deepest_first:
                if slot in pinned and not children[slot]:
                    children[self._slots.parent(slot)] -= 1
                    ended.add(slot)
                    self._end(pinned, slot)
        self._freed()
        return len(ended)

    def expire(self, now_ns: int) -> None:
        """End the pins whose time is up."""
        while self._ends and self._ends[0][0] <= now_ns:
            until_ns, slot = heapq.heappop(self._ends)
            for pinned in (self._hard, self._soft):
                if pinned.get(slot) == until_ns:
                    self._end(pinned, slot)
        self._freed()

    def next_end_ns(self) -> int | None:
        return self._ends[0][0] if self._ends else None

    def drop_condemned(self) -> None:
        """Let go of what can no longer be found. Linear in hard pins; blocks are rarely wrong."""
        for slot in list(self._hard):
            if self._slots.state(slot) is not SlotState.COMMITTED:
                self._end(self._hard, slot)
        for slot in list(self._soft):
            if self._slots.state(slot) is not SlotState.COMMITTED:
                del self._soft[slot]

    def _refuse_beyond_quota(self, count: int) -> None:
        if len(self._hard) + count > self.hard_max:
            raise CapacityError(
                f"{count} more blocks with a hard pin, beside {len(self._hard)}: at most "
                f"{self.hard_max} of this node's {self._slots.slot_count} blocks may have one; "
                "take a soft pin, end others (pdserve kv evict --pinned), or raise "
                "store.hard_pin_ratio",
                retry_after_ms=RETRY_AFTER_MS,
            )

    def _lengthen(self, pinned: dict[SlotId, int], slots: Sequence[SlotId], until_ns: int) -> None:
        for slot in slots:
            if until_ns > pinned.get(slot, 0):
                pinned[slot] = until_ns
                if until_ns < FOREVER_NS:
                    heapq.heappush(self._ends, (until_ns, slot))
        if len(self._ends) > 2 * (len(self._hard) + len(self._soft)) + 64:
            lasting = [*self._hard.items(), *self._soft.items()]
            self._ends = [(until_ns, slot) for slot, until_ns in lasting if until_ns < FOREVER_NS]
            heapq.heapify(self._ends)

    def _end(self, pinned: dict[SlotId, int], slot: SlotId) -> None:
        del pinned[slot]
        if pinned is self._hard:
            self._slots.unpin([slot])
        else:
            self._slots.reorder([slot])

    def check(self) -> None:
        """Assert the invariants. For tests."""
        assert len(self._hard) <= self.hard_max
        for pinned in (self._hard, self._soft):
            for slot, until_ns in pinned.items():
                record = self._slots[slot]
                assert record.state is SlotState.COMMITTED, f"{slot} is pinned and {record.state}"
                if record.parent is not None:
                    assert pinned[record.parent] >= until_ns, "a parent's pin ends earlier"
                assert until_ns >= FOREVER_NS or (until_ns, slot) in self._ends
