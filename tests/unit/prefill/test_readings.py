"""Prompts that are read instead of continued: whatever chunks, caches and preemptions come, the
gateway has each score once, and the vector of the whole prompt."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.gateway.calls import Piece
from pdserve.cluster.gateway.prompt_delivery import PromptDelivery
from pdserve.lifecycle import Event, Phase
from pdserve.messages import Cancel, FinishReason, Preempt, Progress, Request
from pdserve.model.scoring import scores_of
from pdserve.prefill.readings import normalized
from pdserve.prompt_tasks import Pooling, PoolingKind, PromptScore, PromptTask, Scoring
from tests.unit.engine.fakes import BLOCK_TOKENS, HIDDEN, entry, logits_of
from tests.unit.engine.rig import Rig, prompt, request

BLOCKS = 64
MEAN, LAST = Pooling(PoolingKind.MEAN), Pooling(PoolingKind.LAST)


def asked(task: PromptTask, length: int, name: str = "r") -> Request:
    plain = request(name, prompt(length))
    return replace(plain, task=task, block_keys=() if task.reads_all else plain.block_keys)


def rows_of(tokens: tuple[int, ...]) -> torch.Tensor:
    kv = b"".join(entry(token, position) for position, token in enumerate(tokens))
    size = len(kv) // len(tokens)
    return torch.from_numpy(
        np.stack([logits_of(kv[: end * size]) for end in range(1, len(tokens) + 1)])
    )


def scores_expected(tokens: tuple[int, ...], top: int) -> list[PromptScore]:
    return scores_of(rows_of(tokens)[:-1], tokens[1:], top)


def vector_expected(tokens: tuple[int, ...], kind: PoolingKind) -> list[float]:
    hidden_NC = rows_of(tokens)[:, :HIDDEN].double()
    vector_C = hidden_NC.mean(dim=0) if kind is PoolingKind.MEAN else hidden_NC[-1]
    found: list[float] = normalized(vector_C.numpy()).astype(np.float32).tolist()
    return found


def pieces(rig: Rig, wanted: Request, *, preempted_after: int | None = None) -> list[Piece]:
    """What the gateway makes of it; the router sends it again each time that it is preempted."""
    loop, delivery = rig.prefills["p0"], PromptDelivery(wanted)
    loop.handle(rig.dispatch(wanted))
    found: list[Piece] = []
    told = steps = 0
    while loop.busy():
        rig.step(loop)
        steps += 1
        if steps == preempted_after:
            loop.handle(Preempt(wanted.request, wanted.attempt, Phase.PREFILLING))
        events = [m for m in rig.to_router if isinstance(m, Progress)]
        for message in events[told:]:
            if message.event is Event.PREEMPTED:
                loop.handle(rig.dispatch(wanted))
        told = len(events)
    for known in rig.known.get(wanted.request, []):
        found += delivery.on_prompt(known)
    for delta in rig.deltas[wanted.request]:
        found += delivery.on_delta(delta)
    assert delivery.finished
    rig.prefills["p0"].pool.check()
    assert loop.load().free_blocks == rig.prefills["p0"].pool.block_count
    return found


@given(
    length=st.integers(1, 40),
    chunk_tokens=st.integers(1, 24),
    top=st.integers(0, 3),
    preempted_after=st.none() | st.integers(1, 6),
    is_cached=st.booleans(),
)
def test_each_token_is_scored_once(
    length: int, chunk_tokens: int, top: int, preempted_after: int | None, is_cached: bool
) -> None:
    rig = Rig()
    rig.prefill(chunk_tokens=chunk_tokens)
    if is_cached:
        pieces(rig, asked(LAST, length, "before"))
    wanted = asked(Scoring(top), length)
    found = pieces(rig, wanted, preempted_after=preempted_after)
    assert [score for piece in found for score in piece.scores] == scores_expected(
        wanted.tokens, top
    )


@given(
    length=st.integers(1, 40),
    before=st.integers(0, 40),
    chunk_tokens=st.integers(1, 24),
    candidates=st.lists(st.integers(0, HIDDEN - 1), max_size=4).map(tuple),
    preempted_after=st.none() | st.integers(1, 6),
    is_cached=st.booleans(),
)
def test_the_last_tokens_are_scored_and_who_could_follow(
    length: int,
    before: int,
    chunk_tokens: int,
    candidates: tuple[int, ...],
    preempted_after: int | None,
    is_cached: bool,
) -> None:
    rig = Rig()
    rig.prefill(chunk_tokens=chunk_tokens)
    if is_cached:
        pieces(rig, asked(LAST, length, "before"))
    first = min(max(1, before), length)
    wanted = asked(Scoring(first=first, candidates=candidates), length)
    found = pieces(rig, wanted, preempted_after=preempted_after)
    scores = [score for piece in found for score in piece.scores]
    assert scores[: length - first] == scores_expected(wanted.tokens, 0)[first - 1 :]
    behind = scores[length - first :]
    assert len(behind) == bool(candidates)
    if behind:
        truth = torch.log_softmax(rows_of(wanted.tokens)[-1].double(), dim=-1)
        assert [token for token, _ in behind[0].top] == list(candidates)
        for token, logprob in behind[0].top:
            assert logprob == pytest.approx(float(truth[token]), abs=1e-5)
        assert behind[0].logprob == max(logprob for _, logprob in behind[0].top)
        best = max(candidates, key=lambda token: float(truth[token]))
        assert behind[0].rank == int((truth > truth[best]).sum()) + 1


def test_what_is_cached_before_the_first_score_is_not_computed_again() -> None:
    rig = Rig()
    rig.prefill(chunk_tokens=32)
    pieces(rig, asked(LAST, 18, "before"))
    for first in (18, 17, 16, 9, 8):
        pieces(rig, asked(Scoring(first=first, candidates=(1,)), 18, f"from {first}"))
    computed = [sum(step) for step in rig.runners["p0"].steps]
    block = BLOCK_TOKENS
    assert computed == [18] + [18 - (first - 1) // block * block for first in (18, 17, 16, 9, 8)]


@given(
    length=st.integers(1, 40),
    chunk_tokens=st.integers(1, 24),
    kind=st.sampled_from(PoolingKind),
    preempted_after=st.none() | st.integers(1, 6),
    is_cached=st.booleans(),
)
def test_a_vector_is_that_of_the_whole_prompt(
    length: int, chunk_tokens: int, kind: PoolingKind, preempted_after: int | None, is_cached: bool
) -> None:
    rig = Rig()
    rig.prefill(chunk_tokens=chunk_tokens)
    if is_cached:
        pieces(rig, asked(LAST, length, "before"))
    wanted = asked(Pooling(kind), length)
    (piece,) = pieces(rig, wanted, preempted_after=preempted_after)
    assert piece.finish is FinishReason.STOP
    vector = np.frombuffer(piece.vector, "<f4")
    np.testing.assert_allclose(vector, vector_expected(wanted.tokens, kind), rtol=1e-6, atol=1e-7)


def test_a_cached_prefix_is_not_computed_again_unless_all_of_it_is_read() -> None:
    rig = Rig()
    rig.prefill(chunk_tokens=32)
    for name, task in (("first", LAST), ("last", LAST), ("mean", MEAN), ("scores", Scoring())):
        pieces(rig, asked(task, 18, name))
    assert [sum(step) for step in rig.runners["p0"].steps] == [18, 2, 18, 18]


def test_it_leaves_no_ticket_and_no_hand_off() -> None:
    rig = Rig()
    rig.prefill()
    pieces(rig, asked(Scoring(), 18))
    assert rig.d_store.tickets == {}
    assert rig.events() == [Event.ENDED]


def test_scored_blocks_are_there_for_who_continues_the_prompt() -> None:
    rig = Rig()
    rig.prefill(chunk_tokens=32)
    rig.decode()
    pieces(rig, asked(Scoring(), 18, "scores"))
    rig.send(request(tokens=prompt(18)))
    rig.run()
    assert [sum(step) for step in rig.runners["p0"].steps] == [18, 2]
    assert rig.tokens() == alone_of(18)


def test_reading_and_generating_prompts_share_a_step() -> None:
    rig = Rig(offload=False)
    rig.prefill(chunk_tokens=32)
    rig.decode()
    wanted = replace(asked(Scoring(1), 9, "scores"), tokens=prompt(9, salt=3))
    rig.send(request(tokens=prompt(10)))
    rig.send(wanted)
    rig.send(asked(MEAN, 7, "mean"))
    rig.run()
    assert rig.runners["p0"].steps[0] == [10, 9, 7]
    assert rig.tokens() == alone_of(10)
    scores = [score for known in rig.known[wanted.request] for score in known.scores]
    assert scores == scores_expected(wanted.tokens, 1)


def alone_of(length: int) -> tuple[int, ...]:
    rig = Rig(offload=False)
    rig.prefill(chunk_tokens=32)
    rig.decode()
    rig.send(request(tokens=prompt(length)))
    rig.run()
    return rig.tokens()


@pytest.mark.parametrize("normalize", [True, False])
def test_a_vector_may_keep_its_length(normalize: bool) -> None:
    rig = Rig()
    rig.prefill(chunk_tokens=4)
    wanted = asked(Pooling(PoolingKind.MEAN, normalize=normalize), 11)
    (piece,) = pieces(rig, wanted)
    vector = np.frombuffer(piece.vector, "<f4")
    mean = rows_of(wanted.tokens)[:, :HIDDEN].double().mean(dim=0).numpy()
    np.testing.assert_allclose(vector, normalized(mean) if normalize else mean, rtol=1e-6)


def test_nothing_is_left_of_one_that_is_cancelled_at_any_step() -> None:
    chance = random.Random(3)
    for _ in range(20):
        rig = Rig()
        loop = rig.prefill(chunk_tokens=4)
        tasks: list[PromptTask] = [MEAN, LAST, Scoring(2)]
        wanted = asked(chance.choice(tasks), 20)
        loop.handle(rig.dispatch(wanted))
        for _ in range(chance.randrange(7)):
            rig.step(loop)
        loop.handle(Cancel(wanted.request))
        while loop.busy():
            rig.step(loop)
        assert (loop.load().free_blocks, loop.load().running) == (loop.pool.block_count, 0)
