"""The life of a slot: one block's place in an arena. No bytes are touched here.

    FREE ──RESERVE──> RESERVED ──PUBLISH──> COMMITTED ──CONDEMN──> QUARANTINED
     ^                   │                      │                      ^
     ├──FREE─────────────┴──KEEP──> PRIVATE <───┘ DETACH               │
     │                                └───────────────── CONDEMN ──────┘
     └──FREE── DRAINING <──DRAIN── each of the last three

RESERVED belongs to one writer; COMMITTED is in the index, and its bytes never change; PRIVATE is
complete too but in no index (a request's unfinished last block, or a block whose parent is gone),
and lives as long as somebody has pinned it; QUARANTINED failed its checksum: nobody finds it again;
DRAINING is found no more either, and becomes free as soon as no reader holds it: those on the
node's host pin blocks by themselves (``readers``), so that is known only when all have been asked.

Blocks form a forest: a block's *parent* is the block before it in the chain. Two rules hold:
a COMMITTED block's parent is COMMITTED, so the index is closed under prefixes and a lookup is a
walk; and the parent of a pinned block is pinned, because pins are taken on whole prefixes. So every
COMMITTED block without pins can be evicted, children before parents: what is *available* is a sum
of two counters.

Which idle block is evicted first is ``shares``' and ``eviction``'s to say; of one chain the deepest
goes first.
A slot's *generation* counts its reservations: (slot, generation) names bytes for ever.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from pdserve.errors import IllegalTransition
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.eviction import Eviction
from pdserve.kvstore.feed import ChangeFeed
from pdserve.kvstore.shares import EvictionOrder


class SlotState(StrEnum):
    FREE = "free"
    RESERVED = "reserved"
    COMMITTED = "committed"
    PRIVATE = "private"
    QUARANTINED = "quarantined"
    DRAINING = "draining"


class SlotEvent(StrEnum):
    RESERVE = "reserve"  # a writer got it
    PUBLISH = "publish"  # written, and in the index from now on
    KEEP = "keep"  # written, for its owner alone
    DETACH = "detach"  # an ancestor was condemned while somebody had this one pinned
    CONDEMN = "condemn"  # its bytes fail their checksum
    DRAIN = "drain"  # nobody finds it from now on, and the node holds it no more
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
            SlotEvent.DRAIN: SlotState.DRAINING,
        },
        SlotState.PRIVATE: {
            SlotEvent.CONDEMN: SlotState.QUARANTINED,
            SlotEvent.DRAIN: SlotState.DRAINING,
        },
        SlotState.QUARANTINED: {SlotEvent.DRAIN: SlotState.DRAINING},
        SlotState.DRAINING: {SlotEvent.FREE: SlotState.FREE},
    }
)


EVICTED_KEPT_MAX = 4096
"""Of which ``take_evicted`` can tell; more than one event evicts of any sensible arena."""


@dataclass(frozen=True, slots=True)
class Evicted:
    """A block that has just left its slot; its bytes are there until somebody writes."""

    slot: SlotId
    key: BlockKey
    checksum: int


PINNABLE = frozenset((SlotState.COMMITTED, SlotState.PRIVATE, SlotState.QUARANTINED))

Hide = Callable[[Sequence[SlotId]], Collection[SlotId]]
"""Lets nobody find these slots from now on; those of them that somebody holds without the table's
knowing."""


def nobody_reads(slots: Sequence[SlotId]) -> Collection[SlotId]:  # noqa: ARG001  (a ``Hide``)
    """Where every reader asks the node for its pins."""
    return ()


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
    turn: int = 0  # of the conversation that used it last


class SlotTable:
    """All slots of an arena, the index over them, and the order of eviction.

    Invariants, asserted by ``check``: the index holds exactly the COMMITTED slots; a COMMITTED
    slot's parent is COMMITTED and has pins if it has; child counts are right; FREE, RESERVED and
    DRAINING slots have no pins, PRIVATE and QUARANTINED ones have some; every idle leaf is in the
    heap.
    """

    def __init__(
        self,
        slot_count: int,
        feed: ChangeFeed,
        eviction: Eviction,
        hide: Hide = nobody_reads,
        *,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        """``shares``: the tenants' weights; None: all blocks compete alike."""
        assert slot_count > 0
        self._slots = [Slot() for _ in range(slot_count)]
        self._free = [SlotId(slot) for slot in reversed(range(slot_count))]  # warm ones on top
        self._index: dict[BlockKey, SlotId] = {}
        self._idle_count = 0  # COMMITTED without pins
        self._eviction = eviction
        self.order = EvictionOrder(eviction, slot_count, shares)
        self._uses = 0
        self._feed = feed
        self._hide = hide
        self._draining: list[SlotId] = []
        self._changed: set[SlotId] = set()
        self._evicted: deque[Evicted] = deque(maxlen=EVICTED_KEPT_MAX)
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
        """How many slots ``reserve`` can give: the free ones, and those it may evict; fewer when a
        reader pins one of these at this moment."""
        return len(self._free) + self._idle_count

    @property
    def indexed_count(self) -> int:
        return len(self._index)

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

    def tell_again(self, slots: Iterable[SlotId]) -> None:
        """As if these had changed."""
        self._changed.update(slots)

    def take_evicted(self) -> list[Evicted]:
        """What was evicted since the last call, children before parents."""
        evicted = list(self._evicted)
        self._evicted.clear()
        return evicted

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

    def asked(self, keys: Sequence[BlockKey], prefix: Sequence[SlotId]) -> None:
        """A prompt asks for ``keys``, of which ``prefix`` is here, pinned."""
        self._set_turn(prefix, self._eviction.asked(keys, self._uses))

    def wrote(self, keys: Sequence[BlockKey], chain: Sequence[SlotId]) -> None:
        """Somebody is done with the blocks of ``keys``, which are ``chain`` and still pinned."""
        self._set_turn(chain, self._eviction.wrote(keys, self._uses))

    def _set_turn(self, slots: Sequence[SlotId], turn: int) -> None:
        for slot in slots:
            self._slots[slot].turn = turn

    def reserve(self, count: int, tenant: str = "") -> list[SlotId]:
        """``count`` slots for one writer of a tenant, evicting as many blocks as that takes."""
        room = self.make_room(count, tenant)
        assert room == count, f"{count} of {room} slots"
        account = self.order.accounts.charge(tenant, count)
        taken = [self._free.pop() for _ in range(count)]
        self.order.accounts.assign(taken, account)
        for slot in taken:
            self._move(slot, SlotEvent.RESERVE)
            self._slots[slot].generation += 1
        return taken

    def make_room(self, count: int, tenant: str = "") -> int:
        """Evict until ``count`` slots are free for a tenant, or as many as can be had; how many
        those are."""
        if count <= len(self._free):
            return count
        # What it is about to get counts in whose turn it is to give way.
        accounts = self.order.accounts
        account = accounts.charge(tenant, count)
        while (short := count - len(self._free)) > 0 and self._idle_count:
            for _ in range(min(short, self._idle_count)):
                self._evict_one()
            self.reap()
        accounts.give_back(account, count)
        return min(count, len(self._free))

    def reap(self) -> None:
        """Free the draining slots that nobody holds any more."""
        if not self._draining:
            return
        held = self._hide(self._draining)
        draining, self._draining = self._draining, []
        for slot in draining:
            if slot in held:
                self._draining.append(slot)
            else:
                self._clear(slot)

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
            assert record.state in PINNABLE, record.state
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
                    self._drain(slot)
        self.reap()

    def condemn(self, slot: SlotId) -> None:
        """Take a pinned slot with wrong bytes, and all that builds on it, out of the index."""
        assert self._slots[slot].pins > 0, "only who holds a block can say that it is wrong"
        if self._slots[slot].state is SlotState.QUARANTINED:
            return  # somebody else who holds it was faster
        descendants = self.descendants(slot)
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
                self._drain(below)
        self._unlink(slot)
        self.reap()

    def descendants(self, root: SlotId) -> list[SlotId]:
        """All that builds on a block, parents before children. Linear in the table: it is rarely
        asked for, and a list of children per slot is not free."""
        inside = {root}
        found = []
        for key in self.keys:
            slot = self._index[key]
            if self._slots[slot].parent in inside:
                inside.add(slot)
                found.append(slot)
        return found

    def evict_if_idle(self, slot: SlotId) -> bool:
        """Evict a block that nobody has pinned and nothing builds on; who calls this calls
        ``reap``. Whether it was one."""
        if not self._is_idle_leaf(self._slots[slot]):
            return False
        self._evict(slot)
        return True

    def reorder(self, slots: Iterable[SlotId]) -> None:
        """What decides over their order of eviction, beside their use, has changed."""
        for slot in slots:
            self._note_if_idle_leaf(slot)

    def _evict_one(self) -> None:
        self._evict(self.order.take(self._uses, self._is_current))

    def _evict(self, slot: SlotId) -> None:
        self._idle_count -= 1
        record = self._slots[slot]
        assert record.key is not None
        self._evicted.append(Evicted(slot, record.key, record.checksum))
        self._unlink(slot)
        self._drain(slot)
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

    def _drain(self, slot: SlotId) -> None:
        """Out of the index already; who calls this calls ``reap``."""
        record = self._slots[slot]
        assert record.children == 0, f"slot {slot} has children"
        assert record.pins == 0, f"slot {slot} is pinned"
        self._move(slot, SlotEvent.DRAIN)
        self._draining.append(slot)

    def _clear(self, slot: SlotId) -> None:
        record = self._slots[slot]
        self._move(slot, SlotEvent.FREE)
        record.key, record.checksum, record.parent, record.depth = None, 0, None, 0
        record.turn = 0
        self.order.freed(slot)
        self._free.append(slot)

    def _move(self, slot: SlotId, event: SlotEvent) -> None:
        record = self._slots[slot]
        following = TRANSITIONS[record.state].get(event)
        if following is None:
            raise IllegalTransition(f"{event} while slot {slot} is {record.state}")
        record.state = following
        self._changed.add(slot)

    def _is_current(self, slot: SlotId, turn: int, last_use: int) -> bool:
        record = self._slots[slot]
        as_noted = record.last_use == last_use and record.turn == turn
        return as_noted and self._is_idle_leaf(record)

    @staticmethod
    def _is_idle_leaf(record: Slot) -> bool:
        return record.state is SlotState.COMMITTED and not record.pins and not record.children

    def _note_if_idle_leaf(self, slot: SlotId) -> None:
        record = self._slots[slot]
        if not self._is_idle_leaf(record):
            return
        self.order.add(slot, record.turn, record.last_use, record.depth)
        # An entry is out of date once its block was used again; half of all may be, not more.
        if len(self.order) > 2 * len(self._slots) + 64:
            self.order.clear()
            for index, each in enumerate(self._slots):
                if self._is_idle_leaf(each):
                    self.order.add(SlotId(index), each.turn, each.last_use, each.depth)

    def check(self) -> None:
        """Assert the invariants. Linear in the table; for tests."""
        assert len(set(self._free)) == len(self._free)
        children = [0] * len(self._slots)
        idle = 0
        for index, record in enumerate(self._slots):
            slot = SlotId(index)
            committed = record.state is SlotState.COMMITTED
            indexed = record.key is not None and self._index.get(record.key) == slot
            assert committed == indexed, f"slot {slot} is {record.state}, indexed: {indexed}"
            assert (record.state is SlotState.FREE) == (slot in self._free)
            assert (record.state is SlotState.DRAINING) == (slot in self._draining)
            if record.state in (SlotState.FREE, SlotState.RESERVED, SlotState.DRAINING):
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
                leaf = slot, record.turn, record.last_use
                assert leaf in self.order, f"slot {slot} can never be evicted"
        assert idle == self._idle_count
        assert children == [record.children for record in self._slots]
        assert len(self._index) == self.count(SlotState.COMMITTED)
        self.order.accounts.check(lambda slot: self._slots[slot].state is SlotState.FREE)
