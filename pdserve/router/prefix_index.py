"""Who has which blocks, as far as their reports say. A hint: stale entries cost time, never bytes.

A *location* is a worker's device pool or a host's store; to this file they are names. A prefix is
usable at a set of locations up to the first block that none of them has. Deltas come with a
worker's reports; where one was lost, the router forgets the location and learns it anew.
"""

from collections.abc import Iterable, Sequence

from pdserve.ids import BlockKey

LOCATION_KEYS_MAX = 1 << 18
"""Keys remembered per location; beyond, those added first are forgotten (which is a miss)."""


class PrefixIndex:
    def __init__(self, *, location_keys_max: int = LOCATION_KEYS_MAX) -> None:
        assert location_keys_max > 0
        self._location_keys_max = location_keys_max
        self._keys: dict[str, dict[BlockKey, None]] = {}  # oldest first

    def update(self, location: str, added: Iterable[BlockKey], removed: Iterable[BlockKey]) -> None:
        """Removed first: a block that went and came again within one report is there."""
        keys = self._keys.setdefault(location, {})
        for key in removed:
            keys.pop(key, None)
        for key in added:
            keys[key] = None
        while len(keys) > self._location_keys_max:
            del keys[next(iter(keys))]

    def forget(self, location: str) -> None:
        self._keys.pop(location, None)

    def prefix_blocks(self, keys: Sequence[BlockKey], locations: Iterable[str]) -> int:
        """How many leading blocks are at one of these locations each."""
        known = [self._keys[location] for location in locations if location in self._keys]
        for count, key in enumerate(keys):
            if not any(key in at for at in known):
                return count
        return len(keys)

    def key_count(self, location: str) -> int:
        return len(self._keys.get(location, ()))
