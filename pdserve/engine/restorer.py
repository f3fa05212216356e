"""Carries a ``Restore`` out: asks the store what a prefix would take, and gets what pays.

Where this host's store ends and another one goes on, what that one has is priced like a tier below.

A disk that was slow once would never be asked again, and never be known to be fast: every
``TRIED_AGAIN_EVERY``-th prefix is taken from it though computing seems to be sooner. So it is with
other hosts.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pdserve.clock import Clock, S
from pdserve.engine.moves import Restore
from pdserve.engine.restoring import Tier, blocks_to_restore
from pdserve.errors import BlockMissing, ChecksumMismatch
from pdserve.ids import BlockKey
from pdserve.kvstore.path_speed import PathCost, PathSpeed

log = logging.getLogger(__name__)

TRIED_AGAIN_EVERY = 16

BELIEVED = PathCost(fixed_s=0.0005, bytes_per_s=4e9)
"""Of the way from the arena into the pool, before anything has taken it."""

FAR_BELIEVED = PathCost(fixed_s=0.002, bytes_per_s=500e6)
"""Of the way from another host."""

FAR_DEADLINE_S = 5.0
"""For all of a prefix from other hosts, fail-over included; what is not there then is computed."""

COUNTERS = (
    "prefixes_fetched",  # that a disk had more of, and it came from there
    "prefixes_recomputed",  # the same, but computing was predicted to be sooner
    "blocks_recomputed",  # of those, blocks that were stored
)


class Remote(Protocol):
    """What is needed of ``kvstore.locations.RemotePrefixes``."""

    @property
    def counters(self) -> Mapping[str, int]: ...
    def count(self, keys: Sequence[BlockKey]) -> int: ...
    def fetch(
        self,
        keys: Sequence[BlockKey],
        first: int,
        end: int,
        take: Callable[[int, memoryview], None],
        *,
        block_bytes: int,
        deadline_s: float,
    ) -> int: ...
    def close(self) -> None: ...


class Target(Protocol):
    """What is needed of ``model.pool.KvPool``."""

    @property
    def block_bytes(self) -> int: ...
    def write_block(self, block: int, data: memoryview) -> None: ...
    def writing(self) -> AbstractContextManager[None]: ...


class Restorer:
    def __init__(
        self,
        pool: Target,
        counters: Counter[str],
        clock: Clock,
        remote: Remote | None = None,
    ) -> None:
        self._remote = remote
        self._far_speed = PathSpeed(FAR_BELIEVED)
        self._far_declined = 0
        self._pool = pool
        self._block_bytes = pool.block_bytes
        self._counters = counters
        self._clock = clock
        self._arena_speed = PathSpeed(BELIEVED)
        self._declined = 0
        counters.update(dict.fromkeys(COUNTERS, 0))

    def restore(self, store: Any, move: Restore) -> int:
        """The number of blocks restored. A bad or missing one ends the prefix there; what follows
        is recomputed, or another host's is as good."""
        count = self._restore_near(store, move)
        if self._remote is not None and move.first + count < len(move.keys):
            count += self._restore_far(self._remote, move, move.first + count)
        return count

    def _restore_far(self, remote: Remote, move: Restore, first: int) -> int:
        """From ``move.keys[first]`` on."""
        end = len(move.keys)
        if not self._pays_far(move, first, end):  # not even all of it: nobody need be asked
            return 0
        known = min(remote.count(move.keys), end)
        if known <= first or (known < end and not self._pays_far(move, first, known)):
            return 0
        end = known
        began_ns = self._clock()
        count = remote.fetch(
            move.keys,
            first,
            end,
            lambda index, data: self._pool.write_block(move.blocks[index - move.first], data),
            block_bytes=self._block_bytes,
            deadline_s=FAR_DEADLINE_S,
        )
        if count:
            self._far_speed.observe(count * self._block_bytes, (self._clock() - began_ns) / S)
        return count

    def _pays_far(self, move: Restore, first: int, end: int) -> bool:
        if move.speed is None:
            return True
        wanted = blocks_to_restore(
            first,
            (Tier(end, self._far_speed.cost),),
            block_tokens=move.block_tokens,
            block_bytes=self._block_bytes,
            prompt_tokens=move.prompt_tokens,
            speed=move.speed,
        )
        if wanted == end:
            return True
        self._far_declined += 1
        return self._far_declined % TRIED_AGAIN_EVERY == 0

    def _restore_near(self, store: Any, move: Restore) -> int:
        end, fetch = self._wanted(store, move)
        if end <= move.first:
            return 0
        claim = store.claim(move.keys, fetch=fetch, tenant=move.tenant)
        end = min(end, claim.count)
        began_ns = self._clock()
        count = 0

        def take(position: int, data: memoryview) -> None:
            nonlocal count
            self._pool.write_block(move.blocks[position], data)
            count += 1

        try:
            with self._pool.writing():
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
