"""Scores of pairs and reranking, as OpenAPI: what is sent, what comes back."""

from collections.abc import Callable
from typing import Any

from pdserve.cluster.http.comparing.asking import TEXTS_MAX, TOP_N_MAX, RerankBody, ScoreBody
from pdserve.cluster.http.comparing.routes import RERANK_PATHS, SCORE_PATHS
from pdserve.cluster.http.openapi.bodies import (
    NULL,
    TEXT,
    WHOLE,
    Facts,
    Schema,
    array_of,
    body_of,
    fields_of,
    object_of,
    whole_number,
)

_SCORE: Schema = {"type": "number", "minimum": -1, "maximum": 1}
_USED = object_of({"prompt_tokens": WHOLE, "total_tokens": WHOLE})
_RESULT: Schema = {
    "type": "object",
    "properties": {
        "index": WHOLE,
        "relevance_score": _SCORE,
        "document": object_of({"text": TEXT}),
    },
    "required": ["index", "relevance_score"],
}

_ANSWERS = {
    "Scores": object_of(
        {
            "id": TEXT,
            "object": {"const": "list"},
            "created": WHOLE,
            "model": TEXT,
            "data": array_of(
                object_of({"index": WHOLE, "object": {"const": "score"}, "score": _SCORE})
            ),
            "usage": _USED,
        }
    ),
    "Ranking": object_of({"id": TEXT, "model": TEXT, "results": array_of(_RESULT), "usage": _USED}),
}


def schemas(facts: Facts) -> dict[str, Schema]:
    """By name."""
    side = {"anyOf": [TEXT, array_of(TEXT, least=1, most=TEXTS_MAX - 1)]}
    fields = fields_of(facts)
    score = fields | dict.fromkeys(("text_1", "text_2", "queries", "documents"), side)
    document = {"anyOf": [TEXT, object_of({"text": TEXT})]}
    unsupported = ("rank_fields", "instruction", "max_chunks_per_doc", "truncation_side")
    rerank = {
        **fields,
        "query": TEXT,
        "documents": array_of(document, least=1, most=TEXTS_MAX - 1),
        "top_n": whole_number(0, TOP_N_MAX),
        "return_documents": {"type": "boolean"},
        "max_tokens_per_doc": whole_number(1, TOP_N_MAX),
        "max_tokens_per_query": whole_number(1, TOP_N_MAX),
        **dict.fromkeys(unsupported, NULL),
    }
    return {
        **_ANSWERS,
        "ScoreRequest": body_of(ScoreBody, score, []),
        "RerankRequest": body_of(RerankBody, rerank, ["query", "documents"]),
    }


def operations(operation: Callable[..., Schema]) -> dict[str, dict[str, Any]]:
    """By path and method; ``operation`` is the document's own way to say one."""
    found: dict[str, dict[str, Any]] = {}
    for paths, name, answer, body in (
        (SCORE_PATHS, "score", "Scores", "ScoreRequest"),
        (RERANK_PATHS, "rerank", "Ranking", "RerankRequest"),
    ):
        for path in paths:
            last = "" if path == paths[0] else path.rpartition("/")[0].replace("/", "_") or "_short"
            found[path] = {"post": operation(f"{name}{last}", answer, body=body)}
    return found
