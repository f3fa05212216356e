"""γ-Boost: arrival minus a boost that falls with the exact work; and γ from the tail of the waits.

    key = arrival − b(work),   b(w) = (1/γ) · ln(1 / (1 − e^(−γw)))

``levels`` evaluates the same function once per level. Here it is exact, with the first quantum as a
floor under the work: b grows without bound as w → 0, and an unbounded boost would starve.

*Where γ comes from.* The tail of waits falls like e^(−γt), so from its 95th to its 99th percentile
lie ln(5) / γ seconds; in terms of their ratio r, γ = ln 5 / (t95 · (r − 1)). ``TailGamma`` keeps
the last waits and refits now and then; keys follow when γ has moved.

Source: Yu et al., arXiv:2404.08826 (γ-Boost); arXiv:2606.18431 (UniBoost), whose "gamma-Ada" adapts
γ from the ratio of t99 to t95. How it does so is not published in full; the fit above is ours.
"""

import math
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from pdserve.clock import S
from pdserve.router.entry import Entry
from pdserve.router.levels import boost_ns
from pdserve.router.orders.static import StaticOrder

WAITS_MAX = 1024
"""So many last waits are the tail that γ is fitted to."""

REFIT_EVERY = 64
"""Waits between two fits."""

GAMMA_MIN_PER_S = 0.002
GAMMA_MAX_PER_S = 50.0
GAMMA_START_PER_S = 0.1


class GammaSource(Protocol):
    @property
    def gamma_per_s(self) -> float:
        """The decay to rank by now."""

    def observe(self, wait_ns: int) -> None:
        """Somebody was dispatched after waiting so long in all."""


class FixedGamma:
    def __init__(self, gamma_per_s: float) -> None:
        assert gamma_per_s > 0
        self.gamma_per_s = gamma_per_s

    def observe(self, wait_ns: int) -> None:
        pass


class TailGamma:
    """γ fitted to the last ``WAITS_MAX`` waits, every ``REFIT_EVERY`` of them."""

    def __init__(self) -> None:
        self.gamma_per_s = GAMMA_START_PER_S
        self._waits_ns: deque[int] = deque(maxlen=WAITS_MAX)
        self._until_refit = REFIT_EVERY

    def observe(self, wait_ns: int) -> None:
        self._waits_ns.append(wait_ns)
        self._until_refit -= 1
        if self._until_refit == 0:
            self._until_refit = REFIT_EVERY
            self.gamma_per_s = fitted_gamma_per_s(sorted(self._waits_ns))


def fitted_gamma_per_s(sorted_waits_ns: list[int]) -> float:
    """The decay between the 95th and the 99th percentile, within the limits."""
    assert sorted_waits_ns
    t95, t99 = (sorted_waits_ns[int(len(sorted_waits_ns) * part)] / S for part in (0.95, 0.99))
    if t99 - t95 <= math.log(5) / GAMMA_MAX_PER_S:
        return GAMMA_MAX_PER_S
    return max(GAMMA_MIN_PER_S, math.log(5) / (t99 - t95))


class GammaBoost(StaticOrder):
    def __init__(self, gamma: GammaSource, floor_ns: int) -> None:
        """``floor_ns``: less work than this is boosted no more than this."""
        assert floor_ns > 0
        super().__init__(self._boosted)
        self._gamma = gamma
        self._gamma_per_s = gamma.gamma_per_s  # of the keys in the heap
        self._floor_ns = floor_ns

    def dispatched(self, entry: Entry, now_ns: int) -> None:
        self._gamma.observe(now_ns - entry.arrived_ns)

    def ranked(self, now_ns: int) -> Iterator[Entry]:
        if self._gamma.gamma_per_s != self._gamma_per_s:
            self._gamma_per_s = self._gamma.gamma_per_s
            self._heap.rekey(self._boosted)
        return super().ranked(now_ns)

    def _boosted(self, entry: Entry) -> float:
        work_ns = max(self._floor_ns, entry.work_ns)
        return entry.arrived_ns - boost_ns(work_ns, self._gamma_per_s)
