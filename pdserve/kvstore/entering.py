"""How a block enters that comes from a node that is emptied. Pure.

It enters as what it was there: as old, and of the same turn. So it has its place in the order of
eviction of this node, and what is *worth less* has to go for it. It is worth no more than any
other: nothing goes that is worth as much, that somebody has pinned, softly or otherwise, or that
is of a tenant within its share, unless the block is that tenant's own. What is left of an arena is
then what would be left had both nodes been one.

A block cannot be found without those before it in its chain, so it counts for them too: one that
comes is worth what the best is that comes behind it.
"""

from collections.abc import Sequence
from itertools import accumulate

from pdserve.kvstore.readers import Room
from pdserve.kvstore.slot_states import Past
from pdserve.kvstore.slots import SlotTable


def make_room_for(room: Room, slots: SlotTable, pasts: Sequence[Past], tenant: str) -> int:
    """Slots that are free now for blocks which continue one another: how many, from the first on.
    Slots are given away to the tenant as free ones are; evicted is for each what is worth less."""
    count = len(pasts)
    if count <= slots.free_count:
        return count
    room.look()
    accounts = slots.order.accounts
    account = accounts.charge(tenant, count)  # as ``make_room`` does
    # Of those that come, from each on: what the best is worth.
    worths = list(accumulate((slots.worth_of(past) for past in reversed(pasts)), max))[::-1]
    while slots.free_count < count:
        slot = slots.first_below(worths[slots.free_count], account)
        if slot is None:
            break
        accounts.evicted(slot)
        slots.evict_if_idle(slot)
        slots.reap()
    accounts.give_back(account, count)
    return min(count, slots.free_count)


def may_enter(room: Room, slots: SlotTable, pasts: Sequence[Past], tenant: str) -> bool:
    """Whether the first of them would get a slot now. Nothing is evicted."""
    if slots.free_count:
        return True
    room.look()
    accounts = slots.order.accounts
    account = accounts.charge(tenant, len(pasts))
    slot = slots.first_below(max(map(slots.worth_of, pasts)), account)
    accounts.give_back(account, len(pasts))
    return slot is not None
