"""The bootstrap: what it draws, and how sure it is."""

import numpy as np
import pytest

from bench.frame import percentile
from bench.intervals import at_percentile, blocks, mean, ratio_interval
from tests.unit.bench.outcomes import outcome


def test_blocks_are_stretches_of_a_run_and_may_be_empty() -> None:
    first = [outcome(due_s=due_s, ttft_s=due_s) for due_s in (0, 9.9, 10, 35)]
    second = [outcome(due_s=1, ttft_s=7)]
    found = blocks([first, second], lambda o: [o.ttft_s or 0.0], block_s=10)
    assert [list(block) for block in found] == [[0, 9.9], [10], [], [35], [7]]


@pytest.mark.parametrize("at", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 10, 101])
def test_percentiles_are_the_frames(at: float, count: int) -> None:
    samples = np.random.default_rng(count).permutation(count).astype(np.float64)
    assert at_percentile(at)(samples) == percentile(samples.tolist(), at)


def test_what_both_servers_share_cancels_out() -> None:
    """Blocks differ by a factor of 1000, and ours is half of theirs in each."""
    theirs = [np.array([1.0]), np.array([10.0]), np.array([1000.0])]
    ours = [block / 2 for block in theirs]
    assert ratio_interval(ours, theirs, mean, draws=50) == pytest.approx((0.5, 0.5))


def test_an_interval_covers_the_truth_and_narrows_with_more_blocks() -> None:
    chance = np.random.default_rng(1)

    def interval(block_count: int) -> tuple[float, float]:
        ours = list(chance.exponential(1.0, (block_count, 10)))
        theirs = list(chance.exponential(2.0, (block_count, 10)))
        return ratio_interval(ours, theirs, mean, draws=300)

    few, many = interval(10), interval(160)
    assert few[0] < 0.5 < few[1]
    assert many[0] < 0.5 < many[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 2


def test_the_same_seed_draws_the_same() -> None:
    ours, theirs = (list(np.random.default_rng(n).random((9, 4))) for n in (1, 2))
    intervals = [ratio_interval(ours, theirs, mean, draws=20, seed=s) for s in (1, 1, 2)]
    assert intervals[0] == intervals[1] != intervals[2]


def test_draws_of_empty_blocks_alone_are_left_out() -> None:
    one = [np.array([2.0]), np.array([])]
    assert ratio_interval(one, one, mean, draws=20) == (1, 1)


def test_servers_that_had_other_arrivals_cannot_be_compared() -> None:
    with pytest.raises(AssertionError, match="2 and 1 blocks"):
        ratio_interval([np.array([1.0])] * 2, [np.array([1.0])], mean)
