"""A worker's device memory in blocks: what prompts hold, what streams may, what is cached."""

from pdserve.ids import BlockKey
from pdserve.messages import Hello
from pdserve.simulator.attempt import Attempt
from pdserve.simulator.batch import Batch
from pdserve.simulator.caches import BlockCache


class Memory:
    def __init__(
        self, hello: Hello, cache: BlockCache, batch: Batch, store: BlockCache | None
    ) -> None:
        """``store``: of its host; None where it keeps nothing."""
        self.batch_blocks = hello.block_count  # what all others leave to the streams
        self._block_tokens = hello.block_tokens
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

    def restore(self, attempt: Attempt) -> int:
        """Tokens of its prefix that the host's store has, beyond the device's cache."""
        if self._store is None:
            return 0
        keys = self.cacheable(attempt)
        own_blocks, store_blocks = self._cache.prefix_blocks(keys), self._store.prefix_blocks(keys)
        if store_blocks <= own_blocks:
            return 0
        self._store.touch(keys[:store_blocks])
        attempt.restored_blocks = store_blocks
        return (store_blocks - own_blocks) * self._block_tokens

    def cacheable(self, attempt: Attempt) -> tuple[BlockKey, ...]:
        """The last token is always computed: its logits are what the first token is drawn from."""
        return attempt.request.block_keys[: (attempt.tokens - 1) // self._block_tokens]

    def publish(self, attempt: Attempt, tokens: int) -> None:
        """The blocks of its first ``tokens`` are a cached prefix now, here and on this host."""
        keys = attempt.request.block_keys[: tokens // self._block_tokens]
        if keys:
            self._cache.touch(keys)
            self.trim_cache()
            if self._store is not None:
                self._store.touch(keys)
