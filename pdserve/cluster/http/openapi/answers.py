"""What clients get, as JSON Schema."""

from typing import Any

from pdserve.cluster.http.openapi.bodies import FLAG, OBJECT, TEXT, WHOLE, nullable

Schema = dict[str, Any]

_NUMBER: Schema = {"type": "number"}


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """``optional``: what is not always there."""
    properties = required | (optional or {})
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_ENTRY = {"token": TEXT, "logprob": _NUMBER, "bytes": _list(WHOLE)}
_SCORES = _object(
    {
        "content": _list(_object({**_ENTRY, "top_logprobs": _list(_object(_ENTRY))})),
        "refusal": {"type": "null"},
    }
)
_LEGACY_SCORES = _object(
    {
        "tokens": _list(TEXT),
        "text_offset": _list(WHOLE),
        "token_logprobs": _list(nullable(_NUMBER)),
        "top_logprobs": _list(nullable({"type": "object", "additionalProperties": _NUMBER})),
    }
)
_CALL = _object(
    {
        "id": TEXT,
        "type": {"const": "function"},
        "function": _object({"name": TEXT, "arguments": TEXT}),
    }
)
_ENDS = {"finish_reason": TEXT, "stop_reason": {"type": ["string", "integer", "null"]}}
_USAGE = _object(
    {
        "prompt_tokens": WHOLE,
        "completion_tokens": WHOLE,
        "total_tokens": WHOLE,
        "prompt_tokens_details": _object({"cached_tokens": WHOLE}),
    }
)


def _completion(kind: str, choice: Schema, beside: dict[str, Schema] | None = None) -> Schema:
    return _object(
        {
            "id": TEXT,
            "object": {"const": kind},
            "created": WHOLE,
            "model": TEXT,
            "choices": _list(choice),
            "usage": _USAGE,
        },
        {"pdserve": OBJECT, **(beside or {})},
    )


_MESSAGE = _object(
    {"role": {"const": "assistant"}, "content": nullable(TEXT), "refusal": {"type": "null"}},
    {
        "tool_calls": _list(_CALL),
        "reasoning": nullable(TEXT),
        "reasoning_content": nullable(TEXT),
    },
)
_IDS = {"token_ids": _list(WHOLE)}
_PROMPT_SCORES = {
    "prompt_logprobs": _list(
        nullable(
            {
                "type": "object",
                "additionalProperties": _object(
                    {"logprob": _NUMBER, "rank": WHOLE, "decoded_token": TEXT}
                ),
            }
        )
    )
}

_MODEL = _object(
    {
        "id": TEXT,
        "object": {"const": "model"},
        "type": {"const": "model"},
        "display_name": TEXT,
        "created": WHOLE,
        "created_at": TEXT,
        "owned_by": TEXT,
        "root": TEXT,
        "parent": nullable(TEXT),
        "max_model_len": WHOLE,
    }
)

_PART = {
    "anyOf": [
        _object({"type": {"const": "output_text"}, "text": TEXT, "annotations": _list(OBJECT)}),
        _object({"type": {"enum": ["reasoning_text", "input_text"]}, "text": TEXT}),
    ]
}
_STATUS = {"enum": ["in_progress", "completed", "incomplete"]}
_ITEM = {
    "anyOf": [
        _object(
            {
                "type": {"const": "message"},
                "id": TEXT,
                "role": TEXT,
                "content": _list(_PART),
                "status": _STATUS,
            }
        ),
        _object(
            {
                "type": {"const": "reasoning"},
                "id": TEXT,
                "summary": _list(OBJECT),
                "content": _list(_PART),
                "status": _STATUS,
            }
        ),
        _object(
            {
                "type": {"const": "function_call"},
                "id": TEXT,
                "call_id": TEXT,
                "name": TEXT,
                "arguments": TEXT,
                "status": _STATUS,
            }
        ),
        _object(
            {
                "type": {"const": "function_call_output"},
                "id": TEXT,
                "call_id": TEXT,
                "output": {"anyOf": [TEXT, _list(_PART)]},
                "status": _STATUS,
            }
        ),
    ]
}
_RESPONSE = _object(
    {
        "id": TEXT,
        "object": {"const": "response"},
        "created_at": WHOLE,
        "completed_at": nullable(WHOLE),
        "status": {
            "enum": ["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
        },
        "background": FLAG,
        "error": nullable(_object({"code": TEXT, "message": TEXT})),
        "incomplete_details": nullable(_object({"reason": TEXT})),
        "instructions": nullable(TEXT),
        "max_output_tokens": nullable(WHOLE),
        "metadata": {"type": "object", "additionalProperties": TEXT},
        "model": TEXT,
        "output": _list(_ITEM),
        "parallel_tool_calls": FLAG,
        "previous_response_id": nullable(TEXT),
        "service_tier": TEXT,
        "store": FLAG,
        "temperature": _NUMBER,
        "text": OBJECT,
        "tool_choice": {"anyOf": [TEXT, OBJECT]},
        "tools": _list(OBJECT),
        "top_p": _NUMBER,
        "truncation": TEXT,
        "usage": nullable(
            _object(
                {
                    "input_tokens": WHOLE,
                    "input_tokens_details": OBJECT,
                    "output_tokens": WHOLE,
                    "output_tokens_details": OBJECT,
                    "total_tokens": WHOLE,
                }
            )
        ),
    }
)

ANSWERS: dict[str, Schema] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": TEXT,
                    "type": TEXT,
                    "param": nullable(TEXT),
                    "code": nullable(TEXT),
                }
            )
        }
    ),
    "ChatCompletion": _completion(
        "chat.completion",
        _object(
            {"index": WHOLE, "message": _MESSAGE, "logprobs": nullable(_SCORES), **_ENDS}, _IDS
        ),
        _PROMPT_SCORES,
    ),
    "Completion": _completion(
        "text_completion",
        _object(
            {"index": WHOLE, "text": TEXT, "logprobs": nullable(_LEGACY_SCORES), **_ENDS},
            _IDS | _PROMPT_SCORES,
        ),
    ),
    "EmbeddingList": _object(
        {
            "id": TEXT,
            "object": {"const": "list"},
            "created": WHOLE,
            "model": TEXT,
            "data": _list(
                _object(
                    {
                        "object": {"const": "embedding"},
                        "index": WHOLE,
                        "embedding": {"anyOf": [_list(_NUMBER), TEXT]},
                    }
                )
            ),
            "usage": _USAGE,
        }
    ),
    "Model": _MODEL,
    "ModelList": _object(
        {
            "object": {"const": "list"},
            "data": _list(_ref("Model")),
            "first_id": nullable(TEXT),
            "last_id": nullable(TEXT),
            "has_more": {"const": False},
        }
    ),
    "Response": _RESPONSE,
    "InputTokens": _object({"object": {"const": "response.input_tokens"}, "input_tokens": WHOLE}),
    "ResponseDeleted": _object(
        {"id": TEXT, "object": {"const": "response"}, "deleted": {"const": True}}
    ),
    "ItemList": _object(
        {
            "object": {"const": "list"},
            "data": _list(_ITEM),
            "first_id": nullable(TEXT),
            "last_id": nullable(TEXT),
            "has_more": FLAG,
        }
    ),
    "Tokens": _object(
        {
            "count": WHOLE,
            "max_model_len": WHOLE,
            "tokens": _list(WHOLE),
            "token_strs": nullable(_list(TEXT)),
        },
        {"block_keys": _list(TEXT)},
    ),
    "Text": _object({"prompt": TEXT}),
    "TokenizerInfo": _object(
        {
            "tokenizer_class": TEXT,
            "vocab_size": WHOLE,
            "model_max_length": WHOLE,
            "bos_token": nullable(TEXT),
            "eos_token": nullable(TEXT),
            "pad_token": nullable(TEXT),
            "chat_template": nullable(TEXT),
        }
    ),
    "Health": _object({"status": {"const": "ok"}}),
    "Version": _object({"version": TEXT}),
    "Load": _object({"server_load": WHOLE}),
    "Ready": _object({"ready": FLAG}),
    "Live": _object({"live": FLAG}),
    "Figures": OBJECT,
}
