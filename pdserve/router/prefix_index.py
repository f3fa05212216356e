"""Who has which blocks, as far as their reports say. A hint: stale entries cost time, never bytes.

A *location* is a worker's device pool or a host's store. Workers have small numbers, *slots*, and
the index keeps for every block a bit set of the slots that can use it: those whose own pool has it,
and those on the host whose store has it. Walking along a prompt's keys and intersecting the sets
gives, for all workers at once, how long a prefix each one has; the walk ends where nobody has the
next block.

Deltas come with a worker's reports. Where one was lost, the router forgets the location; whoever
connects tells all that is there, piece by piece.

A block's name is a ``BlockKey`` in a live cluster. The simulator has numbers in its place, and
nothing here asks for more than that names can be compared and hashed.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from pdserve.ids import StoreId

LOCATION_KEYS_MAX = 1 << 18
"""Keys remembered per location; beyond, those added first are forgotten (which is a miss)."""

Hits = tuple[tuple[int, int], ...]
"""Pairs (blocks, bit set of slots): these workers have so many leading blocks. Sets are disjoint,
block counts strictly ascend; together they cover the slots asked for."""


_ABSENT: Final = object()


@dataclass(slots=True)
class _Location:
    readers: int  # bit set of slots
    keys: dict[Hashable, None]  # oldest first


class PrefixIndex:
    def __init__(self, *, location_keys_max: int = LOCATION_KEYS_MAX) -> None:
        assert location_keys_max > 0
        self._location_keys_max = location_keys_max
        self._locations: dict[int | StoreId, _Location] = {}
        self._in_pools: dict[Hashable, int] = {}
        self._in_stores: dict[Hashable, int] = {}
        self.version = 0  # as long as it stays the same, so does every answer

    # ── locations ────────────────────────────────────────────────────────────────────────────────

    def join(self, slot: int, store: StoreId) -> None:
        """The worker at ``slot`` uses its own pool and that store."""
        assert slot not in self._locations, f"slot {slot} is taken"
        self.version += 1
        self._locations[slot] = _Location(1 << slot, {})
        at_store = self._locations.setdefault(store, _Location(0, {}))
        self._read_by(at_store, at_store.readers | 1 << slot)

    def leave(self, slot: int, store: StoreId) -> None:
        self.forget(slot)
        self.version += 1
        del self._locations[slot]
        at_store = self._locations[store]
        self._read_by(at_store, at_store.readers & ~(1 << slot))
        if not at_store.readers:
            del self._locations[store]

    def _read_by(self, at_store: _Location, readers: int) -> None:
        # Another store of the same host (an earlier incarnation) may hold the same keys: bits are
        # set and cleared for this store's readers alone.
        for key in at_store.keys:
            others = self._in_stores.get(key, 0) & ~at_store.readers
            _put(self._in_stores, key, others | readers)
        at_store.readers = readers

    # ── deltas ───────────────────────────────────────────────────────────────────────────────────

    def update(
        self, location: int | StoreId, added: Iterable[Hashable], removed: Iterable[Hashable]
    ) -> None:
        """Removed first: a block that went and came again within one report is there."""
        at = self._locations.get(location)
        if at is None:
            return
        self.version += 1
        bits, keys = self._bits_of(location), at.keys
        readers = at.readers
        # Maps of millions of keys: each look-up is a wait for memory, so there are no two for one.
        _take_out(removed, keys, bits, readers)
        for key in added:
            keys[key] = None
            known = bits.setdefault(key, readers)  # most are of one location, and share its set
            if known != readers:
                bits[key] = known | readers
        if len(keys) > self._location_keys_max:
            oldest = list(islice(keys, len(keys) - self._location_keys_max))
            _take_out(oldest, keys, bits, readers)

    def forget(self, location: int | StoreId) -> None:
        at = self._locations.get(location)
        if at is not None:
            self.update(location, (), tuple(at.keys))

    # ── questions ────────────────────────────────────────────────────────────────────────────────

    def hits(self, keys: Sequence[Hashable], slots: int) -> Hits:
        """How many leading blocks each of the workers in the bit set ``slots`` can use."""
        in_pools, in_stores = self._in_pools.get, self._in_stores.get
        found = []
        left = slots
        blocks = 0
        for key in keys:
            here = in_stores(key, 0) & left
            if here != left:  # else nobody else need be asked: past the first blocks it is so
                here |= in_pools(key, 0) & left
            if here != left:
                found.append((blocks, left & ~here))
                left = here
                if not left:
                    return tuple(found)
            blocks += 1
        if left:
            found.append((blocks, left))
        return tuple(found)

    def stored_blocks(self, keys: Sequence[Hashable]) -> int:
        """How many leading blocks one store has, of the store that has most of them."""
        in_stores = self._in_stores.get
        having = -1  # bit set of the slots whose store has all so far: everybody's
        for blocks, key in enumerate(keys):
            having &= in_stores(key, 0)
            if not having:
                return blocks
        return len(keys)

    def key_count(self, location: int | StoreId) -> int:
        at = self._locations.get(location)
        return 0 if at is None else len(at.keys)

    def _bits_of(self, location: int | StoreId) -> dict[Hashable, int]:
        return self._in_pools if isinstance(location, int) else self._in_stores


def _take_out(
    gone: Iterable[Hashable],
    keys: dict[Hashable, None],
    bits: dict[Hashable, int],
    readers: int,
) -> None:
    """Of one location's keys, with what its readers have by them."""
    others = ~readers
    for key in gone:
        if keys.pop(key, _ABSENT) is None and (known := bits.pop(key, 0) & others):
            bits[key] = known


def _put(bits: dict[Hashable, int], key: Hashable, slots: int) -> None:
    if slots:
        bits[key] = slots
    else:
        bits.pop(key, None)
