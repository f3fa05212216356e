"""``/v1/score`` and ``/v1/rerank``, with their other names: each text is embedded once, as
``/v1/embeddings`` would, at prefill workers alone; then vectors are compared here."""

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastapi import FastAPI
from starlette.responses import Response

from pdserve.cluster.gateway.calls import Call, Session
from pdserve.cluster.gateway.embedding import Vector, embedded, pooling_call
from pdserve.cluster.gateway.models import Models
from pdserve.cluster.gateway.parameters import check_model, truncated
from pdserve.cluster.gateway.prompts import text_prompt
from pdserve.cluster.http.comparing.asking import RerankBody, ScoreBody, Text
from pdserve.cluster.http.comparing.similarity import ranked, scores_of_pairs
from pdserve.cluster.http.metrics import FrontMetrics, Meter
from pdserve.cluster.http.prompt_answers import Ask, PromptAnswer, note_usage, usage_of
from pdserve.cluster.http.schemas import checked
from pdserve.config import GatewayConfig
from pdserve.prompt_tasks import Pooling, PoolingKind

SCORE_PATHS = ("/v1/score", "/score")
RERANK_PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")

Body = ScoreBody | RerankBody


def add_comparisons(app: FastAPI, models: Models, config: GatewayConfig) -> None:
    metrics: FrontMetrics = app.state.metrics

    async def score() -> Response:
        return _Scores(models, config, metrics)

    async def rerank() -> Response:
        return _Ranking(models, config, metrics)

    for paths, endpoint in ((SCORE_PATHS, score), (RERANK_PATHS, rerank)):
        for path in paths:
            app.post(path)(endpoint)


def _told(body: Body, right: Sequence[Text], scores: Sequence[float]) -> dict[str, Any]:
    if isinstance(body, ScoreBody):
        data = [
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(scores)
        ]
        return {"object": "list", "data": data}
    with_texts = body.return_documents is not False
    results = [
        {
            "index": index,
            "relevance_score": scores[index],
            **({"document": {"text": right[index].text}} if with_texts else {}),
        }
        for index in ranked(scores, body.top())
    ]
    return {"results": results}


@dataclass(frozen=True, slots=True)
class _Wanted:
    id: str
    model: str
    body: Body
    left_count: int
    right: Sequence[Text]
    calls: Sequence[Call]  # of the texts on the left, then of those on the right


class _Comparison(PromptAnswer[_Wanted]):
    kind: ClassVar[type[Body]]

    async def ask(self, asked: Ask) -> _Wanted:
        body: Body = checked(self.kind, asked.tree)
        left, right = body.sides()
        name = f"{self.operation}-{secrets.token_hex(12)}"
        calls = await _calls(asked, body, [*left, *right], name)
        return _Wanted(
            name, calls[0].adapter or asked.session.model_name, body, len(left), right, calls
        )

    async def answer(self, session: Session, wanted: _Wanted, meter: Meter) -> bytes:
        found = await embedded(session, wanted.calls, meter)
        note_usage(meter, [each.timing for each in found])
        return await asyncio.to_thread(_written, wanted, [each.vector for each in found], meter)


class _Scores(_Comparison):
    operation = "score"
    kind = ScoreBody


class _Ranking(_Comparison):
    operation = "rerank"
    kind = RerankBody


def _written(wanted: _Wanted, vectors: Sequence[Vector], meter: Meter) -> bytes:
    scores = scores_of_pairs(vectors[: wanted.left_count], vectors[wanted.left_count :])
    answer = {
        "id": wanted.id,
        "created": int(time.time()),
        "model": wanted.model,
        **_told(wanted.body, wanted.right, scores),
        "usage": usage_of(meter),
    }
    return json.dumps(answer, allow_nan=False, ensure_ascii=False).encode()


async def _calls(asked: Ask, body: Body, texts: Sequence[Text], name: str) -> list[Call]:
    session, limits = asked.session, asked.limits
    adapter = check_model(body.model, session)
    shared = asked.shared(body, adapter)
    special = body.add_special_tokens is not False
    calls = []
    for index, text in enumerate(texts):
        tokens = await text_prompt(session, text.text, field=text.field, add_special_tokens=special)
        tokens = truncated(tokens[: text.tokens_max], body.truncate_prompt_tokens, limits)
        calls.append(
            pooling_call(
                f"{name}-{index}",
                tokens,
                Pooling(PoolingKind(asked.config.pooling)),
                limits,
                prompt_field=text.field,
                **shared,
            )
        )
    return calls
