"""``/v1/decisions``: one input, many questions, answers that are probabilities.

    input + question 1 ──► prefill, alone: its blocks hold the input
    input + question 2 ─┐
    input + question 3 ─┼► prefill, side by side: cached prefix, short suffix
            …          ─┘

Nothing is generated, so no decode worker is asked. What is read, and how labels of several tokens
are compared, is in ``labels``.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from pdserve.cluster.gateway.calls import Call, Piece, Session
from pdserve.cluster.gateway.models import Models
from pdserve.cluster.gateway.parameters import check_model
from pdserve.cluster.gateway.prompts import chat_prompt
from pdserve.cluster.gateway.side_by_side import answered_each
from pdserve.cluster.http.decisions.asking import (
    Question,
    decision_body,
    messages_before,
    questions_of,
    with_question,
)
from pdserve.cluster.http.decisions.labels import Tokens, expected, probabilities, stems_of
from pdserve.cluster.http.metrics import FrontMetrics, Meter
from pdserve.cluster.http.prompt_answers import Ask, PromptAnswer, note_usage
from pdserve.config import GatewayConfig
from pdserve.errors import ConflictingFields, FrameError, PromptTooLong
from pdserve.messages import Sampling, Stop
from pdserve.prompt_tasks import Scoring

PATH = "/v1/decisions"

PASSES_MAX = 4096
"""Prompts that one request may make. Questions whose labels begin alike make few."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """One prompt: that of a question, and the beginning of some of its labels."""

    question: int
    stem: Tokens
    call: Call


@dataclass(frozen=True, slots=True)
class _Wanted:
    model: str
    questions: tuple[Question, ...]
    passes: tuple[_Pass, ...]

    @property
    def calls(self) -> list[Call]:
        return [each.call for each in self.passes]


def add_decisions(app: FastAPI, models: Models, config: GatewayConfig) -> None:
    metrics: FrontMetrics = app.state.metrics

    @app.post(PATH)
    async def decide() -> Response:
        return _Decisions(models, config, metrics)


class _Decisions(PromptAnswer[_Wanted]):
    operation = "decisions"

    async def ask(self, asked: Ask) -> _Wanted:
        return await _wanted(asked)

    async def answer(self, session: Session, wanted: _Wanted, meter: Meter) -> bytes:
        return await _answer(session, wanted, meter)


async def _wanted(asked: Ask) -> _Wanted:
    session = asked.session
    body = decision_body(asked.tree)
    adapter = check_model(body.model, session)
    limits = asked.limits
    messages = messages_before(body.input)
    questions = questions_of(body.questions, session.tokenizer.encode)
    stems = [stems_of(question.labels) for question in questions]
    count = sum(map(len, stems))
    if count > PASSES_MAX:
        raise ConflictingFields(
            "questions",
            f"makes {count} passes over the prompt, since their labels begin in as many ways, at "
            f"most {PASSES_MAX} are done; ask fewer questions at once, or shorten the labels",
        )
    name = f"decn-{secrets.token_hex(12)}"
    shared = asked.shared(body, adapter)
    passes: list[_Pass] = []
    for index, (question, behind) in enumerate(zip(questions, stems, strict=True)):
        prompt = await chat_prompt(session, with_question(messages, question))
        for stem, candidates in behind.items():
            if len(prompt) + len(stem) >= limits.context_tokens:
                raise PromptTooLong(
                    len(prompt) + len(stem), limits.context_tokens, field=f"questions.{index}"
                )
            call = Call(
                call=f"{name}-{len(passes)}",
                prompt=prompt + stem,
                n=1,
                sampling=Sampling(),
                stop=Stop(max_tokens=0),
                seed=0,
                prompt_field=f"questions.{index}",
                **shared,
                task=Scoring(first=len(prompt), candidates=candidates),
            )
            passes.append(_Pass(index, stem, call))
    return _Wanted(adapter or session.model_name, tuple(questions), tuple(passes))


async def _answer(session: Session, wanted: _Wanted, meter: Meter) -> bytes:
    first = await answered_each(session, meter.calls[:1], meter)  # so that others find its blocks
    others = await answered_each(session, meter.calls[1:], meter, after=1)
    answers = [*first, *others]
    ends = [piece for pieces in answers for piece in pieces if piece.finish is not None]
    note_usage(meter, [piece.timing for piece in ends])
    found: list[dict[Tokens, tuple[float, dict[int, float]]]] = [{} for _ in wanted.questions]
    for each, pieces in zip(wanted.passes, answers, strict=True):
        found[each.question][each.stem] = _read(each, pieces)
    told = [
        _told(question, probabilities(question.labels, behind))
        for question, behind in zip(wanted.questions, found, strict=True)
    ]
    body = {
        "model": wanted.model,
        "answers": told,
        "usage": {
            "input_tokens": meter.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": meter.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": meter.prompt_tokens,
        },
    }
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()


def _read(each: _Pass, pieces: Sequence[Piece]) -> tuple[float, dict[int, float]]:
    """The stem's log-probability, and that of each token behind it."""
    scores = [score for piece in pieces for score in piece.scores]
    if len(scores) != len(each.stem) + 1:
        raise FrameError(f"{each.call.call} was answered with {len(scores)} scores")
    return sum(score.logprob for score in scores[:-1]), dict(scores[-1].top)


def _told(question: Question, shares: Sequence[float]) -> dict[str, Any]:
    """In OpenAI's shape. Confidence is the probability of the likeliest answer."""
    answer = {"type": question.kind, "name": question.name}
    if question.kind == "predicate":
        return {**answer, "probability": shares[0]}
    best = max(range(len(shares)), key=lambda index: shares[index])
    if question.kind == "choice":
        each = [
            {"value": value, "probability": share}
            for value, share in zip(question.values, shares, strict=True)
        ]
        said: dict[str, Any] = {"choice": question.values[best]}
    else:
        each = [
            {"value": level, "label": label, "probability": share}
            for level, (label, share) in enumerate(zip(question.values, shares, strict=True))
        ]
        said = {"score": expected(shares)}
    return {**answer, **said, "probabilities": each, "confidence": shares[best]}
