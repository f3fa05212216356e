"""A trace of prompts, played on a store: by block hashes, as workers would send them.

A trace has one JSON object per line, in Mooncake's format: ``timestamp`` in ms, and ``hash_ids``,
the blocks of the prompt. Each prompt claims its prefix and stores what it lacks. A hit is a block
of the longest prefix that is there.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.clock import MS
from pdserve.errors import ConfigError
from pdserve.ids import BLOCK_KEY_BYTES, BlockKey
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.eviction import EvictionName

Chain = tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class TracedPrompt:
    at_ns: int
    chain: Chain


def read_trace(trace: Path) -> list[TracedPrompt]:
    """Those with blocks. Raises ConfigError for a line that is none."""
    prompts = []
    try:
        text = trace.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read {trace}: {error.strerror}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            fields = json.loads(line)
            chain = tuple(_key(block) for block in fields["hash_ids"])
            at_ns = round(fields["timestamp"] * MS)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ConfigError(
                f"line {number} of {trace} needs timestamp and hash_ids, whole numbers: {error!r}"
            ) from error
        if chain:
            prompts.append(TracedPrompt(at_ns, chain))
    return prompts


def _key(block: int) -> BlockKey:
    # From 1: no block is called by zeros alone, which a slot's header takes for no key.
    return BlockKey((block + 1).to_bytes(BLOCK_KEY_BYTES, "big"))


def hits_of(
    chains: Iterable[Sequence[BlockKey]], slot_count: int, eviction: EvictionName
) -> Iterator[int]:
    """By prompt, how many blocks a store's own core finds: what a node of that size delivers to one
    worker that does one thing after the other."""
    core = StoreCore(slot_count, eviction=eviction)
    owner = core.connect("worker")
    for chain in chains:
        claim = core.claim(owner, chain)
        yield len(claim.slots)
        core.release(owner, claim.claim)
        write = core.reserve(owner, chain, 0)
        for position in range(len(write.slots)):
            core.filled(owner, write.write, position, 0)
        if write.write:
            core.commit(owner, write.write)
