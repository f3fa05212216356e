"""What a node tells those who keep a copy of what it has."""

import numpy as np
import pytest

from pdserve.ids import BLOCK_KEY_BYTES, BlockKey
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.headers import NO_PARENT
from pdserve.kvstore.inheritance import Inheritance
from pdserve.kvstore.keys import split_keys
from pdserve.kvstore.slot_states import COMMITTED, FREE

SLOT_COUNT = 8


def adopted(keys: list[BlockKey]) -> Inheritance:
    """A chain in the first slots, and nothing else."""
    count = len(keys)
    states = np.full(SLOT_COUNT, FREE, np.uint8)
    states[:count] = COMMITTED
    table = np.zeros((SLOT_COUNT, BLOCK_KEY_BYTES), np.uint8)
    table[:count] = np.frombuffer(b"".join(keys), np.uint8).reshape(count, BLOCK_KEY_BYTES)
    parents = np.full(SLOT_COUNT, NO_PARENT, np.uint32)
    parents[1:count] = np.arange(count - 1)
    depths = np.zeros(SLOT_COUNT, np.uint32)
    depths[:count] = np.arange(count)
    numbers = np.ones(SLOT_COUNT, np.uint64)
    return Inheritance(states, numbers, numbers, table, parents, depths)


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(BLOCK_KEY_BYTES, "big"))


@pytest.mark.parametrize("changes_max", [1, 100])
def test_an_inventory_has_what_was_taken_over_and_what_is_below_each_once(changes_max: int) -> None:
    above, below = [key(number) for number in (1, 2, 3)], [key(3), key(4)]
    core = StoreCore(SLOT_COUNT, lower=below, changes_max=changes_max, inheritance=adopted(above))
    everything = [key(number) for number in (1, 2, 3, 4)]
    assert sorted(split_keys(core.contents.inventory())) == everything
    sequence, changes = core.contents.since(0)
    assert sequence == len(everything)
    assert (changes is None) == (changes_max == 1)
    assert sorted(core.changes(0).added) == everything, "its changes begin with what it took over"


def test_an_inventory_follows_what_is_evicted() -> None:
    core = StoreCore(SLOT_COUNT, inheritance=adopted([key(number) for number in range(1, 9)]))
    assert len(split_keys(core.contents.inventory())) == SLOT_COUNT
    owner = core.connect("w")
    new = [key(100)]
    grant = core.reserve(owner, new, 0)
    assert len(grant.slots) == 1
    assert sorted(split_keys(core.contents.inventory())) == [key(number) for number in range(1, 8)]
