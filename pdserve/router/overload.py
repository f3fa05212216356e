"""What admission knows beyond a queue's length: how fast it moves, who fills it, what comes after.

*Pace.* Predicted work over the number of prefill workers says when a first token comes only while
prefill is what everybody waits for. Where decode has no room, or costs are misjudged, the queue
moves slower than that; how fast it really moves is seen in what is computed. ``Pace`` measures it,
in workers' worth of predicted work, whenever there has been a backlog for long enough. What leaves
the queue would not do: while one long prompt is computed nothing else may, for longer than is
looked at.

*Answers.* A deadline is that of the whole answer. What is left of it when the first token comes
must do for an answer of the usual length at the usual pace; else all its work would be in vain.

*Shares.* Tenants are served in turn, so what goes before a request is not all that waits: of each
other tenant no more than the request's own has before it, by their weights.

*Returns.* Whoever is refused is told when to come back. Were all told the same, they would come
back together; so returns are given out one after the other, as fast as the queue moves.
"""

import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import Final

from pdserve.clock import MS, S

BACKLOG_MIN: Final = 4
"""Fewer who wait say nothing about the pace: they may wait for a chunk's border."""

PACE_NS_MIN: Final = 2 * S
PACE_NS_MAX: Final = 8 * S
PACE_EVERY_NS: Final = S // 4

PACE_MIN = 1e-3
"""Of one worker: what does not move at all is not infinitely late."""

RETURN_MS_MIN = 50
RETURN_MS_MAX = 120_000
"""OpenAI's clients do not obey a hint beyond two minutes; they give up."""

ANSWERS = 32

GOLDEN = 0.6180339887498949


class Pace:
    """Predicted work that is computed, per time."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, int]] = deque()  # (instant, work computed by then)
        self._is_served = True

    def observe(self, waiting: int, computed_work_ns: int, now_ns: int) -> None:
        """
        Args:
            waiting: requests in the queue.
            computed_work_ns: predicted work of all that has been computed so far.
            now_ns: never before that of an earlier call.
        """
        samples = self._samples
        if waiting < BACKLOG_MIN or not self._is_served:
            samples.clear()
            return
        if samples and now_ns - samples[-1][0] < PACE_EVERY_NS:
            return
        samples.append((now_ns, computed_work_ns))
        while now_ns - samples[0][0] > PACE_NS_MAX:
            samples.popleft()

    def set_workers(self, count: int) -> None:
        """So many serve now. While there is none, what waits says nothing of how fast those are who
        come next."""
        if count == 0:
            self._samples.clear()
        self._is_served = count > 0

    def workers(self, expected: int) -> float:
        """How many workers the queue is served by, going by its pace; ``expected`` as long as
        nobody knows, and never more: a burst of dispatches is no promise."""
        if not self._samples:
            return float(expected)
        (first_ns, first_work_ns), (last_ns, last_work_ns) = self._samples[0], self._samples[-1]
        if last_ns - first_ns < PACE_NS_MIN:
            return float(expected)
        moved = (last_work_ns - first_work_ns) / (last_ns - first_ns)
        return min(float(expected), max(PACE_MIN, moved))


class Answers:
    """How long answers take once they are decoded: tokens of one, time of a token. Both are
    exponential averages over the last ``ANSWERS`` or so, and unknown before as many have ended."""

    def __init__(self) -> None:
        self._count = 0
        self._tokens = 0.0
        self._token_ns = 0.0

    def ended(self, tokens: int, elapsed_ns: int) -> None:
        """
        Args:
            tokens: of the answer, at least 1.
            elapsed_ns: from its first decode step to its end.
        """
        self._count += 1
        weight = 1 / min(self._count, ANSWERS)
        self._tokens += weight * (tokens - self._tokens)
        self._token_ns += weight * (elapsed_ns / tokens - self._token_ns)

    def expected_ns(self, tokens_max: int) -> float:
        """Of one that may have so many tokens; 0 as long as nobody knows."""
        if self._count < ANSWERS:
            return 0.0
        return min(self._tokens, tokens_max) * self._token_ns


class TenantQueues:
    """How many requests, and how much predicted work, each tenant has waiting."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._work_ns: dict[str, int] = {}
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._counts)

    def entered(self, tenant: str, work_ns: int) -> None:
        self._counts[tenant] += 1
        self._work_ns[tenant] = self._work_ns.get(tenant, 0) + work_ns

    def left(self, tenant: str, work_ns: int) -> None:
        """``work_ns`` as it was entered."""
        self._counts[tenant] -= 1
        self._work_ns[tenant] -= work_ns
        if not self._counts[tenant]:
            assert self._work_ns[tenant] == 0, f"work of {tenant!r} is left, and no request"
            del self._counts[tenant], self._work_ns[tenant]

    def count(self, tenant: str) -> int:
        return self._counts.get(tenant, 0)

    def others(self, tenant: str) -> bool:
        """Whether anybody else waits."""
        return len(self._counts) > (tenant in self._counts)

    def share(self, tenant: str) -> float:
        """Of the places, by weight, among those who wait and ``tenant``."""
        own = self._weight(tenant)
        others = sum(self._weight(other) for other in self._counts if other != tenant)
        return own / (own + others)

    def before_ns(self, tenant: str, work_ns: int) -> int:
        """What goes before one more request of ``tenant`` at most, where tenants take turns."""
        own_ns = self._work_ns.get(tenant, 0)
        per_weight = (own_ns + work_ns) / self._weight(tenant)
        others_ns = sum(
            min(other_ns, round(per_weight * self._weight(other)))
            for other, other_ns in self._work_ns.items()
            if other != tenant
        )
        return own_ns + others_ns

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)


class Returns:
    """When those who are refused had better come back."""

    def __init__(self) -> None:
        self._next_ns = 0
        self._late_count = 0

    def after_ms(self, soonest_ms: float, spacing_ns: float, now_ns: int) -> int:
        """The next return, in milliseconds from now.

        Args:
            soonest_ms: when there may be room again.
            spacing_ns: how long the queue takes for one such request.
            now_ns: the instant of the refusal.
        """
        soonest_ms = max(float(RETURN_MS_MIN), soonest_ms)
        at_ns = max(now_ns + round(soonest_ms * MS), self._next_ns)
        if at_ns - now_ns > RETURN_MS_MAX * MS:  # more than can be told: anywhere in the last half
            self._late_count += 1
            spread = math.fmod(self._late_count * GOLDEN, 1.0)
            return round(RETURN_MS_MAX * (1 + spread) / 2)
        self._next_ns = at_ns + round(spacing_ns)
        return max(RETURN_MS_MIN, (at_ns - now_ns) // MS)
