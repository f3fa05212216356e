"""Which blocks there are, and what their bytes must be: all derived, so nobody has to remember.

Chains come in groups that share a trunk, in three namespaces, so that prefixes fork and equal
tokens must not meet. The arena holds ``ARENA_SHARE`` of all blocks: the evictor never rests.
"""

import itertools
import random
from dataclasses import dataclass

import numpy as np

from pdserve.ids import BLOCK_KEY_BYTES, BlockKey, TicketId
from pdserve.kvstore.keys import block_keys, namespace_digest

BLOCK_BYTES = 4096 + 8  # not a multiple of the alignment
STRIDE_BYTES = -(-BLOCK_BYTES // 64) * 64
NAMESPACES = tuple(namespace_digest(model=f"campaign {number}") for number in range(3))
GROUPS = 21
BRANCHES = 8
TRUNK_BLOCKS = 4
CHAIN_BLOCKS = 15
BLOCK_TOKENS = 4
ARENA_SHARE = 0.05

_WORDS = np.arange(BLOCK_BYTES // 8, dtype=np.uint64)


def bytes_of(name: bytes) -> bytes:
    """A block's bytes, from its key: no eight of them are those of another place or block."""
    low, high = (int.from_bytes(name[start : start + 8], "little") for start in (0, 8))
    return (np.uint64(low) + np.uint64(high | 1) * _WORDS).tobytes()


def tail_bytes(ticket: TicketId) -> bytes:
    """Of a ticket's last block, which has no key."""
    return bytes_of(ticket.encode()[-BLOCK_KEY_BYTES:].rjust(BLOCK_KEY_BYTES, b"."))


def _tokens(group: int, branch: int) -> list[int]:
    trunk = [group * 1000 + index for index in range(TRUNK_BLOCKS * BLOCK_TOKENS)]
    own = (CHAIN_BLOCKS - TRUNK_BLOCKS) * BLOCK_TOKENS
    return trunk + [1_000_000 + branch * 1000 + index for index in range(own)]


@dataclass(frozen=True, slots=True)
class World:
    chains: tuple[tuple[BlockKey, ...], ...]
    contents: dict[BlockKey, bytes]
    parents: dict[BlockKey, BlockKey | None]

    @property
    def slot_count(self) -> int:
        return int(len(self.contents) * ARENA_SHARE)

    def choose(self, chance: random.Random) -> tuple[BlockKey, ...]:
        """A chain's prefix, mostly a long one; few chains are asked for often, most hardly ever."""
        chain = self.chains[int(len(self.chains) * chance.random() ** 4)]
        return chain[: 1 + int(len(chain) * chance.random() ** 0.5)]


def make_world() -> World:
    # Equal tokens in every namespace: keys that forgot it would collide.
    chains = tuple(
        block_keys(NAMESPACES[group % 3], _tokens(group // 3, branch), BLOCK_TOKENS)
        for group, branch in itertools.product(range(GROUPS), range(BRANCHES))
    )
    parents: dict[BlockKey, BlockKey | None] = {}
    for chain in chains:
        parents.update(zip(chain, (None, *chain), strict=False))
    return World(chains, {key: bytes_of(key) for key in parents}, parents)
