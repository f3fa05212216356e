"""Eviction because somebody says so. Blocks that a reader, a writer or a hard pin holds stay, and
so does all that they build on; soft pins do not count here."""

from collections.abc import Iterable, Sequence

from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.pins import PinBook
from pdserve.kvstore.slot_states import SlotState
from pdserve.kvstore.slots import SlotTable


def blocks_of_prompt(slots: SlotTable, keys: Sequence[BlockKey]) -> list[SlotId]:
    """A prompt's blocks, and all that builds on the whole of it."""
    chain = slots.lookup(keys)
    below = slots.descendants(chain[-1]) if chain and len(chain) == len(keys) else []
    return [*chain, *below]


def blocks_of_tenant(slots: SlotTable, tenant: str) -> list[SlotId]:
    """Those on the tenant's own account; none where it has none. Linear in the arena."""
    number = slots.order.accounts.find(tenant)
    return [
        slot
        for slot in blocks_of_all(slots)
        if number is not None and slots.order.accounts.number_of(slot) == number
    ]


def blocks_of_all(slots: SlotTable) -> list[SlotId]:
    """Linear in the arena."""
    every = map(SlotId, range(slots.slot_count))
    return [slot for slot in every if slots.state(slot) is SlotState.COMMITTED]


def evict(slots: SlotTable, pins: PinBook, chosen: Iterable[SlotId], *, pinned: bool) -> int:
    """How many of the chosen blocks went; with ``pinned`` their pins end first.

    What others build on stays: of a prompt, its own blocks go, and not those that it shares.
    """
    deepest_first = sorted(chosen, key=lambda slot: -slots.depth(slot))
    if pinned:
        pins.unpin(deepest_first)
    count = sum(slots.evict_if_idle(slot) for slot in deepest_first)
    slots.reap()
    return count
