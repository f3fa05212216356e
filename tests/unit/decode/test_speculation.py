"""How many drafts are worth their rows, and how what that hangs on is learned."""

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.decode.speculation import (
    FORGET_STEPS,
    GAIN_MIN_RATIO,
    Chance,
    Drafting,
    Speculation,
    StepTimes,
    counts_that_pay,
)


def per_row(fixed_us: float, row_us: float) -> Callable[[int], float]:
    return lambda rows: fixed_us + row_us * rows


# ── what pays ────────────────────────────────────────────────────────────────────────────────────


def test_where_rows_cost_nothing_all_drafts_are_taken() -> None:
    assert counts_that_pay([0.9, 0.3], [4, 2], per_row(100, 0)) == [4, 2]


def test_where_a_row_costs_a_step_none_is() -> None:
    assert counts_that_pay([0.99], [4], per_row(0, 100)) == [0]


def test_the_likeliest_go_first() -> None:
    """A row adds a tenth: the sure stream's drafts pay, those of the other do not."""
    assert counts_that_pay([0.95, 0.05], [3, 3], per_row(80, 10)) == [3, 0]


def test_a_step_up_in_cost_is_taken_where_all_beyond_it_together_pay() -> None:
    """A second row costs half as much again, and a third to fifth nothing: one draft that holds
    with 0.45 is a loss, four of 0.9 a gain."""
    us = {1: 100.0, 2: 150.0, 3: 150.0, 4: 150.0, 5: 150.0}
    assert counts_that_pay([0.45], [1], us.get) == [0]
    assert counts_that_pay([0.9], [4], us.get) == [4]


def test_before_a_plain_step_is_measured_none_is_drafted() -> None:
    assert counts_that_pay([0.9], [4], StepTimes().estimate()) == [0]


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=3),
    st.lists(st.floats(1, 1000), min_size=12, max_size=12),
)
def test_no_other_counts_give_more_tokens_per_second(
    streams: list[tuple[float, int]], row_us: Sequence[float]
) -> None:
    chances, offered = [chance for chance, _ in streams], [count for _, count in streams]

    def us(rows: int) -> float:
        return row_us[rows - 1]

    counts = counts_that_pay(chances, offered, us)
    others = itertools.product(*(range(count + 1) for count in offered))
    best = max(rate(chances, other, us) for other in others)
    plain = rate(chances, [0] * len(chances), us)
    if any(counts):
        assert rate(chances, counts, us) == pytest.approx(best)
        assert best > GAIN_MIN_RATIO * plain * (1 - 1e-9)
    else:
        assert best <= GAIN_MIN_RATIO * plain * (1 + 1e-9)


def rate(chances: Sequence[float], counts: Sequence[int], us: Callable[[int], float]) -> float:
    gains = (
        chance**place
        for chance, count in zip(chances, counts, strict=True)
        for place in range(1, count + 1)
    )
    return (len(chances) + sum(gains)) / us(len(chances) + sum(counts))


# ── what is learned ──────────────────────────────────────────────────────────────────────────────


def test_a_chance_follows_the_latest_drafts() -> None:
    chance = Chance()
    assert chance.value == 0.25
    for _ in range(20):
        chance.saw(held=True)
    assert chance.value > 0.8
    for _ in range(20):
        chance.saw(held=False)
    assert chance.value < 0.15


def test_times_between_measured_ones_lie_between_and_beyond_them_grow() -> None:
    times = StepTimes()
    times.measured(2, 100)
    times.measured(6, 140)
    us = times.estimate()
    assert [us(rows) for rows in (1, 2, 4, 6, 12)] == [None, 100, 120, 140, 140 * 1.25]


def test_one_slow_step_counts_as_twice_the_usual() -> None:
    times = StepTimes()
    times.measured(1, 100)
    times.measured(1, 100_000)
    assert times.estimate()(1) == 125


def test_what_is_not_measured_again_is_forgotten() -> None:
    times = StepTimes()
    times.measured(1, 100)
    for _ in range(FORGET_STEPS - 1):
        times.measured(5, 300)
    assert times.estimate()(1) == 100
    times.measured(5, 300)
    assert times.estimate()(1) is None


def test_a_clock_too_coarse_for_a_step_divides_by_nothing() -> None:
    times = StepTimes()
    times.measured(1, 0)
    assert counts_that_pay([0.9], [1], times.estimate()) == [1]


class Same:
    """Drafts sevens."""

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        return [7] * count

    def end(self) -> None:
        pass


class Model:
    """One stream that says ``says`` over and over; a step of r rows takes ``us(r)``."""

    def __init__(self, us: Callable[[int], float]) -> None:
        self.speculation = Speculation(Same, 4)
        self.drafting: Drafting = self.speculation.begin()
        self.us = us

    def step(self, says: int) -> int:
        (drafts,) = self.speculation.choose([(self.drafting, ())], [100])
        count = next((i for i, draft in enumerate(drafts) if draft != says), len(drafts))
        self.speculation.took(1 + len(drafts), int(self.us(1 + len(drafts))))
        self.speculation.came(self.drafting, [says] * (count + 1))
        return len(drafts)

    def steps(self, says: int, count: int) -> list[int]:
        return [self.step(says) for _ in range(count)]


def test_drafts_that_never_hold_are_never_computed() -> None:
    assert set(Model(per_row(90, 10)).steps(says=1, count=300)) == {0}


def test_drafts_begin_soon_after_they_begin_to_be_right_and_end_when_wrong() -> None:
    """Nothing is computed to find out: those left out were right."""
    model = Model(per_row(90, 10))
    model.steps(says=1, count=300)
    assert 4 in model.steps(says=7, count=15)
    assert model.steps(says=1, count=30)[-1] == 0


def test_where_rows_are_dear_right_drafts_are_tried_once_in_a_while_only() -> None:
    counts = Model(per_row(0, 100)).steps(says=7, count=10 * FORGET_STEPS)
    assert 1 <= sum(count > 0 for count in counts) <= 3 * 10


def test_a_limit_is_kept() -> None:
    speculation = Speculation(Same, 4)
    speculation.took(1, 100)
    drafting = speculation.begin()
    for _ in range(20):
        drafting.chance.saw(held=True)
    assert speculation.choose([(drafting, ())], [2]) == [[7, 7]]
    assert speculation.choose([(drafting, ())], [0]) == [[]]
    assert speculation.choose([(drafting, ())], [9]) == [[7] * 4]
