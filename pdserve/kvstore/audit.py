"""Looks through a node's books for what must not be, and says it in sentences.

Every slot has one state and the counts agree; what is reserved belongs to one write or ticket,
every pin to a claim, a reader, a write, a ticket or the pin book; tickets have an owner that lives.
What the arena holds is compared with the books by ``operations``.
"""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pdserve.ids import SlotId
from pdserve.kvstore.answers import StoreStat
from pdserve.kvstore.slot_states import SlotState

if TYPE_CHECKING:
    from pdserve.kvstore.core import StoreCore


def misfits(core: "StoreCore") -> Iterator[str]:
    """What is wrong in the books. Linear in the arena."""
    slots = core.slots
    reserved, pinned = _held(core)
    for ticket in core.tickets:
        if ticket.is_writers and ticket.writer not in core.owners:
            yield f"ticket {ticket.ticket} is {ticket.state} and its writer is not connected"
    states: Counter[SlotState] = Counter()
    idle_count = 0
    for index in range(slots.slot_count):
        slot = SlotId(index)
        record = slots[slot]
        states[record.state] += 1
        idle_count += record.state is SlotState.COMMITTED and not record.pins
        if (record.state is SlotState.RESERVED) != (reserved[slot] > 0):
            yield f"slot {slot} is {record.state}, and {reserved[slot]} writes or tickets have it"
        if reserved[slot] > 1:
            yield f"slot {slot} has {reserved[slot]} writers"
        if record.pins != pinned[slot]:
            yield f"slot {slot} has {record.pins} pins, of which {pinned[slot]} have an owner"
    if states[SlotState.FREE] != slots.free_count:
        yield f"{states[SlotState.FREE]} slots are free, the list of them has {slots.free_count}"
    if slots.available_count != slots.free_count + idle_count:
        yield (
            f"{slots.available_count} slots are said to be available, {slots.free_count} are free "
            f"and {idle_count} can be evicted"
        )
    if states[SlotState.COMMITTED] != slots.indexed_count:
        yield (
            f"{states[SlotState.COMMITTED]} blocks are committed, the index has "
            f"{slots.indexed_count}"
        )


def stat_of(core: "StoreCore", asker: str | None) -> StoreStat:
    """What a node holds, in numbers. Linear in the arena."""
    slots = core.slots
    return StoreStat(
        slots_total=slots.slot_count,
        slots_free=slots.free_count,
        slots_available=slots.available_count,
        slots_reserved=slots.count(SlotState.RESERVED),
        slots_committed=slots.count(SlotState.COMMITTED),
        slots_private=slots.count(SlotState.PRIVATE),
        slots_quarantined=slots.count(SlotState.QUARANTINED),
        slots_draining=slots.count(SlotState.DRAINING),
        slots_pinned=slots.pinned_count(),
        claims=sum(len(owner.claims) for owner in core.owners.values()),
        writes=sum(len(owner.writes) for owner in core.owners.values()),
        tickets=core.tickets.count,
        tickets_queued=core.tickets.queued_count,
        tickets_own=sum(
            ticket.is_writers and core.owners[ticket.writer].name == asker
            for ticket in core.tickets
        ),
        connections=len(core.owners),
        evicted_count=slots.evicted_count,
        condemned_count=slots.condemned_count,
    )


def _held(core: "StoreCore") -> tuple[Counter[SlotId], Counter[SlotId]]:
    """By slot: how many writes and tickets reserve it, and how many pins have an owner."""
    reserved: Counter[SlotId] = Counter()
    pinned: Counter[SlotId] = Counter(core.pins.hard)
    pinned.update(core.room.counted())
    for owner in core.owners.values():
        for slots in owner.claims.values():
            pinned.update(slots)
        for write in owner.writes.values():
            reserved.update(write.slots)
            pinned.update(write.prefix)
    for ticket in core.tickets:
        reserved.update(ticket.reserved)
        pinned.update(ticket.pinned)
    return reserved, pinned
