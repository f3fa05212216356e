"""The search for pool sizes, over made-up clusters whose answer is known."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.cluster.commands.planning import Attainment, Evaluate, Sizes, cheapest_pools

GOOD, BAD = Attainment(1.0, 1.0, 1.0), Attainment(0.5, 0.5, 0.5)


def needs(prefill: int, decode: int) -> Evaluate:
    """Each pool must have its own number, whatever the other has."""

    def evaluate(p: int, d: int) -> Attainment:
        ttft, tpot = (1.0 if p >= prefill else 0.2), (1.0 if d >= decode else 0.3)
        return Attainment(ttft, tpot, min(ttft, tpot))

    return evaluate


def test_independent_needs_are_found_in_few_evaluations() -> None:
    plan = cheapest_pools(needs(5, 11), workers_max=64)
    assert plan.cheapest is not None
    assert plan.cheapest.sizes == Sizes(5, 11)
    assert plan.cheapest.cost == 16
    assert len(plan.evaluated) <= 14
    assert "nothing cheaper holds" in plan.why


def test_prices_decide_between_pools_that_replace_each_other() -> None:
    """Any four of either kind, say: then the cheaper kind it is."""

    def evaluate(p: int, d: int) -> Attainment:
        return GOOD if p + d >= 6 else BAD

    cheap_decode = cheapest_pools(evaluate, workers_max=8, prefill_cost=3.0)
    cheap_prefill = cheapest_pools(evaluate, workers_max=8, decode_cost=3.0)
    assert cheap_decode.cheapest is not None
    assert cheap_decode.cheapest.sizes == Sizes(1, 5)
    assert cheap_prefill.cheapest is not None
    assert cheap_prefill.cheapest.sizes == Sizes(5, 1)


@settings(max_examples=60, deadline=None)
@given(
    workers_max=st.integers(2, 12),
    corners=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=4),
    prices=st.tuples(st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([1.0, 2.0])),
)
def test_the_answer_is_that_of_trying_everything(
    workers_max: int, corners: list[tuple[int, int]], prices: tuple[float, float]
) -> None:
    """Goal: over any upper set, the search finds the cheapest that exhaustion finds.

    Method: the sizes that hold are those at or above one of some corners.
    """

    def evaluate(p: int, d: int) -> Attainment:
        return GOOD if any(p >= a and d >= b for a, b in corners) else BAD

    plan = cheapest_pools(
        evaluate,
        workers_max=workers_max,
        prefill_cost=prices[0],
        decode_cost=prices[1],
        evaluations_max=1000,
    )
    sizes = [Sizes(p, d) for p in range(1, 12) for d in range(1, 12) if p + d <= workers_max]
    holding = [s for s in sizes if evaluate(*s).both >= 0.9]
    if not holding:
        assert plan.cheapest is None
    else:
        assert plan.cheapest is not None
        best = min(holding, key=lambda s: (s.prefill * prices[0] + s.decode * prices[1], s))
        assert plan.cheapest.sizes == best
    assert len({e.sizes for e in plan.evaluated}) == len(plan.evaluated), "one was tried twice"


@pytest.mark.parametrize(
    ("evaluate", "workers_max", "why"),
    [
        (needs(40, 2), 8, "it is the first token that is late"),
        (needs(2, 40), 8, "it is the time per token that is late"),
        (needs(6, 5), 8, "at least 6 prefill and 5 decode workers are needed, 8 are allowed"),
        (lambda p, d: GOOD if p + d > 8 else BAD, 8, "no 8 workers hold, from 2 prefill and 2"),
    ],
)
def test_why_nothing_fits_is_said(evaluate: Evaluate, workers_max: int, why: str) -> None:
    plan = cheapest_pools(evaluate, workers_max=workers_max)
    assert plan.cheapest is None
    assert why in plan.why


def test_the_search_is_bounded_and_gives_what_it_has() -> None:
    plan = cheapest_pools(needs(3, 3), workers_max=512, evaluations_max=4)
    assert len(plan.evaluated) == 4
    assert "ended after 4 simulations" in plan.why


def test_two_workers_are_the_least_there_is() -> None:
    plan = cheapest_pools(needs(1, 1), workers_max=2)
    assert plan.cheapest is not None
    assert plan.cheapest.sizes == Sizes(1, 1)
    assert len(plan.evaluated) == 1
    with pytest.raises(AssertionError, match="1 workers are too few"):
        cheapest_pools(needs(1, 1), workers_max=1)
