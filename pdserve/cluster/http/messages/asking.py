"""From a body of the Messages API to the chat that answers it, and its errors back.

The translation ends in the chat's own body, so bounds, tools, constraints, tenants and deadlines
are those of a chat. Whoever is refused reads the names of the fields that were sent.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from pydantic import Field

from pdserve.cluster.gateway.calls import Session
from pdserve.cluster.gateway.parameters import SERVICE_TIERS, shown
from pdserve.cluster.gateway.prompts import chat_prompt
from pdserve.cluster.http.asking import Asked, chat_asked, flag_of
from pdserve.cluster.http.messages.blocks import turns_of
from pdserve.cluster.http.responses.asking import renamed
from pdserve.cluster.http.resuming import HEADER, WANTED_HEADER
from pdserve.cluster.http.schemas import Body, ChatBody, Objects, Texts, checked
from pdserve.cluster.http.tools import tools_of
from pdserve.config import GatewayConfig
from pdserve.errors import ConflictingFields, InvalidField, PdserveError, UnusableValue

BUDGET_TOKENS_MIN = 1024
"""Of ``thinking``, as the API has it."""

EFFORTS = ("low", "medium", "high", "xhigh", "max")
DISPLAYS = ("summarized", "omitted")
THINKING = ("enabled", "adaptive", "disabled")
TIERS = ("standard_only", *SERVICE_TIERS)
SPEEDS = ("standard", "fast")

UNCHANGED = (
    *("temperature", "top_p", "top_k", "min_p", "min_tokens", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "logit_bias", "seed"),
    *("stop_token_ids", "ignore_eos", "skip_special_tokens", "structured_outputs"),
    *("prompt_cache_retention", "include_timing", "pdserve"),
)
"""Fields that a chat has under the same name and with the same meaning; all but the first three are
vLLM's and ours."""


class CountBody(Body):
    """What the tokens of a prompt depend on."""

    messages: Annotated[list[Any], Field(fail_fast=True)]
    system: Any = None
    tools: Objects | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="For the model's chat template, such as enable_thinking."
    )

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {
        "container": (),
        "mcp_servers": ([],),
        "inference_geo": ("global",),
    }


class MessageBody(CountBody):
    max_tokens: int
    metadata: dict[str, Any] | None = None
    stop_sequences: Texts | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    service_tier: str | None = None
    speed: str | None = None


@dataclass(frozen=True, slots=True)
class MessageAsked(Asked):
    """A chat, and what its answer as a message depends on beside."""

    shows_thoughts: bool
    is_window_bound: bool  # the context ends before max_tokens does


async def message_asked(
    session: Session,
    config: GatewayConfig,
    tree: Mapping[str, Any],
    headers: Mapping[str, str],
    tenant: str | None,
) -> MessageAsked:
    """What the body ``tree`` asks for.

    Raises:
        InvalidField, PromptTooLong: in the words of this API.
    """
    body = checked(MessageBody, tree)
    last = HEADER.lower()
    if last in headers or flag_of(headers, WANTED_HEADER):
        name = last if last in headers else WANTED_HEADER
        raise InvalidField(name, "is for completions; the events of a message have no ids")
    check_thinking(body, thinks=config.reasoning_parser is not None)
    if body.messages and _role_of(body.messages[-1]) == "assistant":
        raise UnusableValue(
            f"messages.{len(body.messages) - 1}",
            "is the assistant's, and to go on with its text is not supported; end with a message "
            "of the user",
        )
    chat = chat_body(body, tree)
    try:
        asked = await chat_asked(session, config, chat, headers, tenant)
    except PdserveError as error:
        raise renamed(error, _NAMES) from None
    return MessageAsked(
        **{each.name: getattr(asked, each.name) for each in fields(asked)},
        shows_thoughts=(body.thinking or {}).get("display") != "omitted",
        is_window_bound=asked.calls[0].stop.max_tokens < body.max_tokens,
    )


async def counted(session: Session, config: GatewayConfig, tree: Mapping[str, Any]) -> int:
    """How many tokens the prompt has, also one that the context does not hold.

    Raises:
        InvalidField: in the words of this API.
    """
    body = checked(CountBody, tree)
    check_thinking(body, thinks=config.reasoning_parser is not None)
    try:
        chat = checked(ChatBody, chat_body(body, {}))
        tools = tools_of(chat.tools, chat.tool_choice, chat.parallel_tool_calls)
        prompt = await chat_prompt(
            session,
            chat.messages,
            tools=tools.tools if tools else None,
            arguments=chat.chat_template_kwargs,
        )
    except PdserveError as error:
        raise renamed(error, _NAMES) from None
    return len(prompt)


def chat_body(body: CountBody, extras: Mapping[str, Any]) -> dict[str, Any]:
    """The chat that gives the same answer. Pure.

    Args:
        extras: the body as it was sent, for the fields that ``UNCHANGED`` names.
    """
    choice, parallel = _tool_choice(body.tool_choice)
    chat: dict[str, Any] = {name: extras[name] for name in UNCHANGED if name in extras}
    chat |= {
        "model": body.model,
        "messages": turns_of(body.messages, body.system),
        "tools": [_tool(f"tools.{at}", tool) for at, tool in enumerate(body.tools or ())] or None,
        "tool_choice": choice,
        "parallel_tool_calls": parallel,
        "response_format": _response_format(body.output_config or {}),
        "chat_template_kwargs": _template_arguments(body),
    }
    if isinstance(body, MessageBody):
        chat |= {
            "max_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            "stream": bool(body.stream),
            "user": _user(body.metadata or {}),
            "service_tier": _tier(body),
        }
    assert set(chat) <= set(ChatBody.model_fields)
    return {name: value for name, value in chat.items() if value is not None}


def check_thinking(body: CountBody, *, thinks: bool) -> None:
    """
    Args:
        thinks: the model's thoughts are told apart from what it says.

    Raises:
        InvalidField: it is not as it must be, or asks for what this model does not do.
    """
    said = body.thinking
    if said is None:
        return
    kind, display = said.get("type"), said.get("display")
    if kind not in THINKING:
        raise InvalidField(
            "thinking.type", f"is {shown(kind)}, must be one of {', '.join(THINKING)}"
        )
    if display is not None and display not in DISPLAYS:
        raise InvalidField(
            "thinking.display", f"is {shown(display)}, must be one of {', '.join(DISPLAYS)}"
        )
    if kind != "enabled":
        return
    budget = said.get("budget_tokens")
    # True is an int to Python, and less than that.
    if not isinstance(budget, int) or budget < BUDGET_TOKENS_MIN:
        raise InvalidField(
            "thinking.budget_tokens",
            f"is {shown(budget)}, must be a whole number from {BUDGET_TOKENS_MIN} on",
        )
    if isinstance(body, MessageBody) and budget >= body.max_tokens:
        raise ConflictingFields(
            "thinking.budget_tokens",
            f"is {shown(budget)}, must be less than max_tokens, which is {shown(body.max_tokens)}",
        )
    if not thinks:
        raise UnusableValue(
            "thinking.type",
            "is 'enabled', and this model does not think; leave thinking out, or say 'adaptive', "
            "which lets the model decide",
        )
    if (body.tool_choice or {}).get("type") in ("any", "tool"):
        raise ConflictingFields(
            "thinking.type",
            "is 'enabled', and an answer that must call a tool has no thoughts; let tool_choice be "
            "auto or none",
        )
    if (body.output_config or {}).get("format") is not None:
        raise ConflictingFields(
            "thinking.type",
            "is 'enabled', and an answer that follows output_config.format has no thoughts; leave "
            "one of them out",
        )


_NAMES = (
    (re.compile(r"^messages\..*"), "messages"),
    (re.compile(r"^stop\b"), "stop_sequences"),
    (re.compile(r"^user$"), "metadata.user_id"),
    (re.compile(r"^response_format(\.json_schema)?"), "output_config.format"),
    (re.compile(r"^(tools\.\d+)\.function\.parameters"), r"\1.input_schema"),
    (re.compile(r"^(tools\.\d+)\.function"), r"\1"),
    (re.compile(r"^tool_choice\.function"), "tool_choice"),
)
"""The chat's names, and this API's. ``blocks`` names what is wrong within a message itself."""


def _role_of(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _tool(where: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise InvalidField(
            f"{where}.type",
            f"is {shown(kind)}; this server knows no tools of its own, only custom is supported",
        )
    schema = tool.get("input_schema")
    if not isinstance(schema, Mapping):
        raise InvalidField(f"{where}.input_schema", f"is {shown(schema)}, must be a JSON schema")
    function = {name: tool[name] for name in ("name", "description", "strict") if name in tool}
    return {"type": "function", "function": {**function, "parameters": schema}}


def _tool_choice(said: Mapping[str, Any] | None) -> tuple[Any, bool | None]:
    """The chat's ``tool_choice`` and ``parallel_tool_calls``."""
    if said is None:
        return None, None
    alone = said.get("disable_parallel_tool_use")
    if alone is not None and not isinstance(alone, bool):
        raise InvalidField(
            "tool_choice.disable_parallel_tool_use", f"is {shown(alone)}, must be true or false"
        )
    parallel = None if alone is None else not alone
    match said.get("type"):
        case "auto" | "none" as same:
            return same, parallel
        case "any":
            return "required", parallel
        case "tool":
            return {"type": "function", "function": {"name": said.get("name")}}, parallel
        case other:
            raise InvalidField(
                "tool_choice.type", f"is {shown(other)}, must be one of auto, any, tool, none"
            )


def _response_format(config: Mapping[str, Any]) -> dict[str, Any] | None:
    said = config.get("format")
    if said is None:
        return None
    where = "output_config.format"
    if not isinstance(said, Mapping) or said.get("type") != "json_schema":
        kind = said.get("type") if isinstance(said, Mapping) else said
        raise InvalidField(f"{where}.type", f"is {shown(kind)}, must be json_schema")
    schema = said.get("schema")
    if not isinstance(schema, Mapping):
        raise InvalidField(f"{where}.schema", f"is {shown(schema)}, must be a JSON schema")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _template_arguments(body: CountBody) -> dict[str, Any] | None:
    """Whether and how much to think, in the ways in which models' templates are told."""
    effort = (body.output_config or {}).get("effort")
    if effort is not None and effort not in EFFORTS:
        raise InvalidField(
            "output_config.effort", f"is {shown(effort)}, must be one of {', '.join(EFFORTS)}"
        )
    said: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    kind = (body.thinking or {}).get("type")
    if kind in ("enabled", "disabled"):
        said["enable_thinking"] = kind == "enabled"
    return said | (body.chat_template_kwargs or {}) or None


def _user(metadata: Mapping[str, Any]) -> str | None:
    user = metadata.get("user_id")
    if user is not None and not isinstance(user, str):
        raise InvalidField("metadata.user_id", f"is {shown(user)}, must be text")
    return user


def _tier(body: MessageBody) -> str | None:
    """The service tier; where none is said, that of the speed."""
    for name, known in (("service_tier", TIERS), ("speed", SPEEDS)):
        value = getattr(body, name)
        if value is not None and value not in known:
            raise InvalidField(name, f"is {shown(value)}, must be one of {', '.join(known)}")
    tier = body.service_tier or body.speed
    return "standard" if tier == "standard_only" else tier
