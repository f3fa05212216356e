"""What is known of an arena's slots: one array of numbers per field, and no object per block.

51 bytes per slot, and 15 for the map of keys. What changes is read and written one by one, which
arrays do fastest; what looks at all slots uses numpy, over the same memory.
"""

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pdserve.ids import BLOCK_KEY_BYTES, BlockKey, SlotId
from pdserve.kvstore.headers import NO_PARENT
from pdserve.kvstore.inheritance import Inheritance
from pdserve.kvstore.keymap import KeyMap
from pdserve.kvstore.slot_states import COMMITTED, STATES, Past, Slot, SlotState


class SlotColumns:
    """Read by anybody; written by ``SlotTable`` alone."""

    def __init__(self, slot_count: int) -> None:
        assert 0 < slot_count < NO_PARENT
        self.slot_count = slot_count
        self._states = array("B", bytes(slot_count))
        self._has_key = array("B", bytes(slot_count))
        self._turns = array("B", bytes(slot_count))
        self._generations = array("Q", bytes(8 * slot_count))
        self._checksums = array("Q", bytes(8 * slot_count))
        self._last_uses = array("Q", bytes(8 * slot_count))
        self._parents = array("I", [NO_PARENT]) * slot_count
        self._depths = array("I", bytes(4 * slot_count))
        self._children = array("I", bytes(4 * slot_count))
        self._pins = array("I", bytes(4 * slot_count))
        self._map = KeyMap(slot_count)

    def __getitem__(self, slot: SlotId) -> Slot:
        parent = self._parents[slot]
        return Slot(
            STATES[self._states[slot]],
            self._generations[slot],
            self._map.key_of(slot) if self._has_key[slot] else None,
            self._checksums[slot],
            None if parent == NO_PARENT else SlotId(parent),
            self._depths[slot],
            self._children[slot],
            self._pins[slot],
            self._last_uses[slot],
            self._turns[slot],
        )

    def state(self, slot: SlotId) -> SlotState:
        return STATES[self._states[slot]]

    def generation(self, slot: SlotId) -> int:
        return self._generations[slot]

    def generations(self, slots: Sequence[SlotId]) -> tuple[int, ...]:
        return tuple(map(self._generations.__getitem__, slots))

    def parent(self, slot: SlotId) -> SlotId | None:
        parent = self._parents[slot]
        return None if parent == NO_PARENT else SlotId(parent)

    def depth(self, slot: SlotId) -> int:
        return self._depths[slot]

    def past(self, slot: SlotId) -> Past:
        return Past(self._last_uses[slot], self._turns[slot])

    @property
    def indexed_count(self) -> int:
        return self._map.count

    def keys_joined(self) -> bytes:
        """Of all blocks in the index, 16 bytes each, in the order of their slots."""
        return self._map.joined((np.frombuffer(self._states, np.uint8) == COMMITTED).nonzero()[0])

    def keys_by_depth(self, count_max: int | None = None) -> list[BlockKey]:
        """Of the blocks in the index, parents before children; the deepest are left out."""
        return [self._map.key_of(slot) for slot in self._indexed()[:count_max]]

    def count(self, state: SlotState) -> int:
        """Linear in the table; for statistics."""
        return self._states.count(STATES.index(state))

    def pinned_count(self) -> int:
        return self.slot_count - self._pins.count(0)

    def _take_over(self, inheritance: Inheritance) -> None:
        """Begin with these slots, in columns where nothing has happened yet; each block has a pin
        if they are held."""
        adopted = inheritance.adopted_slots
        np.frombuffer(self._states, np.uint8)[:] = inheritance.states
        np.frombuffer(self._generations, np.uint64)[:] = inheritance.generations
        np.frombuffer(self._checksums, np.uint64)[adopted] = inheritance.checksums[adopted]
        np.frombuffer(self._parents, np.uint32)[adopted] = inheritance.parents[adopted]
        np.frombuffer(self._depths, np.uint32)[adopted] = inheritance.depths[adopted]
        np.frombuffer(self._pins, np.uint32)[adopted] = inheritance.held
        parents = inheritance.parents[adopted]
        counts = np.bincount(parents[parents != NO_PARENT], minlength=self.slot_count)
        np.frombuffer(self._children, np.uint32)[:] = counts
        keys = inheritance.keys.tobytes()
        for slot in adopted:
            start = slot * BLOCK_KEY_BYTES
            self._set_key(slot, BlockKey(keys[start : start + BLOCK_KEY_BYTES]))
            self._map.add(slot)

    def _indexed(self, *, deeper_than: int = -1) -> list[SlotId]:
        """All COMMITTED slots of such a depth, parents before children."""
        depths = np.frombuffer(self._depths, np.uint32).astype(np.int64)
        chosen = (np.frombuffer(self._states, np.uint8) == COMMITTED) & (depths > deeper_than)
        slots = chosen.nonzero()[0]
        ordered: list[SlotId] = slots[depths[slots].argsort(kind="stable")].tolist()
        return ordered

    def _is_idle_leaf(self, slot: SlotId) -> bool:
        return self._states[slot] == COMMITTED and not self._pins[slot] and not self._children[slot]

    def _idle_leaves(self) -> NDArray[np.int64]:
        is_leaf = np.frombuffer(self._states, np.uint8) == COMMITTED
        is_leaf &= np.frombuffer(self._pins, np.uint32) == 0
        is_leaf &= np.frombuffer(self._children, np.uint32) == 0
        leaves: NDArray[np.int64] = is_leaf.nonzero()[0]
        return leaves

    def _set_key(self, slot: SlotId, key: BlockKey) -> None:
        self._map.set_key(slot, key)
        self._has_key[slot] = 1
