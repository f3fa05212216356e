"""A worker follows its host's store: what comes and goes there, and whether it lives.

What has changed is told in pieces, so that a router that hears of a whole store, or of many at
once, goes on meanwhile.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pdserve.clock import monotonic
from pdserve.errors import PdserveError
from pdserve.ids import BlockKey

if TYPE_CHECKING:
    from pdserve.kvstore.answers import StoreChanges, StoreStat
    from pdserve.kvstore.client import StoreClient

ASK_S = 0.1
"""How often it is asked."""

KEYS_AT_ONCE = 4096
"""In one piece; a router takes it in a few milliseconds."""

EVERYTHING = -1


@dataclass(frozen=True, slots=True)
class News:
    """Of a store. Perhaps only its counters have changed."""

    added: Sequence[BlockKey] = ()
    removed: Sequence[BlockKey] = ()
    anew: bool = False  # what was told before is void: some changes nobody knows any more


class StoreWatch:
    def __init__(self, client: "StoreClient", *, with_blocks: bool = True) -> None:
        """``with_blocks``: what comes and goes is asked for too, and not only the counters."""
        self.counters: dict[str, int] = {}
        """The store's, when it last answered."""

        self.lost: str | None = None
        """Why it answers nothing any more."""

        self._client = client
        self._with_blocks = with_blocks
        self._after = EVERYTHING
        self._pieces: deque[News] = deque()  # of one answer: at most what a message carries
        self._asked_ns = 0
        self._tickets = 0

    def tell_anew(self) -> None:
        """Whoever listens has forgotten everything."""
        self._after = EVERYTHING
        self._pieces.clear()

    def holds_nothing(self, since_ns: int) -> bool:
        """Whether no ticket ends with this worker, as the store answered after ``since_ns``."""
        return self._asked_ns >= since_ns and self._tickets == 0

    async def news(self) -> AsyncGenerator[News, None]:
        """Whenever blocks or counters have changed. Ends when the store is lost."""
        while True:
            await asyncio.sleep(ASK_S)
            after = self._after if self._with_blocks and not self._pieces else None
            try:
                # One call for all three: two in a row may each start a thread of the pool.
                changes, asked_ns, stat = await asyncio.to_thread(self._ask, after)
            except PdserveError as error:
                self.lost = str(error)
                return
            if changes is not None and after == self._after:  # else all has to be told anew
                self._after = changes.sequence
                if not changes.complete and after != EVERYTHING:
                    self._pieces.append(News(anew=True))
                self._pieces.extend(News(removed=keys) for keys in pieces_of(changes.removed))
                self._pieces.extend(News(added=keys) for keys in pieces_of(changes.added))
            self._asked_ns, self._tickets = asked_ns, stat.tickets_own
            counters = stat.counters()
            stirred = counters != self.counters
            self.counters = counters
            if self._pieces:
                yield self._pieces.popleft()
            elif stirred:
                yield News()

    def close(self) -> None:
        self._client.close()

    def _ask(self, after: int | None) -> "tuple[StoreChanges | None, int, StoreStat]":
        changes = None if after is None else self._client.changes(after)
        return changes, monotonic(), self._client.stat()


def pieces_of(keys: Sequence[BlockKey]) -> Iterator[Sequence[BlockKey]]:
    return (keys[at : at + KEYS_AT_ONCE] for at in range(0, len(keys), KEYS_AT_ONCE))
