"""How many workers of each kind hold a service level at least cost. Pure but for ``evaluate``.

``evaluate(p, d)`` says which part of the requests met the objectives with p prefill and d decode
workers; it is a simulation, and dear. What is used of it is that more workers never hurt: sizes
that hold are an upper set of the grid. So

1. *bounds*: the fewest prefill workers that hold beside as many decode workers as there may ever
   be, and the reverse. No pair below either can hold. Two bisections.
2. *candidates* at or above both bounds, cheapest first; one that fails strikes out every pair that
   has no more of either kind. The first that holds is the cheapest of all.

Simulations are not exactly monotone; the answer is one that was simulated and held, in any case.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

EVALUATIONS_MAX = 64
"""Bisections of 1,024 sizes take 22; what is left walks the border between the bounds."""


class Sizes(NamedTuple):
    prefill: int
    decode: int


@dataclass(frozen=True, slots=True)
class Attainment:
    """Parts of all requests; one that was refused or failed meets nothing."""

    ttft: float
    tpot: float
    both: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    sizes: Sizes
    cost: float
    attainment: Attainment
    holds: bool


@dataclass(frozen=True, slots=True)
class Plan:
    cheapest: Evaluated | None
    evaluated: tuple[Evaluated, ...]  # in the order in which they were tried
    why: str  # one sentence: why this one, or why none


Evaluate = Callable[[int, int], Attainment]


def cheapest_pools(
    evaluate: Evaluate,
    *,
    workers_max: int,
    attainment_min: float = 0.9,
    prefill_cost: float = 1.0,
    decode_cost: float = 1.0,
    evaluations_max: int = EVALUATIONS_MAX,
) -> Plan:
    """The cheapest pools of at most ``workers_max`` workers together.

    Ties go to the pair that was cheaper to serve prompts with: fewer prefill workers.
    """
    assert workers_max >= 2, f"{workers_max} workers are too few for two pools"
    assert 0 < attainment_min <= 1
    assert min(prefill_cost, decode_cost) > 0
    search = _Search(evaluate, attainment_min, prefill_cost, decode_cost, evaluations_max)
    return search.run(workers_max)


class _Exhausted(Exception):
    """As many evaluations as were allowed have been made."""


class _Search:
    def __init__(
        self,
        evaluate: Evaluate,
        attainment_min: float,
        prefill_cost: float,
        decode_cost: float,
        evaluations_max: int,
    ) -> None:
        self._evaluate = evaluate
        self._attainment_min = attainment_min
        self._costs = (prefill_cost, decode_cost)
        self._evaluations_max = evaluations_max
        self._known: dict[Sizes, Evaluated] = {}

    def run(self, workers_max: int) -> Plan:
        most = workers_max - 1  # of one pool; the other has at least one
        try:
            if not self._holds(Sizes(most, most)):
                return self._plan(None, self._why_never(Sizes(most, most)))
            least = Sizes(
                self._fewest(lambda count: Sizes(count, most), most),
                self._fewest(lambda count: Sizes(most, count), most),
            )
            if sum(least) > workers_max:
                return self._plan(
                    None,
                    f"at least {least.prefill} prefill and {least.decode} decode workers are "
                    f"needed, {workers_max} are allowed; raise --workers-max",
                )
            found = self._first_to_hold(least, workers_max)
        except _Exhausted:
            return self._best_so_far(workers_max)
        if found is None:
            return self._plan(
                None,
                f"no {workers_max} workers hold, from {least.prefill} prefill and {least.decode} "
                "decode workers on; raise --workers-max",
            )
        return self._plan(
            self._known[found], "nothing cheaper holds: every cheaper pair was tried or is smaller"
        )

    def _fewest(self, sizes_of: Callable[[int], Sizes], most: int) -> int:
        """The smallest count that holds, ``most`` being known to."""
        low, high = 1, most
        while low < high:
            middle = (low + high) // 2
            if self._holds(sizes_of(middle)):
                high = middle
            else:
                low = middle + 1
        return low

    def _first_to_hold(self, least: Sizes, workers_max: int) -> Sizes | None:
        candidates = [
            Sizes(prefill, decode)
            for prefill in range(least.prefill, workers_max - least.decode + 1)
            for decode in range(least.decode, workers_max - prefill + 1)
        ]
        for sizes in sorted(candidates, key=lambda sizes: (self._cost(sizes), sizes)):
            if not self._is_struck_out(sizes) and self._holds(sizes):
                return sizes
        return None

    def _is_struck_out(self, sizes: Sizes) -> bool:
        return any(
            not known.holds
            and sizes.prefill <= known.sizes.prefill
            and sizes.decode <= known.sizes.decode
            for known in self._known.values()
        )

    def _holds(self, sizes: Sizes) -> bool:
        known = self._known.get(sizes)
        if known is None:
            if len(self._known) >= self._evaluations_max:
                raise _Exhausted
            attainment = self._evaluate(*sizes)
            holds = attainment.both >= self._attainment_min
            known = Evaluated(sizes, self._cost(sizes), attainment, holds)
            self._known[sizes] = known
        return known.holds

    def _cost(self, sizes: Sizes) -> float:
        return sizes.prefill * self._costs[0] + sizes.decode * self._costs[1]

    def _why_never(self, sizes: Sizes) -> str:
        attainment = self._known[sizes].attainment
        late = "first token" if attainment.ttft <= attainment.tpot else "time per token"
        return (
            f"{sizes.prefill} prefill and {sizes.decode} decode workers meet both objectives for "
            f"{attainment.both:.1%} of the requests, {self._attainment_min:.0%} are wanted; it is "
            f"the {late} that is late (first token in time: {attainment.ttft:.1%}, time per token: "
            f"{attainment.tpot:.1%}): raise --workers-max, allow more time, or take faster workers"
        )

    def _best_so_far(self, workers_max: int) -> Plan:
        holding = [e for e in self._known.values() if e.holds and sum(e.sizes) <= workers_max]
        best = min(holding, key=lambda evaluated: (evaluated.cost, evaluated.sizes), default=None)
        return self._plan(
            best,
            f"the search ended after {self._evaluations_max} simulations; something cheaper may "
            "hold",
        )

    def _plan(self, cheapest: Evaluated | None, why: str) -> Plan:
        return Plan(cheapest, tuple(self._known.values()), why)
