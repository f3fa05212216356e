"""What things cost: predicted times of a prefill, a decode step and a move of KV blocks.

    prefill   fixed + token · U + pair · U · (U + 2H)      U uncached tokens after H cached ones
    decode    fixed + context · Σ context + sequence · B   one step of B sequences, in two regimes
    move      fixed + bytes / bandwidth                    per tier: other host, host memory, SSD

The pair term is attention: each new token looks at all before it. Three terms per operation, fitted
with relative errors (``fitting``), describe a worker to a few per cent; what a worker's speed
drifts by afterwards is a factor per worker, learned from its reports (``Correction``).

Source: the three-term models are those of DistServe's simulator (OSDI '24), extended by cached
tokens.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal

from pdserve.clock import S

Origin = Literal["measured", "analytic", "believed"]

SLOWEST: Final = 2.0
FASTEST: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCost:
    """Seconds of one prefill alone on one worker."""

    fixed_s: float
    token_s: float
    pair_s: float = 0.0

    def time_ns(self, uncached_tokens: int, cached_tokens: int = 0) -> int:
        pairs = uncached_tokens * (uncached_tokens + 2 * cached_tokens)
        seconds = self.fixed_s + self.token_s * uncached_tokens + self.pair_s * pairs
        return round(seconds * S)

    def slowed(self, factor: float) -> "PrefillCost":
        return PrefillCost(
            fixed_s=factor * self.fixed_s,
            token_s=factor * self.token_s,
            pair_s=factor * self.pair_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of one decode step."""

    fixed_s: float
    context_s: float  # per token of context, summed over the batch
    sequence_s: float

    def time_ns(self, sequences: int, context_tokens: int) -> int:
        seconds = self.fixed_s + self.context_s * context_tokens + self.sequence_s * sequences
        return round(seconds * S)

    def slowed(self, factor: float) -> "StepCost":
        return StepCost(
            fixed_s=factor * self.fixed_s,
            context_s=factor * self.context_s,
            sequence_s=factor * self.sequence_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCost:
    """Decode steps of small batches, and of those with at least ``large_from`` sequences."""

    small: StepCost
    large: StepCost
    large_from: int = 1 << 30

    def step_ns(self, sequences: int, context_tokens: int) -> int:
        regime = self.small if sequences < self.large_from else self.large
        return regime.time_ns(sequences, context_tokens)

    def slowed(self, factor: float) -> "DecodeCost":
        small, large = self.small.slowed(factor), self.large.slowed(factor)
        return DecodeCost(small=small, large=large, large_from=self.large_from)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCost:
    """Seconds of moving bytes over one path, alone on it."""

    fixed_s: float
    bytes_per_s: float

    def time_ns(self, moved_bytes: int) -> int:
        return round((self.fixed_s + moved_bytes / self.bytes_per_s) * S)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """One deployment: a model on a kind of worker."""

    name: str
    origin: Origin
    prefill: PrefillCost
    decode: DecodeCost
    handoff: MoveCost  # between the stores of two hosts
    host: MoveCost  # between a worker's memory and its host's arena
    ssd: MoveCost
    kv_token_bytes: int

    def prefill_ns(self, uncached_tokens: int, cached_tokens: int = 0) -> int:
        return self.prefill.time_ns(uncached_tokens, cached_tokens)

    def chunk_ns(self, tokens: int, before: int, *, is_first: bool) -> int:
        """Of so many tokens of a prefill, after ``before``. The whole of it is predicted as one, so
        what is fixed counts with its first chunk; the others are what they add."""
        chunk_ns = self.prefill_ns(tokens, before)
        return chunk_ns if is_first else max(1, chunk_ns - self.prefill_ns(0))

    def slowed(self, *, prefill: float, decode: float) -> "CostModel":
        """Prefills and decode steps take so many times as long."""
        return replace(
            self, prefill=self.prefill.slowed(prefill), decode=self.decode.slowed(decode)
        )

    def handoff_ns(self, tokens: int) -> int:
        """Of the KV of so many tokens, from one host's store to another's."""
        return self.handoff.time_ns(tokens * self.kv_token_bytes)

    def host_ns(self, tokens: int) -> int:
        """Of the KV of so many tokens, between a worker's memory and its host's store."""
        return self.host.time_ns(tokens * self.kv_token_bytes)

    def ssd_ns(self, tokens: int) -> int:
        """Of the KV of so many tokens, between a host's store and the disk below it."""
        return self.ssd.time_ns(tokens * self.kv_token_bytes)

    def fetch_ns(self, tokens: int, compute_ns: float) -> int | None:
        """Of cached tokens that another host has; None where computing them, which takes
        ``compute_ns``, is sooner. Of equals it is a fetch, as in workers, which leaves them free.
        """
        fetch_ns = self.handoff_ns(tokens)
        return fetch_ns if fetch_ns <= compute_ns else None


def believed(prefill_tokens_per_s: int) -> CostModel:
    """What is taken to hold where nothing has been measured: a rate, and guesses of a laptop."""
    step = StepCost(fixed_s=0.010, context_s=1e-7, sequence_s=0.001)
    return CostModel(
        name="believed",
        origin="believed",
        prefill=PrefillCost(fixed_s=0.0, token_s=1 / prefill_tokens_per_s),
        decode=DecodeCost(small=step, large=step),
        handoff=MoveCost(fixed_s=0.001, bytes_per_s=1e9),
        host=MoveCost(fixed_s=0.0005, bytes_per_s=4e9),
        ssd=MoveCost(fixed_s=0.002, bytes_per_s=1e9),
        kv_token_bytes=23_040,
    )


class Correction:
    """How much slower than predicted a worker is: measured over predicted time, fading.

    A quotient of two sums, so that long measurements count for more than short ones. Bounded, since
    one odd measurement must not send everything elsewhere; unless the model is a mere belief.
    """

    __slots__ = ("_bounded", "_measured_s", "_memory_s", "_predicted_s")

    def __init__(
        self, *, bounded: bool = True, prior_s: float = 0.25, memory_s: float = 8.0
    ) -> None:
        """``prior_s`` of measurements outweigh the model, about ``memory_s`` are remembered."""
        self._bounded = bounded
        self._memory_s = memory_s
        self._measured_s = self._predicted_s = prior_s

    def observe(self, predicted_ns: int, measured_ns: int) -> None:
        assert predicted_ns > 0
        assert measured_ns > 0
        predicted_s = predicted_ns / S
        fade = max(0.0, 1 - predicted_s / self._memory_s)
        self._predicted_s = self._predicted_s * fade + predicted_s
        self._measured_s = self._measured_s * fade + measured_ns / S

    @property
    def factor(self) -> float:
        factor = self._measured_s / self._predicted_s
        return min(SLOWEST, max(FASTEST, factor)) if self._bounded else factor
