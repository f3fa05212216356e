"""Restore or recompute: how much of a stored prefix to take from the store. Pure.

    total(k) = fetch(first k blocks) + prefill(what follows)        k is what makes it least

A store has a prefix in tiers, one behind the other: its arena, then its disk. Within a tier each
block more costs the same to fetch, and saves a prefill that grows with the context; so ``total``
bends downwards there, its least value lies at a tier's end, and the ends are all that is looked at.
What a path costs its owner measures (``kvstore.path_speed``), what a prefill costs this worker.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.kvstore.path_speed import PathCost

FADE = 0.8
"""Weight of what was known when a step more is measured."""

SURPRISE_MAX = 4.0
"""A step counts for at most so many times what was expected, or for at least that part of it."""


@dataclass(frozen=True, slots=True)
class PrefillSpeed:
    """Of one worker. A token costs ``token_s``, and as much again per ``context_tokens`` before it:
    it attends to all of them."""

    token_s: float
    context_tokens: float

    def time_s(self, start: int, end: int) -> float:
        """Of the tokens from ``start`` up to ``end``."""
        return self.token_s * work_tokens(start, end, self.context_tokens)


def work_tokens(start: int, end: int, context_tokens: float) -> float:
    """How many first tokens of a prompt are as much work as these."""
    return (end - start) + (end * end - start * start) / (2 * context_tokens)


class PrefillMeter:
    """Learns a worker's speed from its steps, whatever else is computed in them."""

    def __init__(self, context_tokens: float) -> None:
        assert context_tokens > 0
        self._context_tokens = context_tokens
        self._token_s: float | None = None

    @property
    def speed(self) -> PrefillSpeed | None:
        """None before the first step."""
        if self._token_s is None:
            return None
        return PrefillSpeed(self._token_s, self._context_tokens)

    def observe(self, stretches: Sequence[tuple[int, int]], elapsed_us: int) -> None:
        """A step computed these stretches of prompts, each from a token up to another."""
        work = sum(work_tokens(start, end, self._context_tokens) for start, end in stretches)
        token_s = max(elapsed_us, 1) / 1e6 / work
        if self._token_s is not None:
            known_s = self._token_s
            token_s = min(max(token_s, known_s / SURPRISE_MAX), known_s * SURPRISE_MAX)
            token_s = FADE * known_s + (1 - FADE) * token_s
        self._token_s = token_s


@dataclass(frozen=True, slots=True)
class Tier:
    """Where a stored prefix goes on up to block ``end``, and what it takes to get it from there."""

    end: int
    cost: PathCost


def blocks_to_restore(
    first: int,
    tiers: Sequence[Tier],
    *,
    block_tokens: int,
    block_bytes: int,
    prompt_tokens: int,
    speed: PrefillSpeed,
) -> int:
    """How many leading blocks to have before the rest is computed; ``first`` are here already.

    ``tiers`` in the order of the prefix. Of equals the longest, which leaves the worker free.
    """

    def prefill_s(blocks: int) -> float:
        return speed.time_s(min(blocks * block_tokens, prompt_tokens), prompt_tokens)

    best, best_s = first, prefill_s(first)
    begin, fetch_s = first, 0.0
    for tier in tiers:
        fetch_s += tier.cost.time_s(max(0, tier.end - begin) * block_bytes)
        begin = max(begin, tier.end)
        total_s = fetch_s + prefill_s(begin)
        if total_s <= best_s:
            best, best_s = begin, total_s
    return best
