"""From a body of the responses API to the chat that answers it, and its errors back.

The translation ends in the chat's own body, so bounds, tools, constraints and deadlines are those
of a chat. Whoever is refused reads the names of the fields that were sent.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from pdserve.cluster.gateway.calls import Session
from pdserve.cluster.gateway.parameters import shown
from pdserve.cluster.http.asking import Asked, chat_asked
from pdserve.cluster.http.responses.items import items_of, messages_of
from pdserve.cluster.http.schemas import Body, ChatBody, Extension, checked
from pdserve.config import GatewayConfig
from pdserve.errors import ConflictingFields, InvalidField, PdserveError

METADATA_PAIRS_MAX = 16
METADATA_KEY_CHARACTERS_MAX = 64
METADATA_VALUE_CHARACTERS_MAX = 512

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
INCLUDES_LOGPROBS = "message.output_text.logprobs"

UNCHANGED = (
    *("temperature", "top_p", "user", "service_tier", "prompt_cache_retention"),
    *("parallel_tool_calls", "top_k", "min_p", "min_tokens", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "logit_bias", "seed"),
    *("stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output"),
    *("skip_special_tokens", "structured_outputs", "pdserve"),
)
"""Fields that a chat has under the same name and with the same meaning."""


class ResponsesBody(Body):
    input: Any = Field(None, description="Text, or a list of items.")
    instructions: str | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = None
    truncation: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    service_tier: str | None = None
    prompt_cache_retention: str | None = None
    conversation: Any = None
    prompt: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    pdserve: Extension | None = None


@dataclass(frozen=True, slots=True)
class ResponseAsked:
    body: ResponsesBody
    asked: Asked  # the chat
    items: Sequence[Mapping[str, Any]]  # of this input alone
    messages: Sequence[Mapping[str, Any]]  # all so far, without instructions

    @property
    def is_stored(self) -> bool:
        return self.body.store is not False


def checked_body(tree: Mapping[str, Any]) -> ResponsesBody:
    """The body, with what needs no session checked.

    Raises:
        InvalidField
    """
    body = checked(ResponsesBody, tree)
    for name in ("conversation", "prompt"):
        if getattr(body, name) is not None:
            raise InvalidField(name, "is not supported; send all of it in input")
    if body.background and body.store is False:
        raise ConflictingFields("store", "is false, and a background response must be stored")
    if body.stream_options and not body.stream:
        raise ConflictingFields("stream_options", "is for streams only; set stream to true")
    if body.truncation not in (None, "disabled", "auto"):
        raise InvalidField("truncation", f"is {shown(body.truncation)}, must be disabled or auto")
    check_metadata(body.metadata or {})
    return body


async def response_asked(
    session: Session,
    config: GatewayConfig,
    body: ResponsesBody,
    headers: Mapping[str, str],
    tenant: str | None,
    *,
    before: Sequence[Mapping[str, Any]],
    extras: Mapping[str, Any],
) -> ResponseAsked:
    """What ``body`` asks for.

    Args:
        before: the messages of the responses that it goes on from.
        extras: the body as it was sent, for the fields that ``UNCHANGED`` names.

    Raises:
        InvalidField, PromptTooLong: in the words of this API.
    """
    items = items_of(body.input)
    messages = [*before, *messages_of(items)]
    try:
        asked = await chat_asked(
            session, config, chat_body(body, messages, extras), headers, tenant
        )
    except PdserveError as error:
        raise renamed(error, _NAMES) from None
    return ResponseAsked(body, asked, items, messages)


def chat_body(
    body: ResponsesBody, messages: Sequence[Mapping[str, Any]], extras: Mapping[str, Any]
) -> dict[str, Any]:
    """The chat that gives the same answer. Pure."""
    chat = {name: extras[name] for name in UNCHANGED if extras.get(name) is not None}
    if body.instructions is not None:
        messages = [{"role": "system", "content": body.instructions}, *messages]
    with_logprobs = INCLUDES_LOGPROBS in (body.include or ()) or body.top_logprobs is not None
    chat |= {
        "model": body.model,
        "messages": list(messages),
        "max_completion_tokens": body.max_output_tokens,
        "stream": bool(body.stream),
        "logprobs": with_logprobs or None,
        "top_logprobs": body.top_logprobs,
        "response_format": _response_format(body.text or {}),
        "tools": [_tool(f"tools.{at}", tool) for at, tool in enumerate(body.tools or ())] or None,
        "tool_choice": _tool_choice(body.tool_choice),
        "chat_template_kwargs": _template_arguments(body),
    }
    assert set(chat) <= set(ChatBody.model_fields)
    return {name: value for name, value in chat.items() if value is not None}


def renamed(error: PdserveError, names: Sequence[tuple[re.Pattern[str], str]]) -> PdserveError:
    """The error of a chat with another API's name of the field: ``names`` has, for those that
    differ, the chat's and what stands in its place."""
    if error.field is None:
        return error
    field = error.field
    for pattern, name in names:
        field = pattern.sub(name, field)
    if isinstance(error, InvalidField):
        return type(error)(field, str(error).removeprefix(f"{error.field}: "))
    error.field = field
    return error


_NAMES = (
    (re.compile(r"^messages\b.*"), "input"),
    (re.compile(r"^max_completion_tokens$"), "max_output_tokens"),
    (re.compile(r"^response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"^(tools\.\d+)\.function"), r"\1"),
    (re.compile(r"^tool_choice\.allowed_tools"), "tool_choice"),
    (re.compile(r"^tool_choice(.*)\.function"), r"tool_choice\1"),
)


def _tool(where: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise InvalidField(
            f"{where}.type",
            f"is {shown(tool.get('type'))}; this server runs no tools of its own, "
            "only function is supported",
        )
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if name in tool}}


def _tool_choice(choice: Any) -> Any:
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") != "allowed_tools":
        raise InvalidField(
            "tool_choice.type", f"is {shown(choice.get('type'))}, must be function or allowed_tools"
        )
    tools = choice.get("tools")
    if isinstance(tools, list):
        tools = [_tool_choice(tool) for tool in tools if isinstance(tool, Mapping)]
    return {
        "type": "allowed_tools",
        "allowed_tools": {"mode": choice.get("mode"), "tools": tools},
    }


def _response_format(text: Mapping[str, Any]) -> dict[str, Any] | None:
    said = text.get("format")
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise InvalidField("text.format", f"is {shown(said)}, must be an object with a type")
    if said.get("type") != "json_schema":
        return dict(said)
    names = ("name", "schema", "strict", "description")
    return {
        "type": "json_schema",
        "json_schema": {name: said[name] for name in names if name in said},
    }


def _template_arguments(body: ResponsesBody) -> dict[str, Any] | None:
    """How much to think, in the two ways in which models' templates are told."""
    effort = (body.reasoning or {}).get("effort")
    if effort is None:
        return body.chat_template_kwargs
    if effort not in EFFORTS:
        raise InvalidField(
            "reasoning.effort", f"is {shown(effort)}, must be one of {', '.join(EFFORTS)}"
        )
    said = {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
    return said | (body.chat_template_kwargs or {})


def check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > METADATA_PAIRS_MAX:
        raise InvalidField(
            "metadata", f"has {len(metadata)} pairs, at most {METADATA_PAIRS_MAX} are allowed"
        )
    for key, value in metadata.items():
        if len(key) > METADATA_KEY_CHARACTERS_MAX or len(value) > METADATA_VALUE_CHARACTERS_MAX:
            raise InvalidField(
                "metadata",
                f"has the pair {shown(key)}; a key has at most {METADATA_KEY_CHARACTERS_MAX} "
                f"characters, a value {METADATA_VALUE_CHARACTERS_MAX}",
            )
