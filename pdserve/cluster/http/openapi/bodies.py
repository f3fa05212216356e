"""What clients send, as JSON Schema: each field with the bounds that the server checks.

The names of the fields come from the bodies themselves (``http.schemas``), so none is forgotten.
What a schema cannot say is refused under a code of its own: ``conflicting_fields`` for what does
not go together, ``unusable_value`` for a text that is no JSON or a schema that nothing follows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.cluster.gateway import parameters
from pdserve.cluster.gateway.constraints import CHOICES_MAX
from pdserve.cluster.gateway.prompts import ROLES
from pdserve.cluster.http.asking import PROMPTS_MAX
from pdserve.cluster.http.embeddings import DIMENSIONS_MAX, ENCODINGS, INPUTS_MAX
from pdserve.cluster.http.responses import asking as responses
from pdserve.cluster.http.responses.items import ITEMS_MAX, TEXT_PARTS
from pdserve.cluster.http.responses.items import ROLES as ITEM_ROLES
from pdserve.cluster.http.schemas import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
    unsupported_in,
)
from pdserve.cluster.http.tools import TOOLS_MAX

Schema = dict[str, Any]

NULL: Schema = {"type": "null"}
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
WHOLE: Schema = {"type": "integer"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the document must know of the model that is served."""

    models: tuple[str, ...]
    context_tokens: int
    vocab_size: int
    n_max: int


def bodies(facts: Facts) -> dict[str, Schema]:
    """By name."""
    fields = fields_of(facts)
    chat = fields | {
        "messages": {"type": "array", "items": _message(), "minItems": 1},
        "logprobs": FLAG,
        "tools": {"type": "array", "items": _tool(nested=True), "maxItems": TOOLS_MAX},
        "tool_choice": _tool_choice(nested=True),
    }
    completion = fields | {
        "prompt": _prompt(facts, most=PROMPTS_MAX),
        "logprobs": whole_number(0, min(parameters.LOGPROBS_MAX, facts.vocab_size)),
        "max_tokens": whole_number(0, facts.context_tokens),
    }
    embedding = fields | {
        "input": _prompt(facts, most=INPUTS_MAX),
        "encoding_format": {"enum": list(ENCODINGS)},
        "dimensions": whole_number(1, DIMENSIONS_MAX),
    }
    tokenize = fields | {
        "prompt": TEXT,
        "prompt_token_ids": array_of(_token(facts)),
        "messages": {"type": "array", "items": _message(), "minItems": 1},
    }
    return {
        "ChatCompletionRequest": body_of(ChatBody, chat, ["messages"]),
        "CompletionRequest": body_of(CompletionBody, completion, ["prompt"]),
        "EmbeddingRequest": body_of(EmbeddingBody, embedding, ["input"]),
        "TokenizeRequest": body_of(TokenizeBody, tokenize, []),
        "DetokenizeRequest": body_of(
            DetokenizeBody, {**fields, "tokens": array_of(_token(facts))}, ["tokens"]
        ),
        "ResponseRequest": _response(facts),
        "RoleRequest": {
            "type": "object",
            "properties": {
                "worker": TEXT | {"minLength": 1},
                "role": {"enum": ["prefill", "decode", "both", "none"]},
            },
            "required": ["worker", "role"],
        },
    }


def body_of(kind: type[Body], fields: Mapping[str, Schema], required: Iterable[str]) -> Schema:
    """An object with the fields of ``kind``; all but the required ones may be null."""
    required = list(required)
    properties = {
        name: fields[name] if name in required else nullable(fields[name])
        for name in kind.model_fields
    }
    properties |= {
        name: {"enum": [None, *harmless], "description": "Its effect is not supported."}
        for name, harmless in unsupported_in(kind).items()
    }
    return {"type": "object", "properties": properties, "required": required}


def request_schema(
    facts: Facts,
    kind: type[Body],
    own: Mapping[str, Schema],
    required: Iterable[str],
    unchanged: Iterable[str] = (),
) -> Schema:
    """The body of an API that becomes a chat.

    Args:
        own: fields that are not as a chat has them.
        unchanged: the chat's fields that it takes beside those of ``kind``.
    """
    fields = fields_of(facts)
    body = body_of(kind, {**fields, **own}, required)
    same = set(unchanged) - set(body["properties"])
    body["properties"] |= {name: nullable(fields[name]) for name in sorted(same)}
    return body


def nullable(schema: Schema) -> Schema:
    if "enum" in schema:
        return schema | {"enum": [*schema["enum"], None]}
    if "anyOf" in schema:
        return schema | {"anyOf": [*schema["anyOf"], NULL]}
    return {"anyOf": [schema, NULL]}


def fields_of(facts: Facts) -> dict[str, Schema]:
    """The fields that more than one body has."""
    p = parameters
    flags = (
        *("stream", "return_token_ids", "include_timing", "ignore_eos", "add_special_tokens"),
        *("include_stop_str_in_output", "skip_special_tokens", "use_beam_search", "echo"),
        *("add_generation_prompt", "parallel_tool_calls", "return_token_strs"),
        *("return_block_keys", "background", "store", "normalize", "use_activation"),
    )
    count = whole_number(1, facts.context_tokens)
    stop = {"type": "string", "minLength": 1, "maxLength": p.STOP_STRING_CHARACTERS_MAX}
    schema: Schema = {"anyOf": [OBJECT, FLAG, TEXT]}
    return dict.fromkeys(flags, FLAG) | {
        "model": {"enum": [*facts.models, ""], "description": "As /v1/models lists them."},
        "n": whole_number(1, facts.n_max),
        "best_of": whole_number(1, facts.n_max),
        "max_tokens": count,
        "max_completion_tokens": count,
        "max_output_tokens": count,
        "min_tokens": whole_number(0, facts.context_tokens),
        "temperature": _number(0, 2),
        "top_p": _number(0, 1, above=True),
        "top_k": whole_number(-1, p.TOP_K_MAX),
        "min_p": _number(0, 1),
        "repetition_penalty": _number(0, 10, above=True),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        "length_penalty": _number(-p.LENGTH_PENALTY_MAX, p.LENGTH_PENALTY_MAX),
        "no_repeat_ngram_size": whole_number(0, p.NO_REPEAT_NGRAM_SIZE_MAX),
        "logit_bias": {
            "type": "object",
            "propertyNames": {"pattern": f"^({below(facts.vocab_size)})$"},
            "additionalProperties": _number(-100, 100),
            "maxProperties": p.LOGIT_BIAS_MAX,
        },
        "seed": whole_number(p.SEED_MIN, p.SEED_MAX),
        "stop": {"anyOf": [stop, array_of(stop, most=p.STOP_STRINGS_MAX)]},
        "stop_token_ids": array_of(_token(facts), most=p.STOP_TOKENS_MAX),
        "top_logprobs": whole_number(0, min(p.LOGPROBS_MAX, facts.vocab_size)),
        "prompt_logprobs": whole_number(0, min(p.LOGPROBS_MAX, facts.vocab_size)),
        "truncate_prompt_tokens": {
            "anyOf": [{"const": -1}, whole_number(1, facts.context_tokens - 1)],
        },
        "user": {"type": "string", "maxLength": p.TENANT_CHARACTERS_MAX},
        "service_tier": {"enum": list(p.SERVICE_TIERS)},
        "prompt_cache_retention": {
            "type": "string",
            "pattern": "^(in_memory|in-memory|[0-9]{1,12}[smhd])$",
        },
        "priority": WHOLE,
        "early_stopping": {"enum": [True, False, "never"]},
        "stream_options": {
            "type": "object",
            "properties": {
                "include_usage": nullable(FLAG),
                "continuous_usage_stats": nullable(FLAG),
            },
        },
        "pdserve": {"type": "object", "properties": {"why": nullable(FLAG)}},
        "chat_template_kwargs": OBJECT,
        "response_format": _response_format(nested=True),
        "structured_outputs": _structured_outputs(schema),
        "guided_json": schema,
        "guided_regex": TEXT,
        "guided_choice": array_of(TEXT, least=1, most=CHOICES_MAX),
        "guided_grammar": TEXT,
    }


def _response(facts: Facts) -> Schema:
    words = dict.fromkeys(
        ("instructions", "previous_response_id", "prompt_cache_key", "safety_identifier"), TEXT
    )
    own = words | {
        "input": {"anyOf": [TEXT, {**array_of(item_of(), least=1), "maxItems": ITEMS_MAX}]},
        "stream_options": OBJECT,
        "include": array_of(TEXT),
        "max_tool_calls": WHOLE,
        "metadata": metadata(),
        "reasoning": {
            "type": "object",
            "properties": {"effort": nullable({"enum": list(responses.EFFORTS)})},
        },
        "text": {
            "type": "object",
            "properties": {"format": nullable(_response_format(nested=False))},
        },
        "tools": {"type": "array", "items": _tool(nested=False), "maxItems": TOOLS_MAX},
        "tool_choice": _tool_choice(nested=False),
        "truncation": {"enum": ["auto", "disabled"]},
        "conversation": NULL,
        "prompt": NULL,
    }
    return request_schema(facts, responses.ResponsesBody, own, ["input"], responses.UNCHANGED)


def metadata() -> Schema:
    return {
        "type": "object",
        "propertyNames": {"maxLength": responses.METADATA_KEY_CHARACTERS_MAX},
        "additionalProperties": {
            "type": "string",
            "maxLength": responses.METADATA_VALUE_CHARACTERS_MAX,
        },
        "maxProperties": responses.METADATA_PAIRS_MAX,
    }


# ── messages and items ───────────────────────────────────────────────────────────────────────────


def _message() -> Schema:
    part = object_of({"type": {"const": "text"}, "text": TEXT})
    content: Schema = {"anyOf": [TEXT, array_of({"anyOf": [TEXT, part]})]}
    function = {
        "type": "object",
        "properties": {"name": TEXT, "arguments": {"anyOf": [TEXT, OBJECT, NULL]}},
        "required": ["name"],
    }
    calls = array_of(object_of({"function": function}))
    said = {
        "type": "object",
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": content,
            "tool_calls": nullable(calls),
        },
        "required": ["role", "content"],
    }
    called = {
        "type": "object",
        "properties": {
            "role": {"const": "assistant"},
            "content": nullable(content),
            "tool_calls": {**calls, "minItems": 1},
        },
        "required": ["role", "tool_calls"],
    }
    return {"anyOf": [said, called]}


def item_of() -> Schema:
    text = object_of({"type": {"enum": list(TEXT_PARTS)}, "text": TEXT})
    refusal = object_of({"type": {"const": "refusal"}, "refusal": TEXT})
    content: Schema = {"anyOf": [TEXT, array_of({"anyOf": [text, refusal]})]}
    kinds: dict[str, dict[str, Schema]] = {
        "message": {"role": {"enum": list(ITEM_ROLES)}, "content": content},
        "function_call": {"call_id": TEXT, "name": TEXT, "arguments": TEXT},
        "function_call_output": {"call_id": TEXT, "output": content},
        "reasoning": {},
    }
    items = []
    for kind, fields in kinds.items():
        item = object_of({"type": {"const": kind}, **fields})
        item["properties"]["id"] = nullable(TEXT)
        items.append(item)
    items[0]["properties"]["type"] = {"enum": ["message", None]}
    items[0]["required"].remove("type")
    items[3]["properties"]["content"] = nullable(array_of(object_of({"text": TEXT})))
    return {"anyOf": items}


def _prompt(facts: Facts, *, most: int) -> Schema:
    tokens = array_of(_token(facts), least=1)
    several = array_of({"anyOf": [TEXT, tokens]}, least=1, most=most)
    return {"anyOf": [TEXT, tokens, several]}


# ── tools and formats: nested as chats have them, or flat as responses do ────────────────────────

_NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}


def _tool(*, nested: bool) -> Schema:
    function: Schema = {
        "type": "object",
        "properties": {
            "name": _NAME,
            "description": nullable(TEXT),
            "parameters": nullable(OBJECT),
            "strict": nullable(FLAG),
        },
        "required": ["name"],
    }
    if nested:
        return object_of({"type": {"const": "function"}, "function": function})
    function["properties"]["type"] = {"const": "function"}
    return function | {"required": ["type", "name"]}


def _tool_choice(*, nested: bool) -> Schema:
    kind = {"type": {"const": "function"}}
    named = object_of(
        {**kind, **({"function": object_of({"name": _NAME})} if nested else {"name": _NAME})}
    )
    listed = object_of({"function": object_of({"name": _NAME})}) if nested else named
    allowed: dict[str, Schema] = {
        "mode": {"enum": ["auto", "required"]},
        "tools": array_of(listed),
    }
    inner = {"allowed_tools": object_of(allowed)} if nested else allowed
    several = object_of({"type": {"const": "allowed_tools"}, **inner})
    return {"anyOf": [{"enum": ["auto", "none", "required"]}, named, several]}


def _response_format(*, nested: bool) -> Schema:
    named: Schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
            "schema": OBJECT,
            "strict": nullable(FLAG),
        },
        "required": ["name", "schema"],
    }
    kind = {"type": {"const": "json_schema"}}
    if nested:
        schema = object_of({**kind, "json_schema": named})
    else:
        schema = named | {"required": ["type", "name", "schema"]}
        schema["properties"] = named["properties"] | kind
    plain = object_of({"type": {"enum": ["text", "json_object"]}})
    return {"anyOf": [plain, schema]}


def _structured_outputs(schema: Schema) -> Schema:
    kinds: dict[str, Schema] = {
        "json": schema,
        "json_object": {"const": True},
        "regex": TEXT,
        "choice": array_of(TEXT, least=1, most=CHOICES_MAX),
        "grammar": TEXT,
    }
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {other: own if other == kind else NULL for other in kinds},
                "required": [kind],
                "additionalProperties": {"enum": [None, False]},
            }
            for kind, own in kinds.items()
        ]
    }


# ── small pieces ─────────────────────────────────────────────────────────────────────────────────


def object_of(properties: dict[str, Schema]) -> Schema:
    """All of which are required."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def array_of(items: Schema, *, least: int = 0, most: int | None = None) -> Schema:
    bounds = {"minItems": least} if least else {}
    return {"type": "array", "items": items, **bounds, **({"maxItems": most} if most else {})}


def whole_number(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _number(low: float, high: float, *, above: bool = False) -> Schema:
    """From ``low`` to ``high``, or above ``low``."""
    return {"type": "number", "exclusiveMinimum" if above else "minimum": low, "maximum": high}


def _token(facts: Facts) -> Schema:
    return whole_number(0, facts.vocab_size - 1)


def below(limit: int) -> str:
    """A regular expression for the whole numbers from 0 to ``limit - 1``, without leading zeros.

    A number is smaller where it has fewer digits, or where it has a smaller digit after the same
    first ones.
    """
    digits = str(limit - 1)
    fewer = [f"[1-9][0-9]{{{count - 1}}}" for count in range(1, len(digits))]
    same = [digits]
    for at, digit in enumerate(digits):
        least = 0 if at else 1
        if int(digit) > least:
            rest = len(digits) - at - 1
            same.append(f"{digits[:at]}[{least}-{int(digit) - 1}][0-9]{{{rest}}}")
    return "|".join(["0", *fewer, *same] if limit > 1 else ["0"])
