"""All slots of an arena: the index over them, and who may be evicted. No bytes are touched here.

``slot_states`` has the life of one slot. Blocks form a forest: a block's *parent* is the block
before it in the chain. Two rules hold: a COMMITTED block's parent is COMMITTED, so the index is
closed under prefixes and a lookup is a walk; and the parent of a pinned block is pinned, because
pins are taken on whole prefixes. So every COMMITTED block without pins can be evicted, children
before parents: what is *available* is a sum of two counters.

Which idle block is evicted first is ``shares``' and ``eviction``'s to say; of one chain the deepest
goes first.
A slot's *generation* counts its reservations: (slot, generation) names bytes for ever.
"""

from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from pdserve.errors import IllegalTransition
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore import slot_states
from pdserve.kvstore.eviction import Eviction
from pdserve.kvstore.feed import ChangeFeed
from pdserve.kvstore.headers import NO_PARENT
from pdserve.kvstore.idle_leaves import Worth
from pdserve.kvstore.inheritance import Inheritance
from pdserve.kvstore.shares import EvictionOrder
from pdserve.kvstore.slot_columns import SlotColumns
from pdserve.kvstore.slot_states import (
    COMMITTED,
    CONDEMN,
    DETACH,
    DRAIN,
    EVENTS,
    FOLLOWING,
    FREE,
    KEEP,
    PUBLISH,
    QUARANTINED,
    REFUSED,
    RELEASE,
    RESERVE,
    RESERVED,
    STATES,
    Evicted,
    Past,
    SlotState,
)

EVICTED_KEPT_MAX = 4096
"""Of which ``take_evicted`` can tell; more than one event evicts of any sensible arena."""

STALE_RATIO = 0.25
"""Entries of the order of eviction, beside one per slot, that may be out of date."""

_IS_PINNABLE = tuple(state in slot_states.PINNABLE for state in STATES)

Hide = Callable[[Sequence[SlotId]], Collection[SlotId]]
"""Lets nobody find these slots from now on; those of them that somebody holds without the table's
knowing."""


def nobody_reads(slots: Sequence[SlotId]) -> Collection[SlotId]:  # noqa: ARG001  (a ``Hide``)
    """Where every reader asks the node for its pins."""
    return ()


class SlotTable(SlotColumns):
    """Invariants, asserted by ``check``: the index holds exactly the COMMITTED slots; a COMMITTED
    slot's parent is COMMITTED and has pins if it has; child counts are right; FREE, RESERVED and
    DRAINING slots have no pins, PRIVATE and QUARANTINED ones have some; every idle leaf is in the
    order of eviction.
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
        super().__init__(slot_count)
        self._free = array("I", range(slot_count - 1, -1, -1))  # warm ones on top
        self._idle_count = 0  # COMMITTED without pins
        self._eviction = eviction
        self.order = EvictionOrder(eviction, slot_count, shares)
        self._noted_count = 0  # entries of the order since it was looked through
        self._uses = 0
        self._feed = feed
        self._hide = hide
        self._draining: list[SlotId] = []
        self._changed: set[SlotId] = set()
        self._evicted: deque[Evicted] = deque(maxlen=EVICTED_KEPT_MAX)
        self.evicted_count = 0
        self.condemned_count = 0

    def take_over(self, inheritance: Inheritance) -> None:
        """Begin with these slots, in a table where nothing has happened yet; each block has a pin
        if they are held."""
        self._take_over(inheritance)
        adopted, draining = inheritance.adopted_slots, inheritance.draining_slots
        for slot in adopted:
            self._feed.added(self._map.key_of(slot))
        self._free = array("I", (inheritance.states == FREE).nonzero()[0][::-1].tolist())
        self._draining = draining
        self.order.accounts.inherit(adopted + draining)
        self._idle_count = 0 if inheritance.held else len(adopted)
        self._changed.update(adopted, draining)
        self._refill_order()

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def available_count(self) -> int:
        """How many slots ``reserve`` can give: the free ones, and those it may evict; fewer when a
        reader pins one of these at this moment."""
        return len(self._free) + self._idle_count

    @property
    def uses(self) -> int:
        """Of the store, so far: what last uses and ages are counted in."""
        return self._uses

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
        return self._map.find(key)

    def lookup(self, keys: Sequence[BlockKey]) -> list[SlotId]:
        """The slots of the longest prefix of ``keys`` that is in the index."""
        found = self._map.find_each(keys)
        if found and found[-1] < 0:
            found.pop()
        # The parent differs only where a caller mixes up its keys; pins must stay whole.
        parents = list(map(self._parents.__getitem__, found))
        above = [NO_PARENT, *found[:-1]]
        if parents != above[: len(parents)]:
            is_wrong = [parent != slot for parent, slot in zip(parents, above, strict=True)]
            del found[is_wrong.index(True) :]
        return found  # type: ignore[return-value]  # they are slots

    def asked(self, keys: Sequence[BlockKey], prefix: Sequence[SlotId]) -> None:
        """A prompt asks for ``keys``, of which ``prefix`` is here, pinned."""
        self._set_turn(prefix, self._eviction.asked(keys, self._uses))

    def wrote(self, keys: Sequence[BlockKey], chain: Sequence[SlotId]) -> None:
        """Somebody is done with the blocks of ``keys``, which are ``chain`` and still pinned."""
        self._set_turn(chain, self._eviction.wrote(keys, self._uses))

    def _set_turn(self, slots: Sequence[SlotId], turn: int) -> None:
        turns = self._turns
        for slot in slots:
            turns[slot] = turn

    def reserve(self, count: int, tenant: str = "") -> list[SlotId]:
        """``count`` slots for one writer of a tenant, evicting as many blocks as that takes."""
        room = self.make_room(count, tenant)
        assert room == count, f"{count} of {room} slots"
        account = self.order.accounts.charge(tenant, count)
        taken = [SlotId(self._free.pop()) for _ in range(count)]
        self.order.accounts.assign(taken, account)
        for slot in taken:
            self._move(slot, RESERVE)
            self._generations[slot] += 1
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
        if parent is not None:
            assert self._states[parent] == COMMITTED, f"parent is {self.state(parent)}"
            assert self._pins[parent] > 0, "a parent stays pinned while children are added"
            self._children[parent] += 1
            self._depths[slot] = self._depths[parent] + 1
            self._parents[slot] = parent
        self._move(slot, PUBLISH)
        self._set_key(slot, key)
        self._checksums[slot] = checksum
        self._pins[slot] = 1
        self._map.add(slot)
        self._feed.added(key)

    def are_new(self, keys: Sequence[BlockKey], parent: SlotId | None) -> bool:
        """Whether ``publish_chain`` can have them: no two alike, none in the index yet, and their
        parent still there."""
        return (
            (parent is None or self._states[parent] == COMMITTED)
            and len(set(keys)) == len(keys)
            and not self._map.has_any(keys)
        )

    def publish_chain(
        self,
        slots: Sequence[SlotId],
        keys: Sequence[BlockKey],
        parent: SlotId | None,
        checksums: Sequence[int],
    ) -> None:
        """``publish`` of blocks of which each builds on the one before, the first on ``parent``."""
        assert parent is None or self._states[parent] == COMMITTED
        assert parent is None or self._pins[parent] > 0
        states, parents, depths, children = (
            self._states,
            self._parents,
            self._depths,
            self._children,
        )
        pins, has_key, sums = self._pins, self._has_key, self._checksums
        set_key, add, added = self._map.set_key, self._map.add, self._feed.added
        above = NO_PARENT if parent is None else parent
        depth = 0 if parent is None else depths[parent] + 1
        for slot, key, checksum in zip(slots, keys, checksums, strict=True):
            if states[slot] != RESERVED:
                raise IllegalTransition(
                    f"{EVENTS[PUBLISH]} while slot {slot} is {self.state(slot)}"
                )
            if above != NO_PARENT:
                children[above] += 1
            parents[slot], depths[slot] = above, depth
            states[slot], pins[slot], sums[slot] = COMMITTED, 1, checksum
            set_key(slot, key)
            has_key[slot] = 1
            add(slot)
            added(key)
            above, depth = slot, depth + 1
        self._changed.update(slots)

    def keep(self, slot: SlotId, key: BlockKey | None, checksum: int) -> None:
        """Complete a written slot for its owner alone, with one pin."""
        self._move(slot, KEEP)
        if key is not None:
            self._set_key(slot, key)
        self._checksums[slot], self._pins[slot] = checksum, 1

    def abandon(self, slot: SlotId) -> None:
        """Free a reserved slot that will not be written, or not be wanted."""
        assert self._states[slot] == RESERVED
        self._clear(slot)

    def pin(self, slots: Sequence[SlotId]) -> None:
        """One more pin for each; the slots are a whole prefix, or have pins already."""
        states, pins, is_pinnable = self._states, self._pins, _IS_PINNABLE
        for slot in slots:
            assert is_pinnable[states[slot]], self.state(slot)
            before = pins[slot]
            if before == 0:
                self._idle_count -= 1
            pins[slot] = before + 1

    def unpin(self, slots: Sequence[SlotId]) -> None:
        """One pin fewer for each; what nobody can find and nobody holds becomes free."""
        self._uses += 1
        states, pins, children = self._states, self._pins, self._children
        last_uses, now = self._last_uses, self._uses
        for slot in slots:
            left = pins[slot] - 1
            assert left >= 0, f"slot {slot} is unpinned more often than pinned"
            pins[slot] = left
            last_uses[slot] = now
            if left == 0:
                if states[slot] == COMMITTED:
                    self._idle_count += 1
                    if not children[slot]:
                        self._note_idle_leaf(slot)
                else:
                    self._drain(slot)
        self.reap()

    def unpin_unused(self, slots: Sequence[SlotId], pasts: Sequence[Past]) -> None:
        """``unpin`` of blocks that nobody has used here just now."""
        self.unpin(slots)
        for slot, past in zip(slots, pasts, strict=True):
            self._last_uses[slot], self._turns[slot] = past
        self.reorder(slots)

    def unpin_all(self, slots: Sequence[SlotId]) -> None:
        """``unpin`` of a large part of the table, each slot once."""
        self._uses += 1
        for slot in slots:
            assert self._pins[slot] > 0, f"slot {slot} is unpinned more often than pinned"
            self._pins[slot] -= 1
            self._last_uses[slot] = self._uses
            if self._pins[slot] == 0 and self._states[slot] == COMMITTED:
                self._idle_count += 1
            elif self._pins[slot] == 0:
                self._drain(slot)
        self._refill_order()
        self.reap()

    def condemn(self, slot: SlotId) -> None:
        """Take a pinned slot with wrong bytes, and all that builds on it, out of the index."""
        assert self._pins[slot] > 0, "only who holds a block can say that it is wrong"
        if self._states[slot] == QUARANTINED:
            return  # somebody else who holds it was faster
        descendants = self.descendants(slot)
        was_committed = self._states[slot] == COMMITTED
        self._move(slot, CONDEMN)
        self.condemned_count += 1
        if not was_committed:
            return
        for below in reversed(descendants):  # children before parents
            self._unlink(below)
            if self._pins[below]:
                self._move(below, DETACH)
            else:
                self._idle_count -= 1
                self._drain(below)
        self._unlink(slot)
        self.reap()

    def descendants(self, root: SlotId) -> list[SlotId]:
        """All that builds on a block, parents before children. Linear in the table: it is rarely
        asked for, and a list of children per slot is not free."""
        if not self._children[root]:
            return []
        inside = {root}
        found = []
        for slot in self._indexed(deeper_than=self._depths[root]):
            if self._parents[slot] in inside:
                inside.add(slot)
                found.append(slot)
        return found

    def evict_if_idle(self, slot: SlotId) -> bool:
        """Evict a block that nobody has pinned and nothing builds on; who calls this calls
        ``reap``. Whether it was one."""
        if not self._is_idle_leaf(slot):
            return False
        self._evict(slot)
        return True

    def worth_of(self, past: Past) -> Worth:
        return self.order.worth_of(past, self._uses)

    def first_below(self, worth: Worth, account: int) -> SlotId | None:
        """Of those that may be evicted for a block of an account which is worth so much."""
        return self.order.first_below(worth, account, self._uses, self._is_current)

    def reorder(self, slots: Iterable[SlotId]) -> None:
        """What decides over their order of eviction, beside their use, has changed."""
        for slot in slots:
            if self._is_idle_leaf(slot):
                self._note_idle_leaf(slot)

    def _evict_one(self) -> None:
        self._evict(self.order.take(self._uses, self._is_current))

    def _evict(self, slot: SlotId) -> None:
        self._idle_count -= 1
        key = self._unlink(slot)
        self._evicted.append(Evicted(slot, key, self._checksums[slot]))
        self._drain(slot)
        self.evicted_count += 1

    def _unlink(self, slot: SlotId) -> BlockKey:
        """Out of the index and out of its parent's family; its key."""
        key = self._map.key_of(slot)
        self._map.remove(slot)
        self._feed.removed(key)
        parent, self._parents[slot] = self._parents[slot], NO_PARENT
        if parent != NO_PARENT:
            self._children[parent] -= 1
            if self._is_idle_leaf(SlotId(parent)):
                self._note_idle_leaf(SlotId(parent))
        return key

    def _drain(self, slot: SlotId) -> None:
        """Out of the index already; who calls this calls ``reap``."""
        assert self._children[slot] == 0, f"slot {slot} has children"
        assert self._pins[slot] == 0, f"slot {slot} is pinned"
        self._move(slot, DRAIN)
        self._draining.append(slot)

    def _clear(self, slot: SlotId) -> None:
        self._move(slot, RELEASE)
        self._has_key[slot] = self._checksums[slot] = 0
        self._parents[slot], self._depths[slot] = NO_PARENT, 0
        self._turns[slot] = 0
        self.order.freed(slot)
        self._free.append(slot)

    def _move(self, slot: SlotId, event: int) -> None:
        following = FOLLOWING[self._states[slot]][event]
        if following == REFUSED:
            raise IllegalTransition(f"{EVENTS[event]} while slot {slot} is {self.state(slot)}")
        self._states[slot] = following
        self._changed.add(slot)

    def _is_current(self, slot: SlotId, turn: int, last_use: int) -> bool:
        return (
            self._last_uses[slot] == last_use
            and self._turns[slot] == turn
            and self._is_idle_leaf(slot)
        )

    def _note_idle_leaf(self, slot: SlotId) -> None:
        self.order.add(slot, self._turns[slot], self._last_uses[slot], self._depths[slot])
        self._noted_count += 1
        # An entry is out of date once its block was used again; a few may be, not more.
        if self._noted_count > self.slot_count * STALE_RATIO + 64:
            self._noted_count = 0
            if len(self.order) > self.slot_count * (1 + STALE_RATIO) + 64:
                self._refill_order()

    def _refill_order(self) -> None:
        leaves = self._idle_leaves()
        ranks = (NO_PARENT - np.frombuffer(self._depths, np.uint32)[leaves]).astype(np.uint64)
        self.order.refill(
            leaves,
            np.frombuffer(self._turns, np.uint8)[leaves],
            np.frombuffer(self._last_uses, np.uint64)[leaves],
            ranks << np.uint64(32) | leaves.astype(np.uint64),
        )

    def check(self) -> None:
        """Assert the invariants. Linear in the table; for tests."""
        assert len(set(self._free)) == len(self._free)
        children = [0] * self.slot_count
        idle = 0
        for slot in map(SlotId, range(self.slot_count)):
            record = self[slot]
            committed = record.state is SlotState.COMMITTED
            indexed = record.key is not None and self._map.find(record.key) == slot
            assert committed == indexed, f"slot {slot} is {record.state}, indexed: {indexed}"
            assert (record.state is SlotState.FREE) == (slot in self._free)
            assert (record.state is SlotState.DRAINING) == (slot in self._draining)
            if record.state in (SlotState.FREE, SlotState.RESERVED, SlotState.DRAINING):
                assert record.pins == 0
            elif not committed:
                assert record.pins > 0, f"slot {slot} is {record.state} and nobody holds it"
            if record.parent is not None:
                parent = self[record.parent]
                assert committed
                assert parent.state is SlotState.COMMITTED
                assert parent.depth + 1 == record.depth
                assert parent.pins or not record.pins, "a pinned block's parent is not pinned"
                children[record.parent] += 1
            idle += committed and not record.pins
            if self._is_idle_leaf(slot):
                leaf = slot, record.turn, record.last_use
                assert leaf in self.order, f"slot {slot} can never be evicted"
        assert idle == self._idle_count
        assert children == self._children.tolist()
        self._map.check(self._indexed())
        self.order.accounts.check(lambda slot: self.state(slot) is SlotState.FREE)
