"""What the books know of those who read without asking. Pure: their pins come as plain numbers.

A client on the node's host finds and pins blocks by itself (``local_reads``); its pins are in
memory that it shares with the node, and the node learns of them when it looks. It looks when it
needs room, and then counts every block that a reader holds, and those before it in its chain, as
pinned: held blocks are not evicted, and what is available is right.

Between that look and an eviction a reader may pin a block nevertheless. So an evicted slot is
first hidden, and freed only when all readers have been asked once more (``SlotTable.reap``); one
that is held by then is DRAINING until its reader lets go or its connection ends.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

from pdserve.errors import FrameError
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.inheritance import Inheritance
from pdserve.kvstore.slot_states import PINNABLE, SlotState
from pdserve.kvstore.slots import SlotTable, nobody_reads


class Readers(Protocol):
    def hide(self, slots: Sequence[SlotId]) -> Collection[SlotId]:
        """Let nobody find these from now on; those of them that a reader holds."""
        ...

    def changed(self) -> Iterable[tuple[int, Sequence[SlotId]]]:
        """What each connection holds whose pins have changed since the last call. It may be about
        to let some of it go, having found that it is not what it looked for."""
        ...


class _Nobody:
    hide = staticmethod(nobody_reads)

    def changed(self) -> Iterable[tuple[int, Sequence[SlotId]]]:
        return ()


NOBODY: Readers = _Nobody()


class Room:
    """Slots for writers, and the readers' pins as of the last look."""

    def __init__(self, slots: SlotTable, readers: Readers) -> None:
        self._slots = slots
        self._readers = readers
        self._held: dict[int, set[SlotId]] = {}  # by connection; pinned in the table
        self._inherited: Sequence[SlotId] = ()  # pinned for a dead node's readers

    def make(self, count: int, tenant: str = "") -> int:
        """Evict until ``count`` slots are free for a tenant, or as many as can be had; how many
        those are."""
        if count > self._slots.free_count:
            self.look()
        return self._slots.make_room(count, tenant)

    def has(self, count: int, tenant: str = "") -> bool:
        """Whether ``count`` slots can be had; they are free then. If not, nothing was evicted,
        unless a reader was faster."""
        if count > self._slots.free_count:
            self.look()
        can = count <= self._slots.available_count
        return can and self._slots.make_room(count, tenant) == count

    def look(self) -> None:
        """Count as pinned what readers hold now, and free what they hold no more."""
        for reader, slots in self._readers.changed():
            before = self._held.get(reader, set())
            now = self._chains(slots, before)
            self._slots.pin(sorted(now - before))
            self._held[reader] = now
            if gone := before - now:
                self._slots.unpin(sorted(gone))
        self._slots.reap()

    def forget(self, reader: int) -> None:
        """Its connection has ended, and ``Readers`` do not name its pins any more."""
        if held := self._held.pop(reader, None):
            self._slots.unpin(sorted(held))
        self._slots.reap()

    def inherit(self, inheritance: Inheritance) -> None:
        """Begin with what a dead node left; each block has a pin while its clients are there."""
        self._slots.take_over(inheritance)
        if inheritance.held:
            self._inherited = inheritance.adopted_slots

    def predecessors_gone(self) -> None:
        """Nobody reads what a dead node lent. Idempotent."""
        slots, self._inherited = self._inherited, ()
        if slots:
            self._slots.unpin_all(slots)
        self._slots.reap()

    def hide(self, slots: Sequence[SlotId]) -> None:
        """No reader finds these by itself from now on; what it holds, it holds."""
        self._readers.hide(slots)

    def let_go(self) -> None:
        """A reader has let go of something."""
        self._slots.reap()

    def asked(self, keys: Sequence[BlockKey]) -> int:
        """A prompt asked for these blocks, and has got and released what there was: how many of
        them are there now."""
        prefix = self._slots.lookup(keys)
        self._slots.pin(prefix)
        self._slots.asked(keys, prefix)
        self._slots.unpin(prefix)
        return len(prefix)

    def condemn(self, reader: int, slot: SlotId, generation: int) -> None:
        """``reader`` holds a block that fails its checksum: nobody finds it again."""
        if not 0 <= slot < self._slots.slot_count:
            raise FrameError(f"slot {slot} of {self._slots.slot_count}")
        self.look()
        is_same = self._slots.generation(slot) == generation
        if is_same and slot in self._held.get(reader, ()):
            self._slots.condemn(slot)

    def counted(self) -> Iterator[SlotId]:
        """Once for each reader that was found to hold it; for checks."""
        yield from self._inherited
        for slots in self._held.values():
            yield from slots

    def _chains(self, slots: Sequence[SlotId], before: Collection[SlotId]) -> set[SlotId]:
        """Those of ``slots`` that can be pinned, each with all that it builds on."""
        found: set[SlotId] = set()
        for slot in slots:
            above: SlotId | None = slot
            while above is not None and above not in found:
                state = self._slots.state(above)
                # What is not in the index now can only be held by who had found it before.
                kept = above in before and state in PINNABLE
                if state is not SlotState.COMMITTED and not kept:
                    break
                found.add(above)
                above = self._slots.parent(above)
        return found
