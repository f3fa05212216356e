"""The Messages API as JSON Schema: what clients send, and what they get."""

from typing import Any

from pdserve.cluster.gateway import parameters
from pdserve.cluster.http.messages import asking
from pdserve.cluster.http.messages.blocks import ROLES
from pdserve.cluster.http.openapi.bodies import (
    FLAG,
    OBJECT,
    TEXT,
    WHOLE,
    Facts,
    nullable,
    request_schema,
)
from pdserve.cluster.http.tools import TOOLS_MAX

Schema = dict[str, Any]

_NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}


def message_schemas(facts: Facts) -> dict[str, Schema]:
    """By name."""
    count = _count_fields()
    return {
        "MessageRequest": request_schema(
            facts,
            asking.MessageBody,
            count | _message_fields(),
            ["messages", "max_tokens"],
            asking.UNCHANGED,
        ),
        "MessageCountRequest": request_schema(facts, asking.CountBody, count, ["messages"]),
        "Message": _answer(),
        "MessageCount": _of({"input_tokens": WHOLE}),
        "MessageError": _error(),
    }


def _of(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """``optional``: what may be left out."""
    properties = required | (optional or {})
    return {"type": "object", "properties": properties, "required": list(required)}


def _block(kind: str, required: dict[str, Schema], **optional: Schema) -> Schema:
    return _of({"type": {"const": kind}, **required}, optional)


def _texts(*blocks: Schema) -> Schema:
    """Text, or blocks: of text, and of what else ``blocks`` has."""
    kinds = [_block("text", {"text": TEXT}), *blocks]
    return {"anyOf": [TEXT, {"type": "array", "items": {"anyOf": kinds}}]}


def _turn() -> Schema:
    user = _texts(
        _block(
            "tool_result",
            {"tool_use_id": TEXT},
            content=nullable(_texts()),
            is_error=nullable(FLAG),
        )
    )
    assistant = _texts(
        _block("thinking", {"thinking": TEXT}),
        _block("redacted_thinking", {}),
        _block("tool_use", {"id": TEXT, "name": TEXT, "input": OBJECT}),
    )
    content = dict(zip(ROLES, (user, assistant, _texts()), strict=True))
    return {
        "anyOf": [_of({"role": {"const": role}, "content": said}) for role, said in content.items()]
    }


def _count_fields() -> dict[str, Schema]:
    parallel = {"disable_parallel_tool_use": nullable(FLAG)}
    budget = {"type": "integer", "minimum": asking.BUDGET_TOKENS_MIN}
    display = {"display": nullable({"enum": list(asking.DISPLAYS)})}
    form = _block("json_schema", {"schema": OBJECT})
    return {
        "messages": {"type": "array", "items": _turn(), "minItems": 1},
        "system": _texts(),
        "tools": {
            "type": "array",
            "maxItems": TOOLS_MAX,
            "items": _of(
                {"name": _NAME, "input_schema": OBJECT},
                {
                    "type": {"enum": ["custom", None]},
                    "description": nullable(TEXT),
                    "strict": nullable(FLAG),
                },
            ),
        },
        "tool_choice": {
            "anyOf": [
                _of({"type": {"enum": ["auto", "any", "none"]}}, parallel),
                _of({"type": {"const": "tool"}, "name": _NAME}, parallel),
            ]
        },
        "thinking": {
            "anyOf": [
                _of({"type": {"const": "enabled"}, "budget_tokens": budget}, display),
                _of({"type": {"enum": ["adaptive", "disabled"]}}, display),
            ]
        },
        "output_config": _of(
            {}, {"effort": nullable({"enum": list(asking.EFFORTS)}), "format": nullable(form)}
        ),
    }


def _message_fields() -> dict[str, Schema]:
    user = {"type": "string", "maxLength": parameters.TENANT_CHARACTERS_MAX}
    stop = {
        "type": "string",
        "minLength": 1,
        "maxLength": parameters.STOP_STRING_CHARACTERS_MAX,
    }
    return {
        "metadata": _of({}, {"user_id": nullable(user)}),
        "stop_sequences": {
            "type": "array",
            "items": stop,
            "maxItems": parameters.STOP_STRINGS_MAX,
        },
        "service_tier": {"enum": list(asking.TIERS)},
        "speed": {"enum": list(asking.SPEEDS)},
    }


def _answer() -> Schema:
    blocks = [
        _block("text", {"text": TEXT}),
        _block("thinking", {"thinking": TEXT, "signature": TEXT}),
        _block("tool_use", {"id": TEXT, "name": TEXT, "input": OBJECT}),
    ]
    counts = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    usage = dict.fromkeys((*counts, "output_tokens"), WHOLE) | {
        "output_tokens_details": _of({"thinking_tokens": WHOLE}),
        "service_tier": {"enum": ["standard", "priority", "batch"]},
    }
    reasons = ("end_turn", "max_tokens", "stop_sequence", "tool_use")
    return _of(
        {
            "id": TEXT,
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "model": TEXT,
            "content": {"type": "array", "items": {"anyOf": blocks}},
            "stop_reason": {"enum": [*reasons, "model_context_window_exceeded"]},
            "stop_sequence": nullable(TEXT),
            "usage": _of(usage),
        },
        {"pdserve": OBJECT},
    )


def _error() -> Schema:
    details = _of({"error_code": TEXT, "field": nullable(TEXT)})
    return _of(
        {
            "type": {"const": "error"},
            "error": _of({"type": TEXT, "message": TEXT, "details": nullable(details)}),
            "request_id": nullable(TEXT),
        }
    )
