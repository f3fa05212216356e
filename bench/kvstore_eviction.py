"""Eviction: hits of a store's core on a trace, beside the least that can be missed.

    python -m bench.kvstore_eviction [--trace FILE ...] [--json FILE]

A trace of Mooncake's format goes through ``StoreCore`` as workers would send it: each prompt claims
its prefix, and stores what it lacks. A hit is a block of the longest prefix that is there.

The *offline optimum* evicts the block whose next use is farthest away (Belady, 1966). A child is
never used without its parent, so what that keeps is closed under prefixes by itself.
"""

import argparse
import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.frame import ROOT, Options, Row, at_least, run
from pdserve.ids import BlockKey
from pdserve.kvstore.eviction import EvictionName
from pdserve.kvstore.replay import Chain, hits_of, read_trace

TRACE = ROOT / "bench/traces/conversation_trace.jsonl"
SLOT_COUNTS = (3_000, 10_000, 30_000)
MEAN_MIN = 0.60
OF_LRU_MIN = 0.98
EVICTIONS: tuple[EvictionName, ...] = ("turns", "lru")


def measure(options: Options) -> Iterator[Row]:
    for trace in options.arguments.trace or [TRACE]:
        chains = [prompt.chain for prompt in read_trace(trace)]
        shares = []
        for slot_count in SLOT_COUNTS:
            best = optimal_hits(chains, slot_count)
            turns, lru = (sum(hits_of(chains, slot_count, name)) for name in EVICTIONS)
            shares.append(turns / best)
            bar = at_least(OF_LRU_MIN)
            yield Row(
                f"{trace.stem}, {slot_count} blocks, hits of the optimum's", turns / best, "",
                reference="LRU", reference_value=lru / best, ratio=turns / lru,
                bar=f"{bar.text('')} × LRU", holds=bar.holds(turns / lru, None),
            )  # fmt: skip
        mean, bar = sum(shares) / len(shares), at_least(MEAN_MIN)
        yield Row(
            f"{trace.stem}, mean", mean, "", bar=bar.text(""), holds=bar.holds(mean, None)
        )  # fmt: skip


def optimal_hits(chains: Sequence[Chain], slot_count: int) -> int:
    never = len(chains)
    next_uses: list[list[int]] = []
    following: dict[BlockKey, int] = {}
    for index in reversed(range(len(chains))):
        next_uses.append([following.get(key, never) for key in chains[index]])
        following.update(dict.fromkeys(chains[index], index))
    next_uses.reverse()
    kept: dict[BlockKey, tuple[int, int]] = {}
    farthest: list[tuple[int, int, BlockKey]] = []  # heap; what is out of date is skipped
    found = 0
    for chain, uses in zip(chains, next_uses, strict=True):
        found += next((depth for depth, key in enumerate(chain) if key not in kept), len(chain))
        for depth, (key, use) in enumerate(zip(chain, uses, strict=True)):
            kept[key] = -use, -depth
            heapq.heappush(farthest, (-use, -depth, key))
        while len(kept) > slot_count:
            use, depth, key = heapq.heappop(farthest)
            if kept.get(key) == (use, depth):
                del kept[key]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, action="append", help="of Mooncake's format")


if __name__ == "__main__":
    run("kvstore_eviction", measure, add_arguments=add_arguments)
