"""The life of a slot: one block's place in an arena. No bytes are touched here.

    FREE ──RESERVE──> RESERVED ──PUBLISH──> COMMITTED ──CONDEMN──> QUARANTINED
                         │                      │                      ^
                         └──KEEP──> PRIVATE <───┘ DETACH               │
                                      └───────────────── CONDEMN ──────┘
    and from each of the four, FREE ──> FREE.

RESERVED belongs to one writer; COMMITTED is in the index, and its bytes never change; PRIVATE is
complete too but in no index (a request's unfinished last block, or a block whose parent is gone),
and lives as long as somebody has pinned it; QUARANTINED failed its checksum: nobody finds it again.

Blocks form a forest: a block's *parent* is the block before it in the chain. Two rules hold:
a COMMITTED block's parent is COMMITTED, so the index is closed under prefixes and a lookup is a
walk; and the parent of a pinned block is pinned, because pins are taken on whole prefixes. So every
COMMITTED block without pins can be evicted, children before parents: what is *available* is a sum
of two counters.

Eviction takes the block whose last use is longest ago; of one chain the deepest first.
A slot's *generation* counts its reservations: (slot, generation) names bytes for ever.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from pdserve.errors import IllegalTransition
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.feed import ChangeFeed


class SlotState(StrEnum):
    FREE = "free"
    RESERVED = "reserved"
    COMMITTED = "committed"
    PRIVATE = "private"
    QUARANTINED = "quarantined"


class SlotEvent(StrEnum):
    RESERVE = "reserve"  # a writer got it
    PUBLISH = "publish"  # written, and in the index from now on
    KEEP = "keep"  # written, for its owner alone
    DETACH = "detach"  # an ancestor was condemned while somebody had this one pinned
    CONDEMN = "condemn"  # its bytes fail their checksum
    FREE = "free"  # nobody wants it, and no process may touch it


TRANSITIONS: Mapping[SlotState, Mapping[SlotEvent, SlotState]] = MappingProxyType(
    {
        SlotState.FREE: {SlotEvent.RESERVE: SlotState.RESERVED},
        SlotState.RESERVED: {
            SlotEvent.PUBLISH: SlotState.COMMITTED,
            SlotEvent.KEEP: SlotState.PRIVATE,
            SlotEvent.FREE: SlotState.FREE,
        },
        SlotState.COMMITTED: {
            SlotEvent.DETACH: SlotState.PRIVATE,
            SlotEvent.CONDEMN: SlotState.QUARANTINED,
            SlotEvent.FREE: SlotState.FREE,
        },
        SlotState.PRIVATE: {
            SlotEvent.CONDEMN: SlotState.QUARANTINED,
            SlotEvent.FREE: SlotState.FREE,
        },
        SlotState.QUARANTINED: {SlotEvent.FREE: SlotState.FREE},
    }
)


@dataclass(slots=True)
class Slot:
    """What is known of one slot. Changed by ``SlotTable`` only."""

    state: SlotState = SlotState.FREE
    generation: int = 0
    key: BlockKey | None = None
    checksum: int = 0
    parent: SlotId | None = None
    depth: int = 0  # of the block in its chain, from 0
    children: int = 0
    pins: int = 0
    last_use: int = 0  # the table's own count of uses; no clock


class SlotTable:
    """All slots of an arena, the index over them, and the order of eviction.

    Invariants, asserted by ``check``: the index holds exactly the COMMITTED slots; a COMMITTED
    slot's parent is COMMITTED and has pins if it has; child counts are right; FREE and RESERVED
    slots have no pins, PRIVATE and QUARANTINED ones have some; every idle leaf is in the heap.
    """

    def __init__(self, slot_count: int, feed: ChangeFeed) -> None:
        assert slot_count > 0
        self._slots = [Slot() for _ in range(slot_count)]
        self._free = [SlotId(slot) for slot in reversed(range(slot_count))]  # warm ones on top
        self._index: dict[BlockKey, SlotId] = {}
        self._idle_count = 0  # COMMITTED without pins
        self._idle_leaves: list[tuple[int, int, SlotId]] = []  # heap; stale entries are skipped
        self._uses = 0
        self._feed = feed
        self._changed: set[SlotId] = set()
        self.evicted_count = 0
        self.condemned_count = 0

    def __getitem__(self, slot: SlotId) -> Slot:
        return self._slots[slot]

    @property
    def slot_count(self) -> int:
        return len(self._slots)

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def available_count(self) -> int:
        """How many slots ``reserve`` can give: the free ones, and those it may evict."""
        return len(self._free) + self._idle_count

    @property
    def keys(self) -> list[BlockKey]:
        """Of all blocks in the index, parents before children."""
        return sorted(self._index, key=lambda key: self._slots[self._index[key]].depth)

    def count(self, state: SlotState) -> int:
        """Linear in the table; for statistics."""
        return sum(slot.state is state for slot in self._slots)

    def pinned_count(self) -> int:
        return sum(slot.pins > 0 for slot in self._slots)

    def take_changed(self) -> set[SlotId]:
        """Slots whose state, generation, key or checksum changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def find(self, key: BlockKey) -> SlotId | None:
        return self._index.get(key)

    def lookup(self, keys: Sequence[BlockKey]) -> list[SlotId]:
        """The slots of the longest prefix of ``keys`` that is in the index."""
        found: list[SlotId] = []
        parent: SlotId | None = None
        for key in keys:
            slot = self._index.get(key)
            # The parent differs only where a caller mixes up its keys; pins must stay whole.
            if slot is None or self._slots[slot].parent != parent:
                break
            found.append(slot)
            parent = slot
        return found

    def reserve(self, count: int) -> list[SlotId]:
        """``count`` slots for one writer, evicting as many blocks as that takes."""
        assert count <= self.available_count, f"{count} of {self.available_count} slots"
        while len(self._free) < count:
            self._evict_one()
        taken = [self._free.pop() for _ in range(count)]
        for slot in taken:
            self._move(slot, SlotEvent.RESERVE)
            self._slots[slot].generation += 1
        return taken

    def publish(self, slot: SlotId, key: BlockKey, parent: SlotId | None, checksum: int) -> None:
        """Put a written slot into the index, with one pin. ``parent`` is None for a first block."""
        record = self._slots[slot]
        assert key not in self._index, "a key has one slot"
        if parent is not None:
            above = self._slots[parent]
            assert above.state is SlotState.COMMITTED, f"parent is {above.state}"
            assert above.pins > 0, "a parent stays pinned while children are added"
            above.children += 1
            record.depth = above.depth + 1
        self._move(slot, SlotEvent.PUBLISH)
        record.key, record.parent, record.checksum = key, parent, checksum
        record.pins = 1
        self._index[key] = slot
        self._feed.added(key)

    def keep(self, slot: SlotId, key: BlockKey | None, checksum: int) -> None:
        """Complete a written slot for its owner alone, with one pin."""
        record = self._slots[slot]
        self._move(slot, SlotEvent.KEEP)
        record.key, record.checksum, record.pins = key, checksum, 1

    def abandon(self, slot: SlotId) -> None:
        """Free a reserved slot that will not be written, or not be wanted."""
        assert self._slots[slot].state is SlotState.RESERVED
        self._clear(slot)

    def pin(self, slots: Sequence[SlotId]) -> None:
        """One more pin for each; the slots are a whole prefix, or have pins already."""
        for slot in slots:
            record = self._slots[slot]
            assert record.state not in (SlotState.FREE, SlotState.RESERVED), record.state
            if record.pins == 0:
                self._idle_count -= 1
            record.pins += 1

    def unpin(self, slots: Sequence[SlotId]) -> None:
        """One pin fewer for each; what nobody can find and nobody holds becomes free."""
        self._uses += 1
        for slot in slots:
            record = self._slots[slot]
            assert record.pins > 0, f"slot {slot} is unpinned more often than pinned"
            record.pins -= 1
            record.last_use = self._uses
            if record.pins == 0:
                if record.state is SlotState.COMMITTED:
                    self._idle_count += 1
                    self._note_if_idle_leaf(slot)
                else:
                    self._clear(slot)

    def condemn(self, slot: SlotId) -> None:
        """Take a pinned slot with wrong bytes, and all that builds on it, out of the index."""
        assert self._slots[slot].pins > 0, "only who holds a block can say that it is wrong"
        if self._slots[slot].state is SlotState.QUARANTINED:
            return  # somebody else who holds it was faster
        descendants = self._descendants(slot)
        was_committed = self._slots[slot].state is SlotState.COMMITTED
        self._move(slot, SlotEvent.CONDEMN)
        self.condemned_count += 1
        if not was_committed:
            return
        for below in reversed(descendants):  # children before parents
            self._unlink(below)
            if self._slots[below].pins:
                self._move(below, SlotEvent.DETACH)
            else:
                self._idle_count -= 1
                self._clear(below)
        self._unlink(slot)

    def _descendants(self, root: SlotId) -> list[SlotId]:
        """Linear in the table: condemning is rare, and a list of children per slot is not free."""
        inside = {root}
        found = []
        for key in self.keys:
            slot = self._index[key]
            if self._slots[slot].parent in inside:
                inside.add(slot)
                found.append(slot)
        return found

    def _evict_one(self) -> None:
        while True:
            last_use, _, slot = heapq.heappop(self._idle_leaves)
            record = self._slots[slot]
            if self._is_idle_leaf(record) and record.last_use == last_use:
                break
        self._idle_count -= 1
        self._unlink(slot)
        self._clear(slot)
        self.evicted_count += 1

    def _unlink(self, slot: SlotId) -> None:
        """Out of the index and out of its parent's family."""
        record = self._slots[slot]
        assert record.key is not None
        del self._index[record.key]
        self._feed.removed(record.key)
        parent, record.parent = record.parent, None
        if parent is not None:
            self._slots[parent].children -= 1
            self._note_if_idle_leaf(parent)

    def _clear(self, slot: SlotId) -> None:
        record = self._slots[slot]
        assert record.children == 0, f"slot {slot} has children"
        assert record.pins == 0, f"slot {slot} is pinned"
        self._move(slot, SlotEvent.FREE)
        record.key, record.checksum, record.parent, record.depth = None, 0, None, 0
        self._free.append(slot)

    def _move(self, slot: SlotId, event: SlotEvent) -> None:
        record = self._slots[slot]
        following = TRANSITIONS[record.state].get(event)
        if following is None:
            raise IllegalTransition(f"{event} while slot {slot} is {record.state}")
        record.state = following
        self._changed.add(slot)

    @staticmethod
    def _is_idle_leaf(record: Slot) -> bool:
        return record.state is SlotState.COMMITTED and not record.pins and not record.children

    def _note_if_idle_leaf(self, slot: SlotId) -> None:
        record = self._slots[slot]
        if not self._is_idle_leaf(record):
            return
        heapq.heappush(self._idle_leaves, (record.last_use, -record.depth, slot))
        # An entry is stale once its block was used again; half of the heap may be, not more.
        if len(self._idle_leaves) > 2 * len(self._slots) + 64:
            self._idle_leaves = [
                (each.last_use, -each.depth, SlotId(index))
                for index, each in enumerate(self._slots)
                if self._is_idle_leaf(each)
            ]
            heapq.heapify(self._idle_leaves)

    def check(self) -> None:
        """Assert the invariants. Linear in the table; for tests."""
        assert len(set(self._free)) == len(self._free)
        children = [0] * len(self._slots)
        idle = 0
        heap = {(last_use, slot) for last_use, _, slot in self._idle_leaves}
        for index, record in enumerate(self._slots):
            slot = SlotId(index)
            committed = record.state is SlotState.COMMITTED
            indexed = record.key is not None and self._index.get(record.key) == slot
            assert committed == indexed, f"slot {slot} is {record.state}, indexed: {indexed}"
            assert (record.state is SlotState.FREE) == (slot in self._free)
            if record.state in (SlotState.FREE, SlotState.RESERVED):
                assert record.pins == 0
            elif not committed:
                assert record.pins > 0, f"slot {slot} is {record.state} and nobody holds it"
            if record.parent is not None:
                parent = self._slots[record.parent]
                assert committed
                assert parent.state is SlotState.COMMITTED
                assert parent.depth + 1 == record.depth
                assert parent.pins or not record.pins, "a pinned block's parent is not pinned"
                children[record.parent] += 1
            idle += committed and not record.pins
            if self._is_idle_leaf(record):
                assert (record.last_use, slot) in heap, f"slot {slot} can never be evicted"
        assert idle == self._idle_count
        assert children == [record.children for record in self._slots]
        assert len(self._index) == self.count(SlotState.COMMITTED)
