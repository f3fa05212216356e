"""Decisions, as OpenAPI: what is sent, what comes back."""

from collections.abc import Callable
from typing import Any

from pdserve.cluster.http.decisions.asking import (
    CHOICES_MAX,
    CHOICES_MIN,
    LABEL_CHARACTERS_MAX,
    LEVELS_MAX,
    LEVELS_MIN,
    NAME_CHARACTERS_MAX,
    QUESTIONS_MAX,
)
from pdserve.cluster.http.decisions.routes import PATH
from pdserve.cluster.http.openapi.bodies import (
    FLAG,
    OBJECT,
    TEXT,
    WHOLE,
    Facts,
    Schema,
    array_of,
    fields_of,
    item_of,
    nullable,
    object_of,
)
from pdserve.cluster.http.responses.items import ROLES

_SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
_LABEL: Schema = {"type": "string", "minLength": 1, "maxLength": LABEL_CHARACTERS_MAX}
_VALUE: Schema = {"anyOf": [TEXT, FLAG]}


def _only(required: dict[str, Schema], optional: dict[str, Schema]) -> Schema:
    """An object with these fields and no others; optional ones may be null."""
    return {
        "type": "object",
        "properties": required | {name: nullable(each) for name, each in optional.items()},
        "required": list(required),
        "additionalProperties": False,
    }


_PART: Schema = {
    "anyOf": [
        object_of({"type": {"const": "input_text"}, "text": TEXT}),
        object_of({"type": {"const": "input_json"}, "data": {"type": ["object", "array"]}}),
    ]
}
_MESSAGE = object_of({"role": {"enum": list(ROLES)}, "content": array_of(_PART)})


def _question(kind: str, own: dict[str, Schema]) -> Schema:
    asked = {"anyOf": [TEXT | {"minLength": 1}, array_of(_PART, least=1)]}
    name = {"type": "string", "maxLength": NAME_CHARACTERS_MAX}
    return _only({"type": {"const": kind}, "instructions": asked, **own}, {"name": name})


def _answer(kind: str, own: dict[str, Schema]) -> Schema:
    return object_of({"type": {"const": kind}, "name": nullable(TEXT), **own})


_CHOICE = object_of({"value": _VALUE, "probability": _SHARE})
_LEVEL = object_of({"value": WHOLE, "label": TEXT, "probability": _SHARE})
_ANSWERS = [
    _answer("predicate", {"probability": _SHARE}),
    _answer("choice", {"choice": _VALUE, "probabilities": array_of(_CHOICE), "confidence": _SHARE}),
    _answer(
        "score",
        {
            "score": {"type": "number", "minimum": 0, "maximum": LEVELS_MAX - 1},
            "probabilities": array_of(_LEVEL),
            "confidence": _SHARE,
        },
    ),
]
_DECISION = object_of(
    {
        "model": TEXT,
        "answers": array_of({"anyOf": _ANSWERS}),
        "usage": object_of(
            {
                "input_tokens": WHOLE,
                "input_tokens_details": object_of(
                    {"cached_tokens": WHOLE, "cache_write_tokens": WHOLE}
                ),
                "output_tokens": WHOLE,
                "output_tokens_details": object_of({"reasoning_tokens": WHOLE}),
                "total_tokens": WHOLE,
            }
        ),
    }
)


def schemas(facts: Facts) -> dict[str, Schema]:
    """By name."""
    fields = fields_of(facts)
    choice = _only({"value": {"anyOf": [_LABEL, FLAG]}}, {"description": TEXT})
    level = _only({"label": _LABEL}, {"description": TEXT})
    choices = array_of(choice, least=CHOICES_MIN, most=CHOICES_MAX)
    levels = array_of(level, least=LEVELS_MIN, most=LEVELS_MAX)
    questions = [
        _question("predicate", {}),
        _question("choice", {"choices": choices}),
        _question("score", {"levels": levels}),
    ]
    request = _only(
        {
            "input": {"anyOf": [TEXT, array_of({"anyOf": [item_of(), _MESSAGE]}, least=1)]},
            "questions": array_of({"anyOf": questions}, least=1, most=QUESTIONS_MAX),
        },
        {
            "model": fields["model"],
            "safety_identifier": TEXT,
            "prompt_cache_key": TEXT,
            "prompt_cache_options": OBJECT,
            "user": fields["user"],
            "service_tier": fields["service_tier"],
        },
    )
    return {"DecisionRequest": request, "Decision": _DECISION}


def operations(operation: Callable[..., Schema]) -> dict[str, dict[str, Any]]:
    """By path and method; ``operation`` is the document's own way to say one."""
    return {PATH: {"post": operation("decide", "Decision", body="DecisionRequest")}}
