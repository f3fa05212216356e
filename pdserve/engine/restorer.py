"""Carries a ``Restore`` out: asks the store what a prefix would take, and gets what pays.

A disk that was slow once would never be asked again, and never be known to be fast: every
``TRIED_AGAIN_EVERY``-th prefix is taken from it though computing seems to be sooner.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from pdserve.clock import Clock, S
from pdserve.engine.moves import Restore
from pdserve.engine.restoring import Tier, blocks_to_restore
from pdserve.errors import BlockMissing, ChecksumMismatch
from pdserve.ids import BlockId
from pdserve.kvstore.path_speed import PathCost, PathSpeed

log = logging.getLogger(__name__)

TRIED_AGAIN_EVERY = 16

BELIEVED = PathCost(fixed_s=0.0005, bytes_per_s=4e9)
"""Of the way from the arena into the pool, before anything has taken it."""

COUNTERS = (
    "prefixes_fetched",  # that a disk had more of, and it came from there
    "prefixes_recomputed",  # the same, but computing was predicted to be sooner
    "blocks_recomputed",  # of those, blocks that were stored
)


class Restorer:
    def __init__(
        self,
        block_bytes: int,
        write: Callable[[BlockId, memoryview], None],
        counters: Counter[str],
        clock: Clock,
    ) -> None:
        """``write(block, data)`` copies a block's bytes into the pool."""
        self._block_bytes = block_bytes
        self._write = write
        self._counters = counters
        self._clock = clock
        self._arena_speed = PathSpeed(BELIEVED)
        self._declined = 0
        counters.update(dict.fromkeys(COUNTERS, 0))

    def restore(self, store: Any, move: Restore) -> int:
        """The number of blocks restored. A bad or missing one ends the prefix there; what follows
        is recomputed."""
        end, fetch = self._wanted(store, move)
        if end <= move.first:
            return 0
        claim = store.claim(move.keys, fetch=fetch, tenant=move.tenant)
        end = min(end, claim.count)
        began_ns = self._clock()
        count = 0

        def take(position: int, data: memoryview) -> None:
            nonlocal count
            self._write(move.blocks[position], data)
            count += 1

        try:
            store.read_each(claim, range(move.first, end), take)
        except (BlockMissing, ChecksumMismatch) as error:
            log.info("%d blocks restored, the next is not to be had: %s", count, error)
        finally:
            store.release(claim)
        if count:
            self._arena_speed.observe(count * self._block_bytes, (self._clock() - began_ns) / S)
        return count

    def _wanted(self, store: Any, move: Restore) -> tuple[int, bool]:
        """How many leading blocks, and whether the disk is to be waited for."""
        if move.speed is None or not store.has_disk:
            return len(move.keys), True
        quote = store.quote(move.keys)
        if quote.stored == quote.in_arena:
            return quote.in_arena, False
        arena = self._arena_speed.cost
        # From the disk blocks come by way of the arena.
        per_byte_s = 1 / quote.fetch_bytes_per_s + 1 / arena.bytes_per_s
        disk = PathCost(quote.fetch_fixed_s, 1 / per_byte_s)
        end = blocks_to_restore(
            move.first,
            (Tier(quote.in_arena, arena), Tier(quote.stored, disk)),
            block_tokens=move.block_tokens,
            block_bytes=self._block_bytes,
            prompt_tokens=move.prompt_tokens,
            speed=move.speed,
        )
        if end < quote.stored:
            self._declined += 1
            if self._declined % TRIED_AGAIN_EVERY:
                self._counters["prefixes_recomputed"] += 1
                self._counters["blocks_recomputed"] += quote.stored - max(end, move.first)
                return end, False
        self._counters["prefixes_fetched"] += 1
        return quote.stored, True
