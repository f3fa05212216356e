"""What entered and left a store, numbered, for those who keep a copy of it.

The feed remembers the last ``changes_max`` changes. Who asks for more gets everything that is
there now, marked as not complete: the copy is thrown away and begun anew.
"""

from collections import deque
from collections.abc import Collection
from itertools import islice

from pdserve.ids import BlockKey

CHANGES_MAX = 65_536


class ChangeFeed:
    def __init__(self, *, lower: Collection[BlockKey] = (), changes_max: int = CHANGES_MAX) -> None:
        """``lower``: what is stored in a tier below, and stays so when it leaves the index."""
        assert changes_max > 0
        self._lower = lower
        self._changes: deque[tuple[BlockKey, bool]] = deque(maxlen=changes_max)
        self.sequence = 0
        """Of the last change; the first one has 1."""

    def added(self, key: BlockKey) -> None:
        if key not in self._lower:
            self.note(key, True)

    def removed(self, key: BlockKey) -> None:
        if key not in self._lower:
            self.note(key, False)

    def since(self, after: int) -> tuple[list[BlockKey], list[BlockKey]] | None:
        """(added, removed) between ``after`` and now, each key once, by what became of it last.

        None when the feed does not reach back so far, or ``after`` is not a sequence of this feed.
        """
        missed = self.sequence - after
        if not 0 <= missed <= len(self._changes):
            return None
        present: dict[BlockKey, bool] = {}
        for key, is_added in reversed(list(islice(reversed(self._changes), missed))):
            present.pop(key, None)  # so that the order is that of the last change
            present[key] = is_added
        return (
            [key for key, is_added in present.items() if is_added],
            [key for key, is_added in present.items() if not is_added],
        )

    def note(self, key: BlockKey, is_added: bool) -> None:
        """In whatever tier."""
        self.sequence += 1
        self._changes.append((key, is_added))
