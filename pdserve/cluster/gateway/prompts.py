"""From what a client sent as a prompt to token ids: messages, text, or the ids themselves.

Tokenising takes about a microsecond per byte. Short texts are done on the spot; a long one goes to
a thread, so that it does not hold up every stream of the gateway.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pdserve.cluster.gateway.calls import Session
from pdserve.cluster.gateway.parameters import check_tokens, shown
from pdserve.errors import InvalidField, UnusableValue

INLINE_CHARACTERS_MAX = 8192
"""About 3 ms of tokenising: what may be done on the event loop."""

ROLES = ("system", "developer", "user", "assistant", "tool")


async def chat_prompt(
    session: Session,
    messages: Sequence[Any],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """The token ids of the messages, rendered by the model's chat template; ``arguments`` are what
    this template knows beside."""
    text = session.template.render(
        checked_messages(messages),
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        arguments=arguments,
    )
    return await text_prompt(session, text, field="messages", add_special_tokens=False)


async def text_prompt(
    session: Session, text: str, *, field: str, add_special_tokens: bool
) -> tuple[int, ...]:
    if len(text) <= INLINE_CHARACTERS_MAX:
        tokens = session.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    else:
        tokens = await asyncio.to_thread(
            session.tokenizer.encode, text, add_special_tokens=add_special_tokens
        )
    if not tokens:
        raise UnusableValue(field, "has no token, must have at least one")
    return tuple(tokens)


def token_prompt(session: Session, tokens: Sequence[int], *, field: str) -> tuple[int, ...]:
    check_tokens(field, tokens, session.tokenizer.vocab_size)
    if not tokens:
        raise InvalidField(field, "is empty, must hold at least one token")
    return tuple(tokens)


def checked_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages as chat templates expect them: known roles, and text as one string.

    Raises:
        InvalidField: naming the message, and the part of it, that cannot be used.
    """
    if not messages:
        raise InvalidField("messages", "is empty, must hold at least one message")
    return [_message(f"messages.{index}", message) for index, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidField(where, "must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise InvalidField(f"{where}.role", f"is {shown(role)}, must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if message.get("tool_calls") is not None:  # whoever's: templates look at them without asking
        calls = _calls(f"{where}.tool_calls", message["tool_calls"])
        message = {**message, "tool_calls": calls}
        if calls and content is None and role == "assistant":
            content = ""  # an assistant that called a tool need not have said anything
    # The developer role is OpenAI's newer word for system; templates know the older one.
    known = {"role": "system" if role == "developer" else role}
    return {**message, **known, "content": joined_text(f"{where}.content", content, _part)}


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, as chat templates read them; clients send JSON."""
    if not isinstance(calls, list):
        raise InvalidField(where, f"is {shown(calls)}, must be a list of calls")
    return [_call(f"{where}.{index}.function", call) for index, call in enumerate(calls)]


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidField(
            where, f"is {shown(function)}, must be an object with name and arguments"
        )
    arguments = function.get("arguments")
    if not isinstance(arguments, str | Mapping | None):
        raise InvalidField(f"{where}.arguments", f"is {shown(arguments)}, must be JSON in a text")
    arguments = arguments or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise UnusableValue(
                f"{where}.arguments", f"is {shown(arguments)}, which is not JSON"
            ) from None
    return {**call, "function": {**function, "arguments": arguments}}


def joined_text(where: str, content: Any, part_of: Callable[[str, Any], str]) -> str:
    """A text, or a list of parts, each of which ``part_of`` makes text, given its path.

    Raises:
        InvalidField: it is neither.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidField(where, f"is {shown(content)}, must be text or a list of text parts")
    return "\n".join(part_of(f"{where}.{index}", part) for index, part in enumerate(content))


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise InvalidField(where, f"is of type {shown(kind)}; this model reads text parts only")
    if not isinstance(part.get("text"), str):
        raise InvalidField(f"{where}.text", f"is {shown(part.get('text'))}, must be text")
    return str(part["text"])
