"""A worker's device memory in blocks: what prompts hold, what streams may, what is cached."""

from collections.abc import Hashable, Sequence

from pdserve.clock import S
from pdserve.messages import Hello
from pdserve.router.costs import CostModel
from pdserve.simulator.attempt import Attempt
from pdserve.simulator.batch import Batch
from pdserve.simulator.caches import BlockCache, Blocks
from pdserve.simulator.stores import HostStore


class Memory:
    def __init__(
        self,
        hello: Hello,
        costs: CostModel,
        cache: BlockCache,
        batch: Batch,
        store: HostStore | None,
    ) -> None:
        """``store``: of its host; None where it keeps nothing."""
        self.batch_blocks = hello.block_count  # what all others leave to the streams
        self._block_tokens = hello.block_tokens
        self._costs = costs
        self._store = store
        self._cache = cache
        self._batch = batch

    def has_room(self, blocks: int) -> bool:
        room = self.batch_blocks - blocks
        return self._batch.used_blocks_max() <= room or self._batch.used_blocks() <= room

    def take(self, attempt: Attempt, blocks: int) -> None:
        attempt.blocks = blocks
        self.batch_blocks -= blocks
        self.trim_cache()

    def give_back(self, attempt: Attempt) -> None:
        self.batch_blocks += attempt.blocks
        attempt.blocks = 0

    def trim_cache(self) -> None:
        """Idle blocks stay while nobody needs their room."""
        if self._cache.block_max is None:
            return
        if len(self._cache) + self._batch.used_blocks_max() > self.batch_blocks:
            self._cache.trim(max(0, self.batch_blocks - self._batch.used_blocks()))

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)  # ceil

    def restore(self, attempt: Attempt, known_tokens: int | None, slow: float) -> int:
        """Nanoseconds until what stores have of its prefix, beyond the device's cache, is here.

        Args:
            known_tokens: of its prefix, that the router knew of anywhere; None: it may know less
                than there is.
            slow: how many times as long as it should computing takes here.
        """
        if self._store is None:
            return 0
        keys = self.cacheable(attempt)
        cached_blocks = self._cache.prefix_blocks(keys)
        blocks, restoring_ns = self._from_own_store(attempt, keys, cached_blocks, slow)
        if blocks > cached_blocks:
            self._store.found(keys[:blocks])
            attempt.restored_blocks = blocks
        known_blocks = len(keys) if known_tokens is None else known_tokens // self._block_tokens
        if max(blocks, cached_blocks) < known_blocks and self._store.fetches:
            restoring_ns += self._fetch(attempt, keys, max(blocks, cached_blocks), slow)
        return restoring_ns

    def _from_own_store(
        self, attempt: Attempt, keys: Sequence[Hashable], cached_blocks: int, slow: float
    ) -> tuple[int, int]:
        """How many leading blocks to have from there, and the nanoseconds that they take.

        What is in memory is taken, as by live workers (``engine.restorer``), which weigh it all
        only where some is on the disk.
        """
        assert self._store is not None
        size, costs = self._block_tokens, self._costs
        blocks = near_blocks = self._store.memory_blocks(keys)
        if self._store.has_disk:
            blocks = self._store.prefix_blocks(keys)
        near_ns = 0
        if near_blocks > cached_blocks:
            near_ns = costs.host_ns((near_blocks - cached_blocks) * size)
        first = max(near_blocks, cached_blocks)
        if blocks <= first:
            return near_blocks, near_ns
        far_ns = near_ns + self._disk_ns((blocks - first) * size)
        begins = ((cached_blocks, 0), (first, near_ns), (blocks, far_ns))
        totals_ns = [
            fetch_ns + slow * costs.prefill_ns(attempt.tokens - begin * size, begin * size)
            for begin, fetch_ns in begins
        ]
        best = min(range(len(begins)), key=lambda i: (totals_ns[i], -i))
        return begins[best]

    def _disk_ns(self, tokens: int) -> int:
        """By way of the store's memory."""
        passing_s = tokens * self._costs.kv_token_bytes / self._costs.host.bytes_per_s
        return self._costs.ssd_ns(tokens) + round(passing_s * S)

    def ahead_ns(self, keys: Sequence[Hashable]) -> int:
        """Nanoseconds until what the disk has of a prompt that waits has come up."""
        if self._store is None:
            return 0
        blocks = self._store.prefix_blocks(keys) - self._store.memory_blocks(keys)
        return self._costs.ssd_ns(blocks * self._block_tokens) if blocks else 0

    def come_up(self, _now_ns: int, keys: Sequence[Hashable]) -> None:
        """What the disk still has of them is in memory now."""
        if self._store is not None:
            self._store.found(keys[: self._store.prefix_blocks(keys)])

    def _fetch(
        self, attempt: Attempt, keys: Sequence[Hashable], own_blocks: int, slow: float
    ) -> int:
        """Nanoseconds that the blocks after its own take from another host; 0: none has more, or
        computing them is sooner."""
        assert self._store is not None
        blocks = self._store.blocks_elsewhere(keys)
        if blocks <= own_blocks:
            return 0
        costs, size, tokens = self._costs, self._block_tokens, attempt.tokens
        saved_ns = costs.prefill_ns(tokens - own_blocks * size, own_blocks * size)
        saved_ns -= costs.prefill_ns(tokens - blocks * size, blocks * size)
        fetch_ns = costs.fetch_ns((blocks - own_blocks) * size, saved_ns * slow)
        if fetch_ns is None:
            return 0
        attempt.restored_blocks = blocks
        return fetch_ns

    def begun_blocks(self, attempt: Attempt, keys: Sequence[Hashable]) -> int:
        """How many leading blocks it has when its prefill begins. ``keys``: what is cacheable."""
        if not keys:
            return attempt.job.kept_blocks
        return max(self._cache.prefix_blocks(keys), attempt.restored_blocks)

    def cacheable(self, attempt: Attempt) -> Blocks:
        """The last token is always computed: its logits are what the first token is drawn from."""
        return attempt.request.block_keys[: (attempt.tokens - 1) // self._block_tokens]

    def publish(self, attempt: Attempt, tokens: int) -> None:
        """The blocks of its first ``tokens`` are a cached prefix now, here and on this host."""
        keys = attempt.request.block_keys[: tokens // self._block_tokens]
        if keys:
            self._cache.touch(keys)
            self.trim_cache()
            if self._store is not None:
                self._store.stored(keys)
