"""Which chunks share a step, and how its time is split."""

import pytest

from pdserve.prefill.batch import (
    ATTENTION_RATE,
    chunk_tokens,
    double_cost_tokens,
    equal_work_tokens,
    shares_us,
)


@pytest.mark.parametrize(
    ("remaining", "budget", "chunk"),
    [
        (5, 8, 5),  # finishes
        (8, 8, 8),
        (9, 8, 8),  # ends at a border
        (9, 7, 4),  # the border below the budget
        (9, 3, 0),  # no full block left to compute
        (3, 3, 3),
    ],
)
def test_a_chunk_finishes_its_prompt_or_ends_at_a_border(
    remaining: int, budget: int, chunk: int
) -> None:
    assert chunk_tokens(remaining, budget, block_tokens=4) == chunk


@pytest.mark.parametrize(
    ("start", "chunk"),
    [(0, 80), (100, 80), (300, 64), (1000, 48), (2000, 32), (100_000, 16)],
)
def test_a_chunk_deep_in_its_prompt_is_as_much_work_as_the_first(start: int, chunk: int) -> None:
    """Where attention costs a token as much as the rest from 1,340 tokens of context on."""
    like_linear = round(1340 / ATTENTION_RATE)
    double_tokens = double_cost_tokens(like_linear)
    assert double_tokens == 1340
    assert equal_work_tokens(80, start, double_tokens, 16) == chunk


@pytest.mark.parametrize(("elapsed", "chunks"), [(100, (3, 3, 3)), (7, (1,)), (0, (4, 5))])
def test_shares_add_up(elapsed: int, chunks: tuple[int, ...]) -> None:
    assert sum(shares_us(elapsed, chunks)) == elapsed


def test_shares_follow_the_tokens() -> None:
    assert shares_us(100, (1, 3)) == (25, 75)
