from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import MS, S
from pdserve.router.costs import (
    FASTEST,
    SLOWEST,
    Correction,
    DecodeCost,
    MoveCost,
    PrefillCost,
    StepCost,
    believed,
)

MEASUREMENTS = st.lists(st.tuples(st.integers(1, 100 * S), st.integers(1, 10**4 * S)), max_size=40)


def test_a_prefill_has_a_price_for_each_pair_of_tokens_that_look_at_each_other() -> None:
    cost = PrefillCost(fixed_s=0.002, token_s=0.001, pair_s=1e-6)
    assert cost.time_ns(100) == 112 * MS  # 2 + 100 + 100² / 1000
    assert cost.time_ns(100, 1000) == 312 * MS  # 200 more: 100 tokens look at 2 · 1,000


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_two_chunks_have_as_many_pairs_as_one_prefill(first: int, second: int) -> None:
    cost = PrefillCost(fixed_s=0.0, token_s=0.0, pair_s=1e-6)
    both_ns = cost.time_ns(first) + cost.time_ns(second, first)
    assert both_ns == pytest.approx(cost.time_ns(first + second), abs=2)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=9), st.integers(0, 2000))
def test_chunks_add_up_to_the_prefill(chunks: list[int], cached: int) -> None:
    prefill = PrefillCost(fixed_s=0.1, token_s=0.001, pair_s=1e-6)
    costs, before, whole_ns = replace(believed(1000), prefill=prefill), cached, 0
    for tokens in chunks:
        whole_ns += costs.chunk_ns(tokens, before, is_first=before == cached)
        before += tokens
    assert whole_ns == pytest.approx(costs.prefill_ns(sum(chunks), cached), abs=len(chunks) + 1)


def test_large_batches_have_their_own_step_cost() -> None:
    small = StepCost(fixed_s=0.01, context_s=1e-6, sequence_s=0.001)
    cost = DecodeCost(small=small, large=replace(small, fixed_s=0.02), large_from=8)
    assert cost.step_ns(7, 1000) == 18 * MS
    assert cost.step_ns(8, 1000) == 29 * MS


def test_a_move_takes_a_moment_and_its_bytes() -> None:
    assert MoveCost(fixed_s=0.001, bytes_per_s=1e9).time_ns(10**6) == 2 * MS


def test_a_belief_is_a_rate() -> None:
    assert believed(1000).prefill_ns(250) == 250 * MS
    assert believed(1000).prefill_ns(250, 10**6) == 250 * MS


# ── correction ───────────────────────────────────────────────────────────────────────────────────


def test_the_model_holds_until_something_is_measured() -> None:
    assert Correction().factor == 1.0


def test_measurements_outweigh_the_model() -> None:
    correction = Correction()
    for _ in range(50):
        correction.observe(500 * MS, 800 * MS)
    assert correction.factor == pytest.approx(1.6, rel=0.01)


def test_so_much_as_the_prior_moves_it_half_way() -> None:
    correction = Correction(prior_s=0.25)
    correction.observe(250 * MS, 375 * MS)
    assert correction.factor == pytest.approx(1.25, rel=0.05)


def test_what_has_been_fades() -> None:
    correction = Correction(memory_s=8.0)
    for measured_ms in (1800, 1000):
        for _ in range(40):
            correction.observe(1000 * MS, measured_ms * MS)
    assert correction.factor == pytest.approx(1.0, abs=0.01)


def test_a_measurement_longer_than_the_memory_is_all_there_is() -> None:
    correction = Correction(memory_s=8.0)
    correction.observe(1 * S, 2 * S)
    correction.observe(20 * S, 15 * S)
    assert correction.factor == pytest.approx(0.75)


def test_long_measurements_count_for_more() -> None:
    correction = Correction()
    for _ in range(20):
        correction.observe(1 * MS, 10 * MS)  # ten times slower, but it is next to nothing
        correction.observe(1000 * MS, 1000 * MS)
    assert correction.factor == pytest.approx(1.0, abs=0.02)


@given(MEASUREMENTS)
def test_odd_measurements_send_nobody_everywhere_else(
    measurements: list[tuple[int, int]],
) -> None:
    """Bounded, and within what was measured; a belief is bound by its measurements alone."""
    bounded, free = Correction(), Correction(bounded=False)
    ratios = [1.0]
    for predicted_ns, measured_ns in measurements:
        bounded.observe(predicted_ns, measured_ns)
        free.observe(predicted_ns, measured_ns)
        ratios.append(measured_ns / predicted_ns)
        assert FASTEST <= bounded.factor <= SLOWEST
        assert min(ratios) * (1 - 1e-9) <= free.factor <= max(ratios) * (1 + 1e-9)
        assert bounded.factor == min(SLOWEST, max(FASTEST, free.factor))


@pytest.mark.parametrize(("predicted_ns", "measured_ns"), [(0, 1), (1, 0), (-1, 1)])
def test_what_took_no_time_is_no_measurement(predicted_ns: int, measured_ns: int) -> None:
    with pytest.raises(AssertionError):
        Correction().observe(predicted_ns, measured_ns)
