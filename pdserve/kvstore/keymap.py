"""Which slot has a key: buckets of lanes over the column of keys, without an object per block.

A key's bucket has eight lanes, half of which are in use at most on average. A lane is a *tag*, one
byte that follows from the key as its bucket does, and a slot; a tag of 0 is an empty lane. So a key
is looked for among eight bytes, which lie in one word, and the whole keys of the few that have its
tag: one call of C for one key, and a dozen of numpy for all keys of a prompt, wherever the lanes
are (Fan, Andersen and Kaminsky, "MemC3", 2013, have tags of one byte for the same reason). Who
finds its bucket full, one in a hundred, is kept in a dictionary. A lane never moves, and who leaves
leaves nothing behind: lookups do not become slower with time.

Bucket and tag come from the interpreter's own hash of bytes (SipHash with a secret of the process),
so keys cannot be chosen so that they meet. A slot's lane is kept: removal looks for nothing.
"""

import struct
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdserve.ids import BLOCK_KEY_BYTES, BlockKey, SlotId

LANES = 8
LANES_PER_SLOT = 2

BATCH_MIN = 32
"""Keys from which on numpy's calls are faster than one key after the other."""

_TAGS = 255
_TAG_SHIFT = 48
"""The bits of a hash from here on make the tag; those below, in the main, the bucket."""

_OVERFLOW = (1 << 32) - 1
_KEY = struct.Struct(f"{BLOCK_KEY_BYTES}s")


class KeyMap:
    """The keys of ``slot_count`` slots, and those among them that can be found.

    Invariant, asserted by ``check``: whoever was added and not removed is found.
    """

    def __init__(self, slot_count: int) -> None:
        self._keys = bytearray(slot_count * BLOCK_KEY_BYTES)
        self._bucket_count = -(-slot_count * LANES_PER_SLOT // LANES)
        self._tags = bytearray(self._bucket_count * LANES)
        self._slots = array("I", bytes(4 * len(self._tags)))
        self._lane_of = array("I", bytes(4 * slot_count))  # of those that can be found
        self._overflow: dict[BlockKey, SlotId] = {}
        self.count = 0

    def key_of(self, slot: SlotId) -> BlockKey:
        """As ``set_key`` left it; zeros at first."""
        key: BlockKey = _KEY.unpack_from(self._keys, slot * BLOCK_KEY_BYTES)[0]
        return key

    def joined(self, slots: NDArray[np.integer[Any]]) -> bytes:
        """The keys of these slots, one behind the other."""
        return np.frombuffer(self._keys, f"V{BLOCK_KEY_BYTES}").take(slots).tobytes()

    def set_key(self, slot: SlotId, key: BlockKey) -> None:
        """Of a slot that cannot be found."""
        start = slot * BLOCK_KEY_BYTES
        self._keys[start : start + BLOCK_KEY_BYTES] = key

    def find(self, key: BlockKey) -> SlotId | None:
        if len(key) != BLOCK_KEY_BYTES:
            return None
        hashed = hash(key)
        first = hashed % self._bucket_count * LANES
        tag = (hashed >> _TAG_SHIFT) % _TAGS + 1
        tags, end = self._tags, first + LANES
        lane = tags.find(tag, first, end)
        while lane >= 0:
            slot = self._slots[lane]
            if self._keys.startswith(key, slot * BLOCK_KEY_BYTES):
                return SlotId(slot)
            lane = tags.find(tag, lane + 1, end)
        return self._overflow.get(key)

    def find_each(self, keys: Sequence[BlockKey]) -> list[int]:
        """The slots of ``keys``, as far as they are there; then, where one is missing, -1 for it,
        and nothing of those behind it."""
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

    def has_any(self, keys: Sequence[BlockKey]) -> bool:
        """Whether one of ``keys``, which have the right length, can be found."""
        if len(keys) < BATCH_MIN:
            return any(self.find(key) is not None for key in keys)
        _, _, there = self._candidates(keys, b"".join(keys))
        return bool(there.any()) or not self._overflow.keys().isdisjoint(keys)

    def _find_batch(self, keys: Sequence[BlockKey]) -> list[int]:
        joined = b"".join(keys)
        lanes = self._tagged(keys)[1]
        if len(lanes) == len(keys):
            # One candidate for each key, the usual case of a prefix that is stored: then all the
            # keys are compared at once. Candidates in another order have other keys.
            candidates = np.frombuffer(self._slots, np.uint32).take(lanes)
            if self.joined(candidates) == joined:
                usual: list[int] = candidates.tolist()
                return usual
        rows, slots, there = self._candidates(keys, joined)
        by_row = np.full(len(keys), -1, np.int64)
        by_row[rows[there]] = slots[there]
        found: list[int] = by_row.tolist()
        for index in (by_row < 0).nonzero()[0].tolist():
            slot = self._overflow.get(keys[index])
            if slot is None:
                del found[index + 1 :]
                break
            found[index] = slot
        return found

    def _tagged(self, keys: Sequence[BlockKey]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Whose tags are in their buckets: the key's place in ``keys``, and the lane."""
        hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
        buckets = hashes % self._bucket_count
        tags = ((hashes >> _TAG_SHIFT) % _TAGS + 1).astype(np.uint8)
        words = np.frombuffer(self._tags, np.uint64).take(buckets)
        hits = (words.view(np.uint8).reshape(-1, LANES) == tags[:, None]).ravel().nonzero()[0]
        rows = hits >> 3
        return rows, (buckets.take(rows) << 3) + (hits & 7)

    def _candidates(
        self, keys: Sequence[BlockKey], joined: bytes
    ) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.bool_]]:
        """``_tagged``, with the slot in each lane, and whether its key is that one."""
        wanted = np.frombuffer(joined, np.uint64)
        rows, lanes = self._tagged(keys)
        slots = np.frombuffer(self._slots, np.uint32).take(lanes).astype(np.int64)
        column = np.frombuffer(self._keys, np.uint64)
        places, rows_at = 2 * slots, 2 * rows
        there = column.take(places + 1) == wanted.take(rows_at + 1)
        there &= column.take(places) == wanted.take(rows_at)
        return rows, slots, there

    def add(self, slot: SlotId) -> None:
        """Let the slot's key find it; no other slot with this key can be found."""
        key = self.key_of(slot)
        hashed = hash(key)
        first = hashed % self._bucket_count * LANES
        lane = self._tags.find(0, first, first + LANES)
        if lane < 0:
            self._overflow[key] = slot
            self._lane_of[slot] = _OVERFLOW
        else:
            self._slots[lane] = slot
            self._tags[lane] = (hashed >> _TAG_SHIFT) % _TAGS + 1
            self._lane_of[slot] = lane
        self.count += 1

    def remove(self, slot: SlotId) -> None:
        """Nobody finds it by its key from now on."""
        lane = self._lane_of[slot]
        if lane == _OVERFLOW:
            del self._overflow[self.key_of(slot)]
        else:
            assert self._tags[lane], f"slot {slot} cannot be found"
            assert self._slots[lane] == slot, f"slot {slot} cannot be found"
            self._tags[lane] = 0
        self.count -= 1

    def check(self, findable: Sequence[SlotId]) -> None:
        """Assert the invariant: those of ``findable`` and no others. Linear; for tests."""
        there = [slot for slot, tag in zip(self._slots, self._tags, strict=True) if tag]
        assert sorted([*there, *self._overflow.values()]) == sorted(findable)
        assert self.count == len(findable)
        for slot in findable:
            assert self.find(self.key_of(slot)) == slot, f"slot {slot} cannot be found"
