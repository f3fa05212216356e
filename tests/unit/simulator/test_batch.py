"""The batch of streams against counting each of them."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pdserve.ids import RequestId, WorkerId
from pdserve.messages import Route
from pdserve.simulator.attempt import Attempt, Job, Stage
from pdserve.simulator.batch import Batch
from pdserve.simulator.traces import TraceRequest, some_tokens
from tests.unit.router.build import address, request

BLOCK_TOKENS = 8
ROUTE = Route(WorkerId("p"), WorkerId("d"), address("d"), None)


def stream(index: int, tokens: int, left: int) -> Attempt:
    """One with ``tokens`` tokens, the last of them generated, that wants ``left`` more."""
    job = Job(index, TraceRequest(0, tokens - 1, 1 + left), (), target=1 + left, factor=1.0)
    asked = replace(
        request("r", 1), request=job.id, tokens=some_tokens(tokens - 1), prompt_tokens=tokens - 1
    )
    attempt = Attempt(job, asked, ROUTE, Stage.ADOPTING)
    attempt.tokens = tokens
    return attempt


Streams = st.lists(st.tuples(st.integers(2, 60), st.integers(1, 40)), min_size=1, max_size=8)


@given(sizes=Streams, passed=st.integers(0, 5))
def test_it_knows_memory_and_context_of_every_step_ahead(
    sizes: list[tuple[int, int]], passed: int
) -> None:
    batch = Batch(BLOCK_TOKENS)
    batch.pass_steps(passed)
    for index, (tokens, left) in enumerate(sizes):
        batch.join(stream(index, tokens, left))
    assert batch.steps_to_end() == min(left for _, left in sizes)
    for step in range(batch.steps_to_end() + 1):
        lengths = [tokens + step for tokens, _ in sizes]
        used = sum(-(-length // BLOCK_TOKENS) for length in lengths)
        assert batch.used_blocks() == used
        assert batch.used_blocks_max() >= used
        assert batch.context_tokens == sum(lengths)
        batch.pass_steps(1)


@given(sizes=Streams, blocks=st.integers(0, 90), steps=st.integers(0, 60))
def test_it_steps_exactly_while_memory_lasts(
    sizes: list[tuple[int, int]], blocks: int, steps: int
) -> None:
    batch = Batch(BLOCK_TOKENS)
    for index, (tokens, left) in enumerate(sizes):
        batch.join(stream(index, tokens, left))
    within = batch.steps_within(blocks, steps)
    one_by_one = 0
    while one_by_one < steps and batch.used_blocks() <= blocks:
        batch.pass_steps(1)
        one_by_one += 1
    assert within == one_by_one


@given(sizes=Streams, left_early=st.sets(st.integers(0, 7)))
def test_all_end_at_their_step_with_all_their_tokens(
    sizes: list[tuple[int, int]], left_early: set[int]
) -> None:
    batch = Batch(BLOCK_TOKENS)
    streams = [stream(index, tokens, left) for index, (tokens, left) in enumerate(sizes)]
    for one in streams:
        batch.join(one)
    gone = [one for index, one in enumerate(streams) if index in left_early]
    for one in gone:
        batch.leave(one)
        one.move_to(Stage.GONE)
    ended: list[RequestId] = []
    while batch.count:
        batch.pass_steps(batch.steps_to_end())
        for one in batch.take_ended():
            assert one.generated == one.job.target
            assert batch.steps == sizes[one.job.index][1]
            one.move_to(Stage.GONE)
            ended.append(one.job.id)
    assert sorted(ended) == sorted(one.job.id for one in streams if one not in gone)
    assert batch.context_tokens == 0


def test_the_latest_is_who_joined_last_and_is_still_there() -> None:
    batch = Batch(BLOCK_TOKENS)
    first, second, third = (stream(index, 5, 9) for index in range(3))
    for one in (first, second, third):
        batch.join(one)
    batch.leave(third)
    assert batch.latest() is second
