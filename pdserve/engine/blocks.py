"""KV blocks of one worker's device pool: who holds which, and which hold a cached prefix.

A *block* holds the keys and values of ``block_tokens`` consecutive tokens, all layers together.
Integers only; no tensor is touched here.

A block is in one of three places:

    free   nobody holds it and its bytes mean nothing
    held   by one or more sequences or moves; perhaps published under a key
    idle   nobody holds it, but its key is published: whoever asks for the key gets it back, and
           whoever needs a block may have it, least recently released first

A sequence releases its last block first, so of a chain the leaf is given away before its parents,
and a lookup by prefix keeps finding what is left. Publishing a key that another block has already
changes nothing: the second block stays private.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from pdserve.errors import OutOfBlocks
from pdserve.ids import BlockId, BlockKey

RETRY_AFTER_MS = 50

CHANGES_AT_ONCE = 4096
"""Keys told in one report: who hears of a whole pool hears of it piece by piece."""


class BlockPool:
    """A fixed set of blocks, each free, held or idle.

    Invariants, asserted by ``check``:
        free, idle and held are disjoint and together every block;
        idle blocks are published; free blocks are not;
        key → block and block → key are inverse.
    """

    def __init__(self, block_count: int) -> None:
        assert block_count > 0
        self.block_count = block_count
        self._holders = [0] * block_count
        self._free = deque(BlockId(i) for i in range(block_count))
        self._idle: OrderedDict[BlockId, None] = OrderedDict()  # least recently released first
        self._block_of: dict[BlockKey, BlockId] = {}
        self._key_of: dict[BlockId, BlockKey] = {}
        # What changed since ``take_changes``: True is added, False removed. At most one entry
        # per key that was or is published, so the pool bounds it.
        self._changes: dict[BlockKey, bool] = {}

    @property
    def free_count(self) -> int:
        """Blocks that ``take`` can give: free and idle ones."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[BlockId]:
        """``count`` blocks, each with one holder, forgetting idle ones as needed. All or nothing.

        Raises:
            OutOfBlocks: fewer are free or idle; the pool is unchanged.
        """
        if count > self.free_count:
            raise OutOfBlocks(count, self.free_count, retry_after_ms=RETRY_AFTER_MS)
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _none = self._idle.popitem(last=False)
                self._unpublish(block)
            assert self._holders[block] == 0
            self._holders[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[BlockId]) -> None:
        """One more holder for each block; each must be held already."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is not held, it cannot be shared"
            self._holders[block] += 1

    def release(self, blocks: Sequence[BlockId]) -> None:
        """One holder fewer for each block of a chain; its last block is given away first."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} released more often than taken"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def published(self, keys: Sequence[BlockKey]) -> int:
        """How many of ``keys``, from the first, are published."""
        count = 0
        while count < len(keys) and keys[count] in self._block_of:
            count += 1
        return count

    def hold_published(self, keys: Sequence[BlockKey]) -> list[BlockId]:
        """The blocks of the longest published prefix of ``keys``, with one more holder each."""
        blocks = [self._block_of[key] for key in keys[: self.published(keys)]]
        for block in blocks:
            self._idle.pop(block, None)
            self._holders[block] += 1
        return blocks

    def publish(self, key: BlockKey, block: BlockId) -> None:
        """From now on ``key`` finds ``block``, whose bytes are complete and change no more."""
        assert self._holders[block] > 0, f"block {block} is not held, it cannot be published"
        if key in self._block_of:
            return
        assert block not in self._key_of, f"block {block} is published under another key"
        self._block_of[key] = block
        self._key_of[block] = key
        self._note(key, added=True)

    def private_count(self, blocks: Iterable[BlockId]) -> int:
        """How many of ``blocks`` become available when they are released, each as often as it is
        named."""
        return sum(self._holders[block] == times for block, times in Counter(blocks).items())

    def take_changes(self) -> tuple[tuple[BlockKey, ...], tuple[BlockKey, ...]]:
        """Keys published and keys forgotten that no call has told yet, the first
        ``CHANGES_AT_ONCE`` of them; none that came and went."""
        if not self._changes:
            return (), ()
        told = dict(islice(self._changes.items(), CHANGES_AT_ONCE))
        for key in told:
            del self._changes[key]
        added = tuple(key for key, came in told.items() if came)
        removed = tuple(key for key, came in told.items() if not came)
        return added, removed

    @property
    def has_changes(self) -> bool:
        return bool(self._changes)

    def tell_anew(self) -> None:
        """From now on the changes are those to a pool in which nothing was published."""
        self._changes = dict.fromkeys(self._block_of, True)

    def check(self) -> None:
        """Assert the invariants. Linear in the pool; for tests and for idle moments."""
        free, idle = set(self._free), set(self._idle)
        held = {block for block, holders in enumerate(self._holders) if holders > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & idle
        assert not (free | idle) & held
        assert len(free) + len(idle) + len(held) == self.block_count
        assert idle <= set(self._key_of)
        assert not free & set(self._key_of)
        assert {block: key for key, block in self._block_of.items()} == self._key_of

    def _unpublish(self, block: BlockId) -> None:
        key = self._key_of.pop(block)
        del self._block_of[key]
        self._note(key, added=False)

    def _note(self, key: BlockKey, *, added: bool) -> None:
        if self._changes.pop(key, added) == added:
            self._changes[key] = added


@dataclass(slots=True)
class BlockTable:
    """Where one sequence's tokens live: token ``t`` is in block ``blocks[t // block_tokens]``."""

    block_tokens: int
    blocks: list[BlockId] = field(default_factory=list)

    def blocks_needed(self, token_count: int) -> int:
        """How many blocks must be added before ``token_count`` tokens fit; negative: to spare."""
        return blocks_for(token_count, self.block_tokens) - len(self.blocks)


def blocks_for(token_count: int, block_tokens: int) -> int:
    """Blocks that ``token_count`` tokens fill, the last perhaps not wholly."""
    return -(-token_count // block_tokens)  # ceil
