"""Placement on arrival: which prefill worker a prompt waits at, by the rules of others.

We bind late (``placement``); these are what that is compared with. All of them are exact about what
was bound until now, and about what of the prompt is cached where: each gets its own cache
awareness, or its source's. ``Stale`` takes the exactness away, for systems whose loads arrive with
a delay.

Ties go to the lower id. Chance is a hash of the request's id, so that replays are identical.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol

from pdserve.clock import S
from pdserve.ids import RequestId, WorkerId
from pdserve.router.costs import CostModel

MOONCAKE_BALANCING_RATIO = 2.0
"""Prefixes elsewhere that are so many times longer are fetched. Set by hand in the paper as well,
which does not say to what."""

DYNAMO_BLOCK_TOKENS = 16

PREBLE_WINDOW_NS = 180 * S
PREBLE_WINDOW_MAX = 1 << 16
"""Bindings remembered; the oldest is forgotten before its time when there are more."""

PREBLE_IMBALANCE_RATIO = 1.5
PREBLE_IMBALANCE_LEAST = 50
"""Bindings in the window before a ratio of loads means anything."""

RATE_SAMPLE_TOKENS = 1024
"""The length of prefill whose rate turns queued time into queued tokens."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One prefill worker in the eyes of one request, at arrival."""

    worker: WorkerId
    queued_requests: int  # bound to it or running there
    queued_work_ns: int  # of those, what is left, predicted
    uncached_tokens: int  # of this request, there
    cached_tokens: int
    work_ns: int  # its prefill there
    active_decode_blocks: int

    @property
    def done_ns(self) -> int:
        """Until the request would be done there, if nobody overtook."""
        return self.queued_work_ns + self.work_ns


class Binding(Protocol):
    def choose(self, request: RequestId, candidates: Sequence[Candidate], now_ns: int) -> WorkerId:
        """One of the candidates, of which there is at least one."""
        ...


def binding_of(
    name: str, costs: CostModel, *, stale_ns: int = 0, block_tokens: int = DYNAMO_BLOCK_TOKENS
) -> Binding | None:
    """The placement of that name, or None for ``late``, which is none on arrival.

    Args:
        stale_ns: how old the loads may be that it sees; 0: never.
        block_tokens: of a KV block, where blocks are compared with tokens.
    """
    if name == "late":
        return None
    tokens = TokenCosts(costs, block_tokens)
    bindings: Mapping[str, Callable[[], Binding]] = {
        "random": Random,
        "round_robin": RoundRobin,
        "least_requests": lambda: Least(lambda candidate: candidate.queued_requests),
        "least_work": lambda: Least(lambda candidate: candidate.done_ns),
        "two_choices": TwoChoices,
        "mooncake": lambda: Mooncake(costs),
        "dynamo": lambda: Least(tokens.dynamo),
        "lmetric": lambda: Least(tokens.lmetric),
        "preble": Preble,
    }
    binding = bindings[name]()
    return Stale(binding, stale_ns) if stale_ns else binding


# ── without looking at the prompt ────────────────────────────────────────────────────────────────


class Random:
    def choose(self, request: RequestId, candidates: Sequence[Candidate], now_ns: int) -> WorkerId:
        workers = sorted(candidate.worker for candidate in candidates)
        return workers[_draw(request, 0) % len(workers)]


class RoundRobin:
    """The next id after the last one chosen; workers may come and go in between."""

    def __init__(self) -> None:
        self._last = WorkerId("")

    def choose(self, request: RequestId, candidates: Sequence[Candidate], now_ns: int) -> WorkerId:
        workers = [candidate.worker for candidate in candidates]
        later = [worker for worker in workers if worker > self._last]
        self._last = min(later or workers)
        return self._last


# ── by predicted time ────────────────────────────────────────────────────────────────────────────


class Least:
    """The least cost of those that depend on one candidate alone."""

    def __init__(self, cost: Callable[[Candidate], float]) -> None:
        self._cost = cost

    def choose(self, request: RequestId, candidates: Sequence[Candidate], now_ns: int) -> WorkerId:
        return _least(candidates, self._cost)


class TwoChoices:
    """The better of two drawn ones (Mitzenmacher, 2001), by when it would be done."""

    def choose(self, request: RequestId, candidates: Sequence[Candidate], now_ns: int) -> WorkerId:
        ordered = sorted(candidates, key=lambda candidate: candidate.worker)
        first = ordered.pop(_draw(request, 0) % len(ordered))
        second = ordered[_draw(request, 1) % len(ordered)] if ordered else first
        return _least((first, second), lambda candidate: candidate.done_ns)


class Mooncake:
    """Least predicted TTFT: fetch + queue + prefill, where a much longer prefix is fetched.

    Replication of hot blocks is a consequence of fetching, as it is there.

    Source: Qin et al., "Mooncake", arXiv:2407.00079, Algorithm 1.
    """

    def __init__(self, costs: CostModel, balancing_ratio: float = MOONCAKE_BALANCING_RATIO) -> None:
        self._costs = costs
        self._balancing_ratio = balancing_ratio

    def choose(self, request: RequestId, candidates: Sequence[Candidate], now_ns: int) -> WorkerId:
        best_tokens = max(candidate.cached_tokens for candidate in candidates)
        return _least(candidates, lambda candidate: self._ttft_ns(candidate, best_tokens))

    def _ttft_ns(self, candidate: Candidate, best_tokens: int) -> int:
        if best_tokens <= self._balancing_ratio * candidate.cached_tokens:
            return candidate.done_ns
        fetched_tokens = best_tokens - candidate.cached_tokens
        fetch_ns = self._costs.handoff_ns(fetched_tokens)
        work_ns = self._costs.prefill_ns(candidate.uncached_tokens - fetched_tokens, best_tokens)
        return fetch_ns + candidate.queued_work_ns + work_ns


# ── by tokens and blocks ─────────────────────────────────────────────────────────────────────────


class TokenCosts:
    """Costs that count tokens: those queued are taken from the time they are predicted to take."""

    def __init__(self, costs: CostModel, block_tokens: int) -> None:
        assert block_tokens > 0
        self._tokens_per_ns = RATE_SAMPLE_TOKENS / costs.prefill_ns(RATE_SAMPLE_TOKENS)
        self._block_tokens = block_tokens

    def dynamo(self, candidate: Candidate) -> float:
        """Prefill load in blocks, less the overlap, plus active decode blocks.

        With the weights it ships (all 1) and temperature 0. Overlap is credited for device memory
        alone, which is what a candidate knows of. In its disaggregated mode decode blocks do not
        count for prefill workers: then a candidate has none.

        Source: NVIDIA Dynamo, routing concepts, v1.2.
        """
        return self._tokens(candidate) / self._block_tokens + candidate.active_decode_blocks

    def lmetric(self, candidate: Candidate) -> float:
        """Tokens to prefill times requests there, both with this one (arXiv:2603.15202)."""
        return self._tokens(candidate) * (candidate.queued_requests + 1)

    def _tokens(self, candidate: Candidate) -> float:
        return candidate.queued_work_ns * self._tokens_per_ns + candidate.uncached_tokens


@dataclass(frozen=True, slots=True)
class _Bound:
    at_ns: int
    worker: WorkerId
    work_ns: int


class Preble:
    """E2: exploit the longest cached prefix where it is more than half of the prompt, else explore.

    Exploring takes the least load: the prefill work bound there in the last three minutes, with
    this one. A worker whose load is far above the least gives its prefixes away: what would exploit
    it explores. The eviction term of the paper is left out, a candidate knows of no evictions.

    Source: Srivatsa et al., "Preble", arXiv:2407.00023, section 3, and its code for the threshold.
    """

    def __init__(self) -> None:
        self._window: deque[_Bound] = deque()
        self._loads_ns: Counter[WorkerId] = Counter()

    def choose(self, request: RequestId, candidates: Sequence[Candidate], now_ns: int) -> WorkerId:
        self._forget_until(now_ns - PREBLE_WINDOW_NS)
        chosen = self._exploited(candidates) or self._explored(candidates)
        self._window.append(_Bound(now_ns, chosen.worker, chosen.work_ns))
        self._loads_ns[chosen.worker] += chosen.work_ns
        return chosen.worker

    def _exploited(self, candidates: Sequence[Candidate]) -> Candidate | None:
        longest = max(candidate.cached_tokens for candidate in candidates)
        holders = [c for c in candidates if c.cached_tokens == longest]
        best = min(holders, key=lambda c: (self._loads_ns[c.worker], c.worker))
        if best.cached_tokens <= best.uncached_tokens:
            return None
        least_ns = min(self._loads_ns[candidate.worker] for candidate in candidates)
        is_overloaded = (
            len(self._window) >= PREBLE_IMBALANCE_LEAST
            and self._loads_ns[best.worker] > PREBLE_IMBALANCE_RATIO * least_ns
        )
        return None if is_overloaded else best

    def _explored(self, candidates: Sequence[Candidate]) -> Candidate:
        return min(candidates, key=lambda c: (self._loads_ns[c.worker] + c.work_ns, c.worker))

    def _forget_until(self, until_ns: int) -> None:
        window = self._window
        while window and (window[0].at_ns < until_ns or len(window) >= PREBLE_WINDOW_MAX):
            bound = window.popleft()
            self._loads_ns[bound.worker] -= bound.work_ns
            if self._loads_ns[bound.worker] == 0:
                del self._loads_ns[bound.worker]


# ── late news ────────────────────────────────────────────────────────────────────────────────────


class Stale:
    """Another binding that sees loads as they were at the last refresh, up to ``stale_ns`` ago.

    What is cached of the request, and what its prefill would take, it knows at once.
    """

    def __init__(self, binding: Binding, stale_ns: int) -> None:
        assert stale_ns > 0
        self._binding = binding
        self._stale_ns = stale_ns
        self._seen: dict[WorkerId, Candidate] = {}
        self._refreshed_ns: int | None = None

    def choose(self, request: RequestId, candidates: Sequence[Candidate], now_ns: int) -> WorkerId:
        if self._refreshed_ns is None or now_ns - self._refreshed_ns >= self._stale_ns:
            self._refreshed_ns = now_ns
            self._seen = {candidate.worker: candidate for candidate in candidates}
        return self._binding.choose(request, [self._as_seen(c) for c in candidates], now_ns)

    def _as_seen(self, candidate: Candidate) -> Candidate:
        seen = self._seen.setdefault(candidate.worker, candidate)
        return replace(
            candidate,
            queued_requests=seen.queued_requests,
            queued_work_ns=seen.queued_work_ns,
            active_decode_blocks=seen.active_decode_blocks,
        )


# ── shared ───────────────────────────────────────────────────────────────────────────────────────


def _least(candidates: Sequence[Candidate], cost: Callable[[Candidate], float]) -> WorkerId:
    return min(candidates, key=lambda candidate: (cost(candidate), candidate.worker)).worker


def _draw(request: RequestId, index: int) -> int:
    """The request's draw of that number: evenly spread, and always the same."""
    digest = blake2b(f"{request}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
