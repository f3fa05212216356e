"""How long an engine's next steps take, all at once: closed forms instead of one event per step.

A *step* gives each of the B running streams one token, and the prompt under way one chunk. Between
two changes of who takes part, the k-th step costs

    streams   fixed + sequence·B + context·(C + B·k)      the context C grows by B every step
    prompt    T(u(k+1)) − T(u(k))                         u(k) of its tokens computed before

whose sums over k = 0 … n−1 are an arithmetic series and a telescope:

    F(n) = n·(fixed + sequence·B + context·C) + context·B·n(n−1)/2 + T(min(u(n), U)) − T(u(0))

so that chunks add up to the prefill's own time, whatever their size. A prefill worker is the case
B = 0, a decode worker the case without a prompt, an aggregated one has both: the costs add up,
less the part of the prompt's that ``overlap`` hides behind the streams'.
"""

import math

from pdserve.clock import S
from pdserve.router.costs import DecodeCost, PrefillCost
from pdserve.simulator.chunks import Chunks


class Pace:
    """F and its inverse, for one set of participants."""

    __slots__ = ("_cached", "_chunks", "_computed", "_first", "_fixed", "_growth", "_pair",
                 "_start", "_token", "_total")  # fmt: skip

    def __init__(
        self, decode: DecodeCost, *, streams: int, context_tokens: int, slow: float
    ) -> None:
        self._first = self._growth = 0.0
        if streams:
            regime = decode.small if streams < decode.large_from else decode.large
            scale = slow * S
            self._first = scale * (
                regime.fixed_s + regime.sequence_s * streams + regime.context_s * context_tokens
            )
            self._growth = scale * regime.context_s * streams
        self._chunks: Chunks | None = None
        self._start = self._fixed = self._token = self._pair = 0.0
        self._computed = self._total = self._cached = 0

    def add_prompt(
        self,
        prefill: PrefillCost,
        *,
        uncached_tokens: int,
        cached_tokens: int,
        computed_tokens: int,
        chunks: Chunks,
        slow: float,
    ) -> None:
        """``computed_tokens`` of the uncached ones are done already."""
        scale = slow * S
        self._chunks = chunks
        self._computed, self._total = computed_tokens, uncached_tokens
        self._cached = cached_tokens
        self._fixed = scale * prefill.fixed_s
        self._token, self._pair = scale * prefill.token_s, scale * prefill.pair_s
        self._start = 0.0
        if computed_tokens:
            pairs = computed_tokens * (computed_tokens + 2 * cached_tokens)
            self._start = self._fixed + self._token * computed_tokens + self._pair * pairs

    def elapsed_ns(self, steps: int) -> float:
        """F(steps)."""
        if not steps:
            return 0.0
        elapsed = steps * (self._first + self._growth * (steps - 1) / 2)
        if self._chunks is not None:
            tokens = self.computed_after(steps)
            pairs = tokens * (tokens + 2 * self._cached)
            elapsed += self._fixed + self._token * tokens + self._pair * pairs - self._start
        return elapsed

    def computed_after(self, steps: int) -> int:
        """How many of the prompt's uncached tokens are computed then."""
        if self._chunks is None:
            return 0
        position = self._cached + self._computed
        return min(self._chunks.after(position, steps) - self._cached, self._total)

    def steps_to(self, computed_tokens: int) -> int:
        """The fewest steps that compute so many of the prompt's uncached tokens."""
        if self._chunks is None:
            return 0
        return self._chunks.steps(self._cached + self._computed, self._cached + computed_tokens)

    def steps_until(self, elapsed_ns: float, least: int, most: int) -> int:
        """The fewest steps, at least ``least``, that take ``elapsed_ns``; ``most`` if none do."""
        low, high = least, most
        if self._chunks is None:  # a quadratic, solved; what rounding may leave is searched
            guess = self._solve(elapsed_ns)
            low, high = max(low, min(guess - 2, high)), max(low, min(guess + 2, high))
        while low < high:
            middle = (low + high) // 2
            if self.elapsed_ns(middle) >= elapsed_ns:
                high = middle
            else:
                low = middle + 1
        return low

    def _solve(self, elapsed_ns: float) -> int:
        """About how many steps of streams alone ``elapsed_ns`` are."""
        linear = self._first - self._growth / 2
        if self._growth * elapsed_ns < 1e-6 * linear * linear:
            return math.ceil(elapsed_ns / self._first)
        root = math.sqrt(linear * linear + 2 * self._growth * elapsed_ns)
        return math.ceil((root - linear) / self._growth)
