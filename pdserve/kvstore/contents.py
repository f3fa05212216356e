"""What a store has, for those who keep a copy of it: all of it, or what has changed.

A node that goes on with a dead one's arena counts its changes from 1 again, beginning with the
blocks that it took over. Copies belong to one node of one epoch, so nobody goes on with the dead
one's numbers.
"""

from collections.abc import Collection
from itertools import chain, islice

from pdserve.ids import BlockKey
from pdserve.kvstore.answers import StoreChanges
from pdserve.kvstore.feed import ChangeFeed
from pdserve.kvstore.slots import SlotTable

WHOLE_KEYS_MAX = 1 << 18
"""In one answer that says everything: 4.5 MB. What is deeper than these is left out, a miss."""


class Contents:
    def __init__(self, slots: SlotTable, lower: Collection[BlockKey], feed: ChangeFeed) -> None:
        """``lower``: what is stored in a tier below."""
        self._slots = slots
        self._lower = lower
        self._feed = feed

    def changes(self, after: int) -> StoreChanges:
        """Everything, said to be not complete, where the feed does not reach back so far; at most
        ``WHOLE_KEYS_MAX`` keys, those in memory first."""
        changes = self._feed.since(after)
        if changes is None:
            above = self._slots.keys_by_depth(WHOLE_KEYS_MAX)
            stored = dict.fromkeys(chain(above, islice(self._lower, WHOLE_KEYS_MAX)))
            keys = tuple(islice(stored, WHOLE_KEYS_MAX))
            return StoreChanges(self._feed.sequence, keys, (), complete=False)
        added, removed = changes
        return StoreChanges(self._feed.sequence, tuple(added), tuple(removed), complete=True)

    def since(self, after: int) -> tuple[int, tuple[list[BlockKey], list[BlockKey]] | None]:
        """The feed's sequence, and (added, removed); None where it does not reach back so far."""
        return self._feed.sequence, self._feed.since(after)

    def inventory(self) -> bytes:
        """The keys of all that is stored, joined, each once, in no order."""
        below = b"".join(key for key in self._lower if self._slots.find(key) is None)
        return self._slots.keys_joined() + below
