"""Between the items of the responses API and the messages of a chat. Pure.

    message                 a message; its parts are text
    function_call           a call that the assistant's message before it gets
    function_call_output    a message of the role tool
    reasoning               what the assistant thought, for templates that want it back

An answer's own items come back as they were given out, so one function reads both.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from pdserve.cluster.gateway.parameters import shown
from pdserve.errors import InvalidField

ITEMS_MAX = 4096

ROLES = ("system", "developer", "user", "assistant")
TEXT_PARTS = ("input_text", "output_text", "text")

ID_CHARACTERS_MAX = 64


def new_id(kind: str) -> str:
    """Such as ``msg_…``; nobody guesses one."""
    return f"{kind}_{secrets.token_hex(24)}"


def items_of(said: Any) -> list[dict[str, Any]]:
    """The field ``input`` as a list of items, each with an id.

    Raises:
        InvalidField: naming the item, and the part of it, that cannot be used.
    """
    if isinstance(said, str):
        said = [{"role": "user", "content": said}]
    if not isinstance(said, list):
        raise InvalidField("input", f"is {shown(said)}, must be text or a list of items")
    if not 1 <= len(said) <= ITEMS_MAX:
        raise InvalidField("input", f"has {len(said)} items, must have 1 to {ITEMS_MAX}")
    return [_item(f"input.{index}", item) for index, item in enumerate(said)]


def messages_of(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages that checked items make. Thoughts, text and calls in a row are one message of
    the assistant."""
    messages: list[dict[str, Any]] = []
    for item in items:
        kind = item["type"]
        if kind == "function_call_output":
            messages.append(
                {"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])}
            )
        elif kind == "message" and item["role"] != "assistant":
            messages.append({"role": item["role"], "content": _text(item["content"])})
        else:
            _add(_assistant(messages, kind), item)
    return messages


def _assistant(messages: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The message of the assistant that an item goes to: a new one after anybody else's, and for
    what comes before what is there already."""
    latest = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    begins = kind == "reasoning" or (kind == "message" and latest and latest["content"])
    if latest is None or (begins and (latest["content"] or "tool_calls" in latest)):
        latest = {"role": "assistant", "content": ""}
        messages.append(latest)
    return latest


def _add(message: dict[str, Any], item: Mapping[str, Any]) -> None:
    match item["type"]:
        case "message":
            message["content"] += _text(item["content"])
        case "reasoning":
            thought = "".join(part["text"] for part in item.get("content") or ())
            message["reasoning_content"] = message.get("reasoning_content", "") + thought
        case _:
            function = {"name": item["name"], "arguments": item["arguments"]}
            message.setdefault("tool_calls", []).append(
                {"id": item["call_id"], "type": "function", "function": function}
            )


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _item(where: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise InvalidField(where, f"is {shown(item)}, must be an object")
    kind = item.get("type")
    if kind is None:
        kind = "message"
    if not isinstance(kind, str) or kind not in _READERS:
        raise InvalidField(
            f"{where}.type", f"is {shown(kind)}, must be one of {', '.join(_READERS)}"
        )
    prefix, read = _READERS[kind]
    given = item.get("id")
    if given is not None:
        _is_text(f"{where}.id", given)
    return {"id": given or new_id(prefix), "type": kind, **read(where, item)}


def _message(where: str, item: Mapping[str, Any]) -> dict[str, Any]:
    role = item.get("role")
    if role not in ROLES:
        raise InvalidField(f"{where}.role", f"is {shown(role)}, must be one of {', '.join(ROLES)}")
    kind = "output_text" if role == "assistant" else "input_text"
    parts = _parts(f"{where}.content", item.get("content"), kind)
    return {"role": role, "content": parts, "status": "completed"}


def _parts(where: str, content: Any, kind: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        content = [{"type": kind, "text": content}]
    if not isinstance(content, list):
        raise InvalidField(where, f"is {shown(content)}, must be text or a list of text parts")
    return [_part(f"{where}.{index}", part, kind) for index, part in enumerate(content)]


def _part(where: str, part: Any, kind: str) -> dict[str, Any]:
    said = part.get("type") if isinstance(part, Mapping) else part
    if isinstance(part, Mapping) and said == "refusal":
        return {"type": kind, "text": _is_text(f"{where}.refusal", part.get("refusal"))} | (
            {"annotations": []} if kind == "output_text" else {}
        )
    if not isinstance(part, Mapping) or said not in TEXT_PARTS:
        raise InvalidField(where, f"is of type {shown(said)}; this model reads text parts only")
    text = _is_text(f"{where}.text", part.get("text"))
    return {"type": kind, "text": text} | ({"annotations": []} if kind == "output_text" else {})


def _function_call(where: str, item: Mapping[str, Any]) -> dict[str, Any]:
    names = ("call_id", "name", "arguments")
    return {name: _is_text(f"{where}.{name}", item.get(name)) for name in names} | {
        "status": "completed"
    }


def _function_call_output(where: str, item: Mapping[str, Any]) -> dict[str, Any]:
    output = item.get("output")
    if not isinstance(output, str):
        output = _parts(f"{where}.output", output, "input_text")
    return {
        "call_id": _is_text(f"{where}.call_id", item.get("call_id")),
        "output": output,
        "status": "completed",
    }


def _reasoning(where: str, item: Mapping[str, Any]) -> dict[str, Any]:
    content = item.get("content")
    if content is None:
        content = []
    if not isinstance(content, list):
        raise InvalidField(f"{where}.content", f"is {shown(content)}, must be a list")
    parts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else None
        parts.append(
            {"type": "reasoning_text", "text": _is_text(f"{where}.content.{index}.text", text)}
        )
    return {"summary": [], "content": parts, "status": "completed"}


def _is_text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidField(where, f"is {shown(value)}, must be text")
    return value


_READERS = {
    "message": ("msg", _message),
    "function_call": ("fc", _function_call),
    "function_call_output": ("fco", _function_call_output),
    "reasoning": ("rs", _reasoning),
}
