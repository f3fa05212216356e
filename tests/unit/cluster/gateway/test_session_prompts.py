"""What a call about its prompt submits, in which order, and how it ends."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pdserve.clock import unix_ms
from pdserve.cluster.gateway.calls import Call, Piece
from pdserve.cluster.gateway.session import GatewaySession, Served
from pdserve.errors import PromptTooLong
from pdserve.ids import HostId, WorkerId
from pdserve.kvstore.keys import namespace_digest
from pdserve.messages import (
    Address,
    Beams,
    Cancel,
    FinishReason,
    Lost,
    Request,
    Sampling,
    ServiceClass,
    Stop,
    Submit,
    Timing,
    Token,
    TokenDelta,
)
from pdserve.prompt_tasks import Pooling, PromptDelta, PromptScore, PromptTask, Scoring
from tests.unit.engine.fakes import letters

CONTEXT = 40
PROMPT = tuple(range(9))
SCORES = tuple(PromptScore(-0.5 * index, 1) for index in range(1, len(PROMPT)))


class Gateway(GatewaySession):
    """Without a router: what is submitted is kept, and the test says what comes back."""

    def __init__(self) -> None:
        served = Served("fake", CONTEXT, namespace_digest(model="fake"), 4, streams_max=64)
        super().__init__(served, letters(), host=HostId("h"))
        self.posted: list[object] = []

    def _post(self, message: object) -> None:
        self.posted.append(message)

    def _address(self) -> Address:
        return Address(HostId("h"), "/gw", "")

    @property
    def submitted(self) -> list[Request]:
        return [message.request for message in self.posted if isinstance(message, Submit)]

    def scored(self, request: Request, scores: tuple[PromptScore, ...] = SCORES) -> None:
        self._on_delta(PromptDelta(request.request, request.attempt, 1, scores))

    def ended(self, request: Request, *tokens: int, cached: int = 0) -> None:
        delta = TokenDelta(
            request.request,
            request.attempt,
            0,
            tuple(map(Token, tokens)),
            FinishReason.STOP,
            timing=Timing(prefill_us=5, cached_tokens=cached),
        )
        self._on_delta(delta)


def call(task: PromptTask | None, prompt: tuple[int, ...] = PROMPT, **fields: Any) -> Call:
    plain = Call(
        call="c",
        prompt=prompt,
        n=1,
        sampling=Sampling(),
        stop=Stop(max_tokens=4),
        seed=1,
        tenant="t",
        service_class=ServiceClass.STANDARD,
        deadline_unix_ms=unix_ms() + 600_000,
        task=task,
    )
    return replace(plain, **fields)


def told(asked: Call, *answers: Callable[[Gateway], None]) -> tuple[Gateway, list[Piece]]:
    """The pieces of a call, where each answer is given when nothing more is there to be told."""

    async def run() -> tuple[Gateway, list[Piece]]:
        gateway, pieces, left = Gateway(), list[Piece](), list(answers)
        iterator = aiter(gateway.generate(asked))
        while True:
            coming = asyncio.ensure_future(anext(iterator))
            while not coming.done():
                for _ in range(3):
                    await asyncio.sleep(0)
                if not coming.done():
                    assert left, "it waits, and nothing more is to come"
                    left.pop(0)(gateway)
            try:
                pieces.append(coming.result())
            except StopAsyncIteration:
                assert not left
                return gateway, pieces

    return asyncio.run(run())


def test_a_prompt_is_scored_once_and_then_continued_by_all_choices() -> None:
    def finish_others(gateway: Gateway) -> None:
        for request in gateway.submitted[2:]:
            gateway.ended(request, 7, cached=8)

    gateway, pieces = told(
        call(Scoring(2), n=3),
        lambda g: g.scored(g.submitted[0]),
        lambda g: g.ended(g.submitted[0]),
        lambda g: g.ended(g.submitted[1], 7, cached=8),
        finish_others,
    )
    scoring, *choices = gateway.submitted
    assert (scoring.task, scoring.block_keys, scoring.stop.max_tokens) == (Scoring(2), (), 1)
    assert [(each.task, each.choice, len(each.block_keys)) for each in choices] == [
        (None, choice, 2) for choice in range(3)
    ]
    assert pieces[0].scores == SCORES
    assert [piece.choice for piece in pieces[1:]] == [0, 1, 2]
    timings = [piece.timing for piece in pieces[1:]]
    assert all(timing and timing.cached_tokens == 0 for timing in timings), "it was computed for it"
    assert all(timing and timing.prefill_us == 10 for timing in timings)
    assert gateway.in_flight == 0


def test_without_tokens_the_choices_end_with_the_scores() -> None:
    gateway, pieces = told(
        call(Scoring(), n=2, stop=Stop(max_tokens=0)),
        lambda g: g.scored(g.submitted[0]),
        lambda g: g.ended(g.submitted[0]),
    )
    assert len(gateway.submitted) == 1
    assert [(piece.choice, piece.finish) for piece in pieces[1:]] == [
        (0, FinishReason.LENGTH),
        (1, FinishReason.LENGTH),
    ]


def test_nobody_is_asked_for_an_echo_alone() -> None:
    gateway, pieces = told(call(None, stop=Stop(max_tokens=0)))
    assert gateway.posted == []
    assert [piece.finish for piece in pieces] == [FinishReason.LENGTH]


def test_one_token_has_no_score_to_wait_for() -> None:
    gateway, pieces = told(call(Scoring(), (3,)), lambda g: g.ended(g.submitted[0], 7))
    assert [request.task for request in gateway.submitted] == [None]
    assert [piece.scores for piece in pieces] == [()]


def test_a_vector_is_the_whole_answer() -> None:
    def answer(gateway: Gateway) -> None:
        (request,) = gateway.submitted
        gateway._on_delta(PromptDelta(request.request, 0, vector=b"1234"))
        gateway.ended(request)

    gateway, (piece,) = told(call(Pooling()), answer)
    assert (piece.vector, piece.finish) == (b"1234", FinishReason.STOP)
    assert len(gateway.submitted[0].block_keys) == 2


def test_a_lost_worker_is_followed_by_another_attempt() -> None:
    def lose(gateway: Gateway) -> None:
        (request,) = gateway.submitted
        gateway.hear(Lost(request.request, 0, WorkerId("p0")))

    gateway, pieces = told(
        call(Scoring(), stop=Stop(max_tokens=0)),
        lambda g: g.scored(g.submitted[0], SCORES[:3]),
        lose,
        lambda _: None,  # it is submitted again in a moment
        lambda g: g.scored(g.submitted[1]),
        lambda g: g.ended(g.submitted[1]),
    )
    assert [request.attempt for request in gateway.submitted] == [0, 1]
    assert [score for piece in pieces for score in piece.scores] == list(SCORES)


@pytest.mark.parametrize("beams", [None, Beams(3, 3)])
def test_cancelled_while_it_is_scored_every_choice_ends(beams: Beams | None) -> None:
    def cancel(gateway: Gateway) -> None:
        assert gateway.cancel("c")

    gateway, pieces = told(call(Scoring(), n=3, beams=beams), cancel)
    assert [(piece.choice, piece.finish) for piece in pieces] == [
        (choice, FinishReason.CANCELLED) for choice in range(3)
    ]
    assert isinstance(gateway.posted[-1], Cancel)
    assert gateway.in_flight == 0


def test_a_vector_needs_no_room_behind_its_prompt() -> None:
    full = (1,) * CONTEXT

    def answer(gateway: Gateway) -> None:
        gateway._on_delta(PromptDelta(gateway.submitted[0].request, 0, vector=b"1234"))
        gateway.ended(gateway.submitted[0])

    told(call(Pooling(), full), answer)
    for task, prompt in ((Pooling(), (*full, 1)), (Scoring(), full), (None, full)):
        with pytest.raises(PromptTooLong):
            told(call(task, prompt))
