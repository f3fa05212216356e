"""Which slot has a key: open addressing over the column of keys, without an object per block.

The map is an array of slots, half of it in use at most. A key's slot lies at its *home*, or in the
next place behind that was empty when it came (linear probing; Knuth, "The Art of Computer
Programming", volume 3, section 6.4, algorithms L and R). Who leaves closes the gap behind, so there
are no marks of the dead that would make lookups slower with time.

Homes come from the interpreter's own hash of bytes (SipHash with a secret of the process), so keys
cannot be chosen so that they meet. A slot's home is kept, 4 bytes: nothing is hashed twice.
"""

import struct
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pdserve.ids import BLOCK_KEY_BYTES, BlockKey, SlotId

PLACES_PER_SLOT = 2

BATCH_MIN = 24
"""Keys from which on numpy's calls are faster than one key after the other."""

_KEY = struct.Struct(f"{BLOCK_KEY_BYTES}s")


class KeyMap:
    """The keys of ``slot_count`` slots, and those among them that can be found.

    Invariant, asserted by ``check``: whoever was added and not removed is found.
    """

    def __init__(self, slot_count: int) -> None:
        self._keys = bytearray(slot_count * BLOCK_KEY_BYTES)
        self._homes = array("I", bytes(4 * slot_count))
        self._size = slot_count * PLACES_PER_SLOT + 1  # one is empty always, so searches end
        self._places = array("I", bytes(4 * self._size))  # slot + 1; 0: empty
        self.count = 0

    def key_of(self, slot: SlotId) -> BlockKey:
        """As ``set_key`` left it; zeros at first."""
        key: BlockKey = _KEY.unpack_from(self._keys, slot * BLOCK_KEY_BYTES)[0]
        return key

    def joined(self, slots: NDArray[np.intp]) -> bytes:
        """The keys of these slots, one behind the other."""
        keys = np.frombuffer(self._keys, np.uint8).reshape(-1, BLOCK_KEY_BYTES)
        return keys[slots].tobytes()

    def set_key(self, slot: SlotId, key: BlockKey) -> None:
        """Of a slot that cannot be found."""
        start = slot * BLOCK_KEY_BYTES
        self._keys[start : start + BLOCK_KEY_BYTES] = key
        self._homes[slot] = hash(key) % self._size

    def find(self, key: BlockKey) -> SlotId | None:
        if len(key) != BLOCK_KEY_BYTES:
            return None
        places, keys, size = self._places, self._keys, self._size
        at = hash(key) % size
        while place := places[at]:
            if keys.startswith(key, (place - 1) * BLOCK_KEY_BYTES):
                return SlotId(place - 1)
            at += 1
            if at == size:
                at = 0
        return None

    def find_each(self, keys: Sequence[BlockKey]) -> list[int]:
        """The slots of ``keys``; it may end early, but not before the first that is missing, which
        is -1."""
        # The bytes of two keys that are none must not be taken for a third one's.
        if len(keys) >= BATCH_MIN and set(map(len, keys)) == {BLOCK_KEY_BYTES}:
            return self._find_batch(keys)
        found = []
        for key in keys:
            slot = self.find(key)
            if slot is None:
                found.append(-1)
                break
            found.append(slot)
        return found

    def _find_batch(self, keys: Sequence[BlockKey]) -> list[int]:
        wanted = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)
        homes = np.fromiter(map(hash, keys), np.int64, len(keys)) % self._size
        places = np.frombuffer(self._places, np.uint32).take(homes)
        column = np.frombuffer(self._keys, np.uint64).reshape(-1, 2)
        slots = places.astype(np.int64) - 1
        # An empty place becomes the last slot here; its key may even be the one that is wanted.
        there = column.take(slots, axis=0, mode="wrap") == wanted
        hits = there[:, 0] & there[:, 1] & (slots >= 0)
        found: list[int] = slots.tolist()
        column_bytes, all_places, size = self._keys, self._places, self._size
        for index in (~hits).nonzero()[0].tolist():
            key, at = keys[index], int(homes[index])
            while place := all_places[at]:  # as in ``find``, without its call
                if column_bytes.startswith(key, (place - 1) * BLOCK_KEY_BYTES):
                    break
                at += 1
                if at == size:
                    at = 0
            found[index] = place - 1
            if not place:
                del found[index + 1 :]
                break
        return found

    def add(self, slot: SlotId) -> None:
        """Let the slot's key find it; no other slot with this key can be found."""
        places, size = self._places, self._size
        at = self._homes[slot]
        while places[at]:
            at += 1
            if at == size:
                at = 0
        places[at] = slot + 1
        self.count += 1

    def remove(self, slot: SlotId) -> None:
        """Nobody finds it by its key from now on."""
        places, homes, size = self._places, self._homes, self._size
        gap = homes[slot]
        while places[gap] != slot + 1:
            assert places[gap], f"slot {slot} cannot be found"
            gap += 1
            if gap == size:
                gap = 0
        at = gap
        while True:
            at += 1
            if at == size:
                at = 0
            place = places[at]
            if not place:
                break
            # Who has its home behind the gap must not move before it.
            if (at - homes[place - 1]) % size >= (at - gap) % size:
                places[gap] = place
                gap = at
        places[gap] = 0
        self.count -= 1

    def check(self, findable: Sequence[SlotId]) -> None:
        """Assert the invariant: those of ``findable`` and no others. Linear; for tests."""
        assert sorted(place - 1 for place in self._places if place) == sorted(findable)
        assert self.count == len(findable)
        for slot in findable:
            assert self.find(self.key_of(slot)) == slot, f"slot {slot} cannot be found"
