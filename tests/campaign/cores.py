"""A node's decisions without one of their guards, for ``mutants`` to put in place of the core."""

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pdserve.errors import BlockMissing, TicketGone
from pdserve.ids import BlockKey, SlotId, TicketId
from pdserve.kvstore.answers import ClaimGrant, WriteGrant
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.readers import NOBODY, Readers
from pdserve.kvstore.slot_states import Slot, SlotState
from pdserve.kvstore.slots import SlotTable
from pdserve.kvstore.tickets import OwnerId
from pdserve.kvstore.writes import Write, commit_write, drop_write

LEASE_S = 0.05


class PublishesEarly(StoreCore):
    """A put's blocks are in the index before their bytes are in the slots."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._early: dict[int, Write] = {}

    def reserve(
        self, owner: OwnerId, keys: Sequence[BlockKey], first: int, **options: Any
    ) -> WriteGrant:
        grant = super().reserve(owner, keys, first, **options)
        if grant.write:
            write = self._owners[owner].writes.pop(grant.write)
            write.checksums = [0] * len(write.slots)
            commit_write(self._slots, write)
            self._slots.pin(write.slots)  # nobody evicts what is being written
            self._early[grant.write] = write
        return grant

    def to_fill(
        self, owner: OwnerId, write_id: int, position: int
    ) -> tuple[SlotId, BlockKey | None]:
        write = self._early.get(write_id)
        if write is None:
            return super().to_fill(owner, write_id, position)
        return write.slots[position], write.keys[write.first_index + position]

    def filled(self, owner: OwnerId, write_id: int, position: int, checksum: int) -> None:
        write = self._early.get(write_id)
        if write is None:
            super().filled(owner, write_id, position, checksum)
            return
        self._slots._checksums[write.slots[position]] = checksum
        self._slots._changed.add(write.slots[position])

    def keys_of(self, owner: OwnerId, write_id: int) -> tuple[BlockKey, ...]:
        write = self._early.get(write_id)
        return super().keys_of(owner, write_id) if write is None else write.keys

    def commit(self, owner: OwnerId, write_id: int) -> int:
        write = self._early.pop(write_id, None)
        if write is None:
            return super().commit(owner, write_id)
        self._slots.unpin(write.slots)
        self.tickets.grant()
        return len(write.keys) - write.asked_index

    def abandon(self, owner: OwnerId, write_id: int) -> None:
        if write_id in self._early:
            self.commit(owner, write_id)
        else:
            super().abandon(owner, write_id)


class UnseenReaders:
    """Those who pin by themselves, and what of it a node overlooks."""

    def __init__(self, readers: Readers, *, hides: bool) -> None:
        self._readers = readers
        self._hides = hides

    def hide(self, slots: Sequence[SlotId]) -> Collection[SlotId]:
        held = self._readers.hide(slots)
        return held if self._hides else ()

    def changed(self) -> Iterable[tuple[int, Sequence[SlotId]]]:
        return ()


class LooksTooLate(StoreCore):
    """What readers pin by themselves is seen when its block has been evicted, and not before."""

    def __init__(self, *arguments: Any, readers: Readers = NOBODY, **options: Any) -> None:
        seen = UnseenReaders(readers, hides=True)
        super().__init__(*arguments, readers=seen, **options)


class IgnoresBoards(StoreCore):
    """A slot that a reader's board names is given to a writer."""

    def __init__(self, *arguments: Any, readers: Readers = NOBODY, **options: Any) -> None:
        seen = UnseenReaders(readers, hides=False)
        super().__init__(*arguments, readers=seen, **options)


def _asked_of_unpinned(
    slots: SlotTable, keys: Sequence[BlockKey], prefix: Sequence[SlotId]
) -> None:
    """Who is pinned is entered when he is let go; these are not."""
    SlotTable.asked(slots, keys, prefix)
    slots.reorder(prefix)


class ForgetsClaims(StoreCore):
    """Whoever asks for blocks is told that it has them, and nobody keeps them from eviction."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._promised: dict[int, list[SlotId]] = {}
        self._slots.asked = partial(_asked_of_unpinned, self._slots)  # type: ignore[method-assign]

    def hold(self, owner: OwnerId, keys: Sequence[BlockKey]) -> ClaimGrant:
        return self._granted(owner, super().hold(owner, keys))

    def adopt(self, owner: OwnerId, ticket_id: TicketId) -> ClaimGrant:
        return self._granted(owner, super().adopt(owner, ticket_id))

    def _granted(self, owner: OwnerId, grant: ClaimGrant) -> ClaimGrant:
        if grant.claim:
            self._forget(owner, grant.claim)
        return grant

    def _forget(self, owner: OwnerId, claim: int) -> None:
        slots = self._owners[owner].claims[claim]
        self._owners[owner].claims[claim] = []
        self._promised[claim] = slots
        self._slots.unpin(slots)

    def claimed(self, owner: OwnerId, claim: int, index: int) -> tuple[SlotId, Slot]:
        slots = self._promised.get(claim)
        if slots is None:
            return super().claimed(owner, claim, index)
        slot = self._slots[slots[index]]
        if slot.state not in (SlotState.COMMITTED, SlotState.PRIVATE):
            raise BlockMissing(f"block {index} of claim {claim} is {slot.state}")
        return slots[index], slot

    def condemn(self, owner: OwnerId, claim: int, index: int) -> None:
        if claim not in self._promised:  # else there is no pin that would hold it meanwhile
            super().condemn(owner, claim, index)

    def release(self, owner: OwnerId, claim: int) -> None:
        super().release(owner, claim)
        self._promised.pop(claim, None)


class ForgetsPins(ForgetsClaims, IgnoresBoards):
    """Neither what the node has pinned nor what readers have pinned themselves is kept."""


class LeasesPins(ForgetsClaims):
    """A timer ends claims, whether their owner still reads or not."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._until_s: dict[int, tuple[OwnerId, float]] = {}

    def _granted(self, owner: OwnerId, grant: ClaimGrant) -> ClaimGrant:
        now_s = time.monotonic()
        for claim, (whose, until_s) in list(self._until_s.items()):
            if now_s >= until_s:
                del self._until_s[claim]
                if self._owners[whose].claims.get(claim):
                    self._forget(whose, claim)
        if grant.claim:
            self._until_s[grant.claim] = (owner, now_s + LEASE_S)
        return grant

    def disconnect(self, owner: OwnerId) -> None:
        super().disconnect(owner)
        self._until_s = {c: held for c, held in self._until_s.items() if held[0] != owner}


class ReusesAborted(StoreCore):
    """The slots of an aborted ticket are free at once, while its writer still fills them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._aborted: set[int] = set()

    def abort(self, ticket_id: TicketId) -> None:
        ticket = self.tickets.find(ticket_id)
        super().abort(ticket_id)
        for owner in self._owners.values():
            for write_id, write in list(owner.writes.items()):
                if ticket is not None and write.ticket is ticket:
                    del owner.writes[write_id]
                    drop_write(self._slots, write)
                    self._aborted.add(write_id)
        self.tickets.grant()

    def filled(self, owner: OwnerId, write_id: int, position: int, checksum: int) -> None:
        if write_id not in self._aborted:
            super().filled(owner, write_id, position, checksum)

    def to_fill(
        self, owner: OwnerId, write_id: int, position: int
    ) -> tuple[SlotId, BlockKey | None]:
        if write_id in self._aborted:
            raise TicketGone(f"the ticket of write {write_id} was aborted")
        return super().to_fill(owner, write_id, position)

    def keys_of(self, owner: OwnerId, write_id: int) -> tuple[BlockKey, ...]:
        return () if write_id in self._aborted else super().keys_of(owner, write_id)

    def commit(self, owner: OwnerId, write_id: int) -> int:
        if write_id in self._aborted:
            raise TicketGone(f"the ticket of write {write_id} was aborted")
        return super().commit(owner, write_id)


class StoresOrphans(StoreCore):
    """A put whose parent is not stored is taken as if it began a chain."""

    def reserve(
        self, owner: OwnerId, keys: Sequence[BlockKey], first: int, **options: Any
    ) -> WriteGrant:
        if len(self._slots.lookup(keys)) >= first:
            return super().reserve(owner, keys, first, **options)
        grant = super().reserve(owner, keys[first:], 0, **options)
        return replace(grant, first_index=grant.first_index + first)


class KeepsForTheDead(StoreCore):
    """What a dead connection had pinned stays pinned."""

    def disconnect(self, owner: OwnerId) -> None:
        self._owners[owner].claims.clear()
        self.room._held.pop(owner, None)
        super().disconnect(owner)
