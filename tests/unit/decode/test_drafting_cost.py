"""Whether drafts that take time are worth it: the arithmetic, and a worker's switch."""

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.decode.drafting import Asked, Drafter
from pdserve.decode.drafting_cost import TRY_STEPS_MAX, Tries, depth_that_pays, tokens_of
from pdserve.decode.model_speculation import ModelSpeculation
from pdserve.decode.speculation import GAIN_MIN_RATIO, counts_that_pay


def per_row(fixed_us: float, row_us: float) -> Callable[[int], float]:
    return lambda rows: fixed_us + row_us * rows


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=4),
    st.floats(1, 1000),
    st.floats(0, 300),
    st.floats(0, 500),
)
def test_no_other_depth_gives_more_tokens_per_second(
    streams: list[tuple[float, int]], fixed_us: float, row_us: float, pass_us: float
) -> None:
    chances, limits = [chance for chance, _ in streams], [limit for _, limit in streams]
    step = per_row(fixed_us, row_us)

    def rate(depth: int) -> float:
        offered = [min(limit, depth) for limit in limits]
        counts = counts_that_pay(chances, offered, step)
        writing_us = sum(pass_us for _ in range(min(depth, max(limits))))
        return tokens_of(chances, counts) / (step(len(chances) + sum(counts)) + writing_us)

    depth = depth_that_pays(chances, limits, step, lambda _: pass_us)
    best = max(map(rate, range(max(limits) + 1)))
    if depth:
        assert rate(depth) == pytest.approx(best)
        assert best > GAIN_MIN_RATIO * rate(0) * (1 - 1e-9)
    else:
        assert best <= GAIN_MIN_RATIO * rate(0) * (1 + 1e-9)


def test_what_was_not_measured_does_not_pay() -> None:
    free = per_row(100, 0)
    assert depth_that_pays([1.0], [4], free, lambda _: None) == 0
    assert depth_that_pays([1.0], [4], lambda _: None, free) == 0
    assert depth_that_pays([1.0], [4], free, lambda _: 1.0) == 4
    assert depth_that_pays([1.0], [0], free, lambda _: 1.0) == 0
    assert depth_that_pays([], [], free, lambda _: 1.0) == 0


def test_tries_come_ever_further_apart_up_to_a_bound_and_anew_after_it_paid() -> None:
    tries = Tries()
    tried = [step for step in range(300) if tries.depth(0)]
    assert tried[:6] == [0, 2, 6, 14, 30, 62]
    assert {after - before for before, after in itertools.pairwise(tried[6:])} == {TRY_STEPS_MAX}
    assert tries.depth(3) == 3
    assert tries.depth(0) > 0


class Writer:
    """Drafts sevens, a pass for each in ``us``; counts them."""

    def __init__(self, us: float) -> None:
        self.us = us
        self.passes = 0

    def begin(self) -> Drafter:
        return Nobody()

    def draft(self, asked: Sequence[Asked]) -> list[list[int]]:
        self.passes += max((one.count for one in asked), default=0)
        return [[7] * one.count for one in asked]

    def pass_us(self) -> Callable[[int], float | None]:
        return lambda _: self.us if self.passes else None


class Nobody:
    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        raise AssertionError("drafts are asked for together")

    def end(self) -> None:
        pass


class Worker:
    """Streams that say what they are told to; a step of r rows takes ``us(r)``."""

    def __init__(self, writer: Writer, us: Callable[[int], float], streams: int = 2) -> None:
        self.writer, self.us = writer, us
        self.speculation = ModelSpeculation(writer, 4)
        self.streams = [self.speculation.begin() for _ in range(streams)]
        self.tokens, self.elapsed_us = 0, 0.0

    def step(self, says: int) -> list[int]:
        """Drafts of each stream that the step took."""
        passes = self.writer.passes
        chosen = self.speculation.choose([(one, ()) for one in self.streams], [100, 100])
        rows = len(chosen) + sum(map(len, chosen))
        self.speculation.took(rows, int(self.us(rows)))
        self.elapsed_us += self.us(rows) + self.writer.us * (self.writer.passes - passes)
        for one, drafts in zip(self.streams, chosen, strict=True):
            held = next((i for i, draft in enumerate(drafts) if draft != says), len(drafts))
            self.speculation.came(one, [says] * (held + 1))
            self.tokens += held + 1
        return [len(drafts) for drafts in chosen]

    def rate_over(self, steps: int, says: int) -> float:
        self.tokens, self.elapsed_us = 0, 0.0
        for _ in range(steps):
            self.step(says)
        return self.tokens / self.elapsed_us


def test_a_good_and_cheap_writer_is_found_within_a_few_steps_and_used() -> None:
    worker = Worker(Writer(10), per_row(100, 1))
    for _ in range(20):
        worker.step(7)
    assert worker.step(7) == [4, 4]
    assert worker.rate_over(100, 7) > 2 * 2 / 102


@pytest.mark.parametrize(
    ("pass_us", "says"), [(10, 8), (400, 7)], ids=["never right", "slower than the model"]
)
def test_a_writer_that_does_not_pay_is_turned_off_and_costs_next_to_nothing(
    pass_us: float, says: int
) -> None:
    worker = Worker(Writer(pass_us), per_row(100, 1))
    for _ in range(100):
        worker.step(says)
    before = worker.writer.passes
    rate = worker.rate_over(640, says)
    assert 0 < worker.writer.passes - before <= 2 * 640 / TRY_STEPS_MAX + 2
    assert rate > (2 / 102) * (0.99 if pass_us < 100 else 0.85)


def test_one_that_becomes_good_is_noticed_and_one_that_becomes_bad() -> None:
    worker = Worker(Writer(10), per_row(100, 1))
    for _ in range(200):
        worker.step(8)
    assert worker.step(8) == [0, 0]
    steps = next(step for step in range(10 * TRY_STEPS_MAX) if worker.step(7) == [4, 4])
    assert steps > 0
    for _ in range(200):
        worker.step(8)
    passes = worker.writer.passes
    assert [worker.step(8) for _ in range(TRY_STEPS_MAX)].count([0, 0]) >= TRY_STEPS_MAX - 1
    assert worker.writer.passes - passes <= 2 * 2


def test_a_new_stream_is_drafted_for_as_others_of_late() -> None:
    worker = Worker(Writer(10), per_row(100, 1))
    for _ in range(40):
        worker.step(7)
    assert worker.speculation.begin().chance.value > 0.9
    assert ModelSpeculation(Writer(1), 4).begin().chance.value == 0.25
