"""Against the live worker's own chunks, and against counting."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pdserve.prefill.batch import chunk_tokens, double_cost_tokens, equal_work_tokens
from pdserve.simulator.chunks import Chunks

BLOCK_TOKENS = 16
SIZES = st.integers(1, 300)
DOUBLE_COSTS = st.none() | st.integers(1, 10_000)


@given(
    position=st.integers(0, 5000), size=SIZES, double_cost=DOUBLE_COSTS, more=st.integers(1, 5000)
)
def test_the_fewest_steps_that_reach_the_end(
    position: int, size: int, double_cost: int | None, more: int
) -> None:
    chunks = Chunks(size, double_cost)
    steps = chunks.steps(position, position + more)
    assert chunks.after(position, steps) >= position + more > chunks.after(position, steps - 1)
    assert chunks.steps(position, position) == 0


@given(
    position=st.integers(0, 5000), size=SIZES, double_cost=DOUBLE_COSTS, steps=st.integers(0, 99)
)
@example(position=0, size=6, double_cost=2, steps=16)
def test_every_step_takes_something(
    position: int, size: int, double_cost: int | None, steps: int
) -> None:
    chunks = Chunks(size, double_cost)
    assert chunks.after(position, 0) == position
    assert chunks.after(position, steps) < chunks.after(position, steps + 1)


@given(position=st.integers(0, 5000), end=st.integers(0, 5000), size=SIZES)
def test_without_a_price_chunks_are_equally_large(position: int, end: int, size: int) -> None:
    assert Chunks(size).steps(position, end) == max(0, -(-(end - position) // size))


@pytest.mark.parametrize("prompt_tokens", [200, 1536, 4000, 8000])
@pytest.mark.parametrize("budget_tokens", [80, 256])
def test_as_many_chunks_as_a_live_worker_takes(prompt_tokens: int, budget_tokens: int) -> None:
    double_tokens = double_cost_tokens(3072)
    live, position = 0, 0
    while position < prompt_tokens:
        allowed = equal_work_tokens(budget_tokens, position, double_tokens, BLOCK_TOKENS)
        position += chunk_tokens(prompt_tokens - position, allowed, BLOCK_TOKENS)
        live += 1
    chunks = Chunks(budget_tokens, double_tokens)
    # A live one takes whole blocks.
    assert chunks.steps(0, prompt_tokens) == pytest.approx(live, rel=0.1, abs=1)
