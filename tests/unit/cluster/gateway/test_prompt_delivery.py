"""Each score of a prompt reaches the client once, over attempts and repetitions; a vector whole."""

import random

import pytest

from pdserve.cluster.gateway.prompt_delivery import PromptDelivery
from pdserve.errors import ErrorInfo, FrameError, OutOfBlocks
from pdserve.ids import BlockKey, HostId, RequestId
from pdserve.messages import (
    Address,
    FinishReason,
    Request,
    Sampling,
    ServiceClass,
    Stop,
    Timing,
    TokenDelta,
)
from pdserve.prompt_tasks import (
    Pooling,
    PoolingKind,
    PromptDelta,
    PromptScore,
    PromptTask,
    Scoring,
)

SEED = 11
LENGTH = 40
SCORES = tuple(PromptScore(-0.1 * index, index) for index in range(1, LENGTH))
KEYS = (BlockKey(b"k" * 16),)


def delivery(task: PromptTask) -> PromptDelivery:
    return PromptDelivery(
        Request(
            request=RequestId("r"),
            attempt=0,
            choice=0,
            model="m",
            tokens=tuple(range(LENGTH)),
            prompt_tokens=LENGTH,
            block_keys=(),
            tenant="",
            service_class=ServiceClass.STANDARD,
            sampling=Sampling(),
            stop=Stop(max_tokens=1),
            seed=0,
            deadline_unix_ms=0,
            reply_to=Address(HostId("h"), "", ""),
            task=task,
        )
    )


def scores(first: int, end: int, *, attempt: int = 0) -> PromptDelta:
    return PromptDelta(RequestId("r"), attempt, first, SCORES[first - 1 : end - 1])


def end(*, attempt: int = 0, error: ErrorInfo | None = None) -> TokenDelta:
    finish = FinishReason.STOP if error is None else FinishReason.ERROR
    return TokenDelta(RequestId("r"), attempt, 0, (), finish, error=error, timing=Timing())


def test_scores_come_once_whatever_is_repeated_and_lost() -> None:
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    for _ in range(200):
        one, got, attempt, at = delivery(Scoring()), list[PromptScore](), 0, 1
        while at < LENGTH:
            match chance.randrange(6):
                case 0:  # its worker died
                    one.next_attempt(KEYS)
                    stale = scores(at, min(LENGTH, at + 5), attempt=attempt)
                    assert one.on_prompt(stale) == []
                    attempt, at = attempt + 1, 1
                case 1:  # it was preempted, and begins again in the same attempt
                    at = 1
                case _:
                    until = min(LENGTH, at + chance.randrange(1, 9))
                    for piece in one.on_prompt(scores(at, until, attempt=attempt)):
                        got += piece.scores
                    at = until
        assert one.on_delta(end(attempt=attempt)) == []
        assert one.finished
        assert tuple(got) == SCORES


def test_a_gap_and_an_early_end_are_said() -> None:
    with pytest.raises(FrameError, match="token 1"):
        delivery(Scoring()).on_prompt(scores(3, 5))
    with pytest.raises(FrameError, match="before its prompt was scored"):
        delivery(Scoring()).on_delta(end())
    with pytest.raises(FrameError, match="without a vector"):
        delivery(Pooling()).on_delta(end())


def test_a_vector_comes_with_the_end() -> None:
    one = delivery(Pooling())
    assert one.on_prompt(PromptDelta(RequestId("r"), 0, vector=b"1234")) == []
    (piece,) = one.on_delta(end())
    assert (piece.vector, piece.finish, piece.timing) == (b"1234", FinishReason.STOP, Timing())
    assert one.on_delta(end()) == []
    assert one.on_prompt(PromptDelta(RequestId("r"), 0, vector=b"1234")) == []


def test_an_error_is_the_callers() -> None:
    one = delivery(Pooling())
    with pytest.raises(OutOfBlocks):
        one.on_delta(end(error=ErrorInfo.of(OutOfBlocks(3, 2, retry_after_ms=1))))
    assert one.finished


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        (Pooling(), KEYS),
        (Pooling(PoolingKind.MEAN), ()),
        (Scoring(), ()),
    ],
)
def test_an_attempt_names_the_blocks_that_may_be_taken_from_a_cache(
    task: PromptTask, keys: tuple[BlockKey, ...]
) -> None:
    again = delivery(task).next_attempt(KEYS)
    assert (again.attempt, again.block_keys, again.tokens) == (1, keys, tuple(range(LENGTH)))
