"""Damage to the arena of a node that is dead, as a writer gone wild does it: bytes of blocks."""

import random

from pdserve.errors import StoreUnavailable
from pdserve.ids import SlotId
from pdserve.kvstore.arena import open_arena
from pdserve.kvstore.directory import ARENA_NAME, root_of
from pdserve.kvstore.slot_states import SlotState
from tests.campaign.processes import NodePlan

DAMAGED_RATIO = 0.3


def damage_arena(plan: NodePlan, chance: random.Random) -> None:
    """Flip a bit in some of the blocks that the next node will take over."""
    path = root_of(plan.shared) / plan.store_id / ARENA_NAME
    try:
        arena = open_arena(path, plan.store_id, writable=True)
    except StoreUnavailable:  # it died before it had made one
        return
    for slot in map(SlotId, range(arena.geometry.slot_count)):
        if arena.header(slot).state is SlotState.COMMITTED and chance.random() < DAMAGED_RATIO:
            arena.payload(slot)[chance.randrange(arena.geometry.block_bytes)] ^= 4
