import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.router.decode_base import Stream
from pdserve.router.lengths import (
    CELL_COUNT,
    CLASSES_MAX,
    EDGES,
    LENGTH_TOKENS_MAX,
    LengthModel,
    cell_of,
    length_class,
    peak_tokens,
)
from tests.unit.router.streams import stream


def taught(*lengths: int, times: int = 200, cls: str = "all") -> LengthModel:
    """A model that has seen these lengths so often, in turn."""
    model = LengthModel()
    for _ in range(times):
        for length in lengths:
            model.observe(cls, length)
    return model


@given(st.integers(0, LENGTH_TOKENS_MAX - 1))
def test_a_cell_holds_what_lies_between_its_edges(tokens: int) -> None:
    cell = cell_of(tokens)
    assert EDGES[cell] <= tokens < EDGES[cell + 1]


def test_cells_are_narrow() -> None:
    widths = np.diff(EDGES)
    assert (widths <= np.maximum(1, EDGES[:-1] / 4)).all()


def test_longer_than_the_longest_counts_as_the_longest() -> None:
    assert cell_of(LENGTH_TOKENS_MAX * 8) == cell_of(LENGTH_TOKENS_MAX - 1) < CELL_COUNT


def test_a_class_is_who_asks_and_the_power_of_two_of_how_much() -> None:
    assert length_class("a", 256) == length_class("a", 511)
    assert length_class("a", 256) != length_class("a", 255)
    assert length_class("a", 256) != length_class("b", 256)


def test_survival_is_the_part_that_goes_on() -> None:
    model = taught(4, 100)
    assert model.survival("all", 0) == pytest.approx(1)
    assert model.survival("all", 3) == pytest.approx(1, abs=0.01)
    assert model.survival("all", 4) == pytest.approx(0.5, abs=0.02)
    assert model.survival("all", 200) < 0.01


def test_what_remains_of_a_fixed_length_is_the_difference() -> None:
    model = taught(100, times=2000)
    assert model.remaining("all", 0) == pytest.approx(100, rel=0.1)
    assert model.remaining("all", 60) == pytest.approx(40, rel=0.25)


def test_whoever_outlasts_all_that_was_seen_is_expected_to_last_long() -> None:
    model = taught(10)
    assert model.remaining("all", 1000) > 1000


def test_without_any_observation_there_is_an_answer() -> None:
    model = LengthModel()
    assert model.observed_count == 0
    assert model.remaining("nobody", 0) > 1
    assert 0 < model.index("nobody", 50) <= 1
    assert model.remaining_quantile("nobody", 0, 0.5) == 1


def test_half_of_the_answers_are_no_longer_than_the_median() -> None:
    model = taught(*range(1, 101), times=20)
    assert model.remaining_quantile("all", 0, 0.5) == pytest.approx(50, rel=0.1)
    assert model.remaining_quantile("all", 50, 0.5) == pytest.approx(25, rel=0.25)


def test_the_index_rises_where_answers_are_about_to_end() -> None:
    model = taught(*range(80, 120))
    assert model.index("all", 80) > model.index("all", 40) > model.index("all", 0)


def test_the_index_falls_where_short_ones_would_have_ended() -> None:
    model = taught(8, 8, 8, 1000)
    assert model.index("all", 0) > 5 * model.index("all", 10)


def test_the_index_of_equal_lengths_is_one_over_what_remains() -> None:
    model = taught(64, times=3000)
    assert model.index("all", 0) == pytest.approx(1 / 60, rel=0.15)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_curves_agree_with_their_meaning(lengths: list[int]) -> None:
    """survival falls from 1, what remains is at least the next token, an index is a rate."""
    model = LengthModel()
    for length in lengths:
        model.observe("all", length)
    before = 1.0
    for attained in [*range(20), 100, 999, 5000, 10**7]:
        survival = model.survival("all", attained)
        assert 0 < survival <= before + 1e-9
        before = survival
        assert model.remaining("all", attained) >= 1
        assert 0 < model.index("all", attained) <= 1 + 1e-9
        median = model.remaining_quantile("all", attained, 0.5)
        assert median >= 1
        if attained + median < LENGTH_TOKENS_MAX:
            assert model.survival("all", attained + median) <= survival / 2 + 1e-9


def test_a_new_class_leans_on_the_others() -> None:
    model = taught(100)
    assert model.remaining("new", 0) == pytest.approx(model.remaining("all", 0), rel=0.01)
    model.observe("new", 1)
    assert model.remaining("new", 0) > 80


def test_a_class_that_has_ended_many_speaks_for_itself() -> None:
    model = taught(1000)
    for _ in range(500):
        model.observe("short", 10)
    assert model.remaining("short", 0) < 100
    assert model.remaining("all", 0) > 300


def test_the_past_fades() -> None:
    model = taught(1000, times=500)
    for _ in range(6000):
        model.observe("all", 10)
    assert model.remaining("all", 0) < 30


def test_further_classes_are_read_from_all_together() -> None:
    model = LengthModel()
    for index in range(CLASSES_MAX):
        model.observe(index, 10)
    for _ in range(50):
        model.observe("one more", 1000)
    assert model.remaining("one more", 0) == model.remaining("never seen", 0)


def test_an_answer_has_a_token() -> None:
    with pytest.raises(AssertionError):
        LengthModel().observe("all", 0)


def test_equal_observations_give_equal_answers() -> None:
    chance = random.Random(7)
    lengths = [chance.randrange(1, 500) for _ in range(300)]
    first, second = taught(*lengths, times=1), taught(*lengths, times=1)
    assert [first.index("all", a) for a in range(99)] == [second.index("all", a) for a in range(99)]


def test_nobody_holds_nothing() -> None:
    assert peak_tokens([]) == 0


def test_the_peak_is_just_before_somebody_ends() -> None:
    # 10 + 5 more of each: 10 + 10 + 2·5 = 30; then the first goes on alone to 10 + 20 = 30.
    assert peak_tokens([(20, 10), (5, 10)]) == 30
    # The second ends at once: the first alone decides.
    assert peak_tokens([(100, 10), (1, 10)]) == 110


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=12))
def test_the_peak_is_that_of_every_single_step(streams: list[tuple[int, int]]) -> None:
    steps = max((remaining for remaining, _ in streams), default=0)
    expected = max(
        (
            sum(context + step for remaining, context in streams if remaining >= step)
            for step in range(1, steps + 1)
        ),
        default=0,
    )
    assert peak_tokens([(float(remaining), context) for remaining, context in streams]) == expected


def test_a_careful_peak_is_the_larger() -> None:
    model = taught(*range(1, 101), times=20)
    streams: list[Stream] = [stream("a", context=100), stream("b", context=100)]
    assert 200 < model.peak_tokens(streams) < model.peak_tokens(streams, ratio=0.9) <= 450
