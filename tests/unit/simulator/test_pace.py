"""Closed forms against adding up step by step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.router.costs import DecodeCost, PrefillCost, StepCost
from pdserve.simulator.chunks import Chunks
from pdserve.simulator.pace import Pace

SMALL = StepCost(fixed_s=0.012, context_s=2.4e-8, sequence_s=5e-5)
LARGE = StepCost(fixed_s=0.020, context_s=4e-8, sequence_s=1e-4)
DECODE = DecodeCost(small=SMALL, large=LARGE, large_from=8)
PREFILL = PrefillCost(fixed_s=0.015, token_s=8e-5, pair_s=1e-9)


def pace_of(
    streams: int,
    context: int,
    *,
    uncached: int = 0,
    cached: int = 0,
    computed: int = 0,
    chunk: int = 256,
    double_cost: int | None = None,
    slow: float = 1.0,
) -> Pace:
    pace = Pace(DECODE, streams=streams, context_tokens=context, slow=slow)
    if uncached:
        pace.add_prompt(
            PREFILL,
            uncached_tokens=uncached,
            cached_tokens=cached,
            computed_tokens=computed,
            chunks=Chunks(chunk, double_cost),
            slow=slow,
        )
    return pace


@given(streams=st.integers(1, 32), context=st.integers(1, 10**6), steps=st.integers(0, 300))
def test_streams_take_as_long_as_their_steps_one_by_one(
    streams: int, context: int, steps: int
) -> None:
    one_by_one = sum(DECODE.step_ns(streams, context + streams * step) for step in range(steps))
    # Each of the steps is rounded to a nanosecond there.
    assert pace_of(streams, context).elapsed_ns(steps) == pytest.approx(one_by_one, abs=steps + 1)


@given(uncached=st.integers(1, 20_000), cached=st.integers(0, 20_000), chunk=st.integers(1, 4096))
def test_chunks_add_up_to_the_prefill(uncached: int, cached: int, chunk: int) -> None:
    pace = pace_of(0, 0, uncached=uncached, cached=cached, chunk=chunk)
    steps = -(-uncached // chunk)
    assert pace.elapsed_ns(steps) == pytest.approx(PREFILL.time_ns(uncached, cached), abs=1)
    assert pace.elapsed_ns(steps + 5) == pace.elapsed_ns(steps)


@given(
    uncached=st.integers(1, 5000), cached=st.integers(0, 5000), double_cost=st.integers(100, 9000)
)
def test_chunks_of_equal_work_add_up_to_it_too(
    uncached: int, cached: int, double_cost: int
) -> None:
    pace = pace_of(0, 0, uncached=uncached, cached=cached, chunk=80, double_cost=double_cost)
    steps = pace.steps_to(uncached)
    assert pace.computed_after(steps) == uncached > pace.computed_after(steps - 1)
    assert pace.elapsed_ns(steps) == pytest.approx(PREFILL.time_ns(uncached, cached), abs=1)


def test_a_prefill_that_goes_on_costs_what_is_left() -> None:
    whole = pace_of(0, 0, uncached=1000, chunk=100).elapsed_ns(10)
    begun = pace_of(0, 0, uncached=1000, chunk=100).elapsed_ns(3)
    rest = pace_of(0, 0, uncached=1000, chunk=100, computed=300).elapsed_ns(7)
    assert begun + rest == pytest.approx(whole, abs=1)


def test_chunks_beside_streams_cost_both() -> None:
    both = pace_of(4, 1000, uncached=1000, chunk=100).elapsed_ns(6)
    streams = pace_of(4, 1000).elapsed_ns(6)
    prompt = pace_of(0, 0, uncached=1000, chunk=100).elapsed_ns(6)
    assert both == pytest.approx(streams + prompt, abs=1)


@given(
    streams=st.integers(0, 16),
    uncached=st.integers(0, 5000),
    steps_max=st.integers(0, 3000),
    steps=st.integers(0, 3000),
    offset=st.integers(-3, 3),
    double_cost=st.none() | st.integers(100, 5000),
)
def test_the_inverse_is_the_first_step_that_ends_late_enough(
    streams: int,
    uncached: int,
    steps_max: int,
    steps: int,
    offset: int,
    double_cost: int | None,
) -> None:
    if not streams and not uncached:
        return
    pace = pace_of(streams, 1000 * streams, uncached=uncached, chunk=64, double_cost=double_cost)
    elapsed = pace.elapsed_ns(steps) + offset
    if elapsed <= 0:
        return
    found = pace.steps_until(elapsed, 0, steps_max)
    linear = next((k for k in range(steps_max) if pace.elapsed_ns(k) >= elapsed), steps_max)
    assert found == linear


def test_a_slow_worker_takes_that_many_times_as_long() -> None:
    quick = pace_of(3, 500, uncached=300, chunk=100).elapsed_ns(5)
    assert pace_of(3, 500, uncached=300, chunk=100, slow=10.0).elapsed_ns(5) == pytest.approx(
        10 * quick
    )
