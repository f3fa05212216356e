"""Which prefix blocks a worker or a host has: least recently used goes first, children first.

A chain of blocks is touched from its end to its beginning, so that of two blocks of one prompt the
one nearer the beginning was always used later. Evicting the least recently used therefore takes
children before parents, and what is cached of a prompt is always a prefix of it.
"""

from collections.abc import Hashable, Sequence
from itertools import islice
from typing import Any, Final

OLDEST_MAX: Final = 256
"""Keys that are known to be the next to go. A dict finds its first key by walking over all that
were removed before it, thousands of them; so one walk finds many."""


Blocks = tuple[Any, ...]
"""Numbers of blocks, in the place of the ``BlockKey`` of messages: see ``attempt.Keys``."""


class BlockCache:
    """Keys of blocks, at most ``block_max`` of them. ``None`` is no limit.

    What came and went since ``take_changes`` was last called is remembered for the next report.
    """

    __slots__ = ("_added", "_keys", "_oldest", "_removed", "block_max")

    def __init__(self, block_max: int | None) -> None:
        assert block_max is None or block_max >= 0
        self.block_max = block_max
        self._keys: dict[Hashable, None] = {}  # least recently used first
        self._oldest: dict[Hashable, None] = {}  # the first of them, or nothing
        self._added: dict[Hashable, None] = {}
        self._removed: dict[Hashable, None] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def prefix_blocks(self, keys: Sequence[Hashable]) -> int:
        """How many leading blocks are here."""
        known = self._keys
        for count, key in enumerate(keys):
            if key not in known:
                return count
        return len(keys)

    def touch(self, keys: Sequence[Hashable]) -> None:
        """These, a prompt's first blocks, were used or computed: they are here from now on."""
        known = self._keys
        if self.block_max is None:  # nothing ever leaves, so nobody asks for the order
            fresh = dict.fromkeys([key for key in keys if key not in known])
            known.update(fresh)
            for key in fresh:
                self._came(key)
            return
        oldest = self._oldest
        for key in reversed(keys):
            if key in known:
                del known[key]
                oldest.pop(key, None)
            else:
                self._came(key)
            known[key] = None
        self.trim(self.block_max)

    def trim(self, block_max: int) -> None:
        """Evict until at most ``block_max`` are left."""
        assert self.block_max is not None
        known = self._keys
        while (surplus := len(known) - block_max) > 0:
            if not self._oldest:
                self._oldest = dict.fromkeys(islice(known, OLDEST_MAX))
            for key in list(islice(self._oldest, surplus)):
                del self._oldest[key]
                del known[key]
                self._left(key)

    def _came(self, key: Hashable) -> None:
        """It is here from now on: to be told."""
        if key in self._removed:
            del self._removed[key]
        else:
            self._added[key] = None

    def _left(self, key: Hashable) -> None:
        """It was evicted."""
        if key in self._added:
            del self._added[key]
        else:
            self._removed[key] = None

    def take_changes(self) -> tuple[Blocks, Blocks]:
        """What was added and what removed since the last call."""
        if not self._added and not self._removed:
            return (), ()
        changes = tuple(self._added), tuple(self._removed)
        self._added.clear()
        self._removed.clear()
        return changes
