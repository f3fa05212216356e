"""From the content blocks of the Messages API to the messages of a chat. Pure.

    text                 part of its message
    tool_use             a call that the assistant's message gets
    tool_result          a message of the role tool
    thinking             what the assistant thought, for templates that want it back
    redacted_thinking    left out: nobody here can read it

The API takes neighbours of one role as one turn, and so do the chats made here: templates of models
that know turns in alternation refuse others. Blocks of one turn are joined by line breaks, as the
parts of a chat's message are.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pdserve.cluster.gateway.parameters import shown
from pdserve.errors import InvalidField

ROLES = ("user", "assistant", "system")

FAILED = "Error: "
"""Before the result of a tool that failed: no template has a field for that."""

_Turn = dict[str, Any]


def turns_of(messages: Sequence[Any], system: Any = None) -> list[_Turn]:
    """The chat's messages that ``messages`` and the field ``system`` make.

    Raises:
        InvalidField: naming the message, and the block of it, that cannot be used.
    """
    turns: list[_Turn] = []
    if system is not None and (text := _plain("system", system)):
        turns.append({"role": "system", "content": text})
    for index, message in enumerate(messages):
        for turn in _turns(f"messages.{index}", message):
            if turns and turns[-1]["role"] == turn["role"] != "tool":
                _join(turns[-1], turn)
            else:
                turns.append(turn)
    return turns


def _turns(where: str, message: Any) -> Iterator[_Turn]:
    if not isinstance(message, Mapping):
        raise InvalidField(where, f"is {shown(message)}, must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise InvalidField(f"{where}.role", f"is {shown(role)}, must be one of {', '.join(ROLES)}")
    content = message.get("content")
    match role:
        case "user":
            yield from _user(f"{where}.content", content)
        case "assistant":
            yield _assistant(f"{where}.content", content)
        case _:
            yield {"role": role, "content": _plain(f"{where}.content", content)}


def _join(before: _Turn, turn: _Turn) -> None:
    """``turn`` as more of the one before it, of the same role."""
    before["content"] = _lines([before["content"], turn["content"]])
    if "reasoning_content" in turn:
        thoughts = [before.get("reasoning_content", ""), turn["reasoning_content"]]
        before["reasoning_content"] = _lines(thoughts)
    if "tool_calls" in turn:
        before["tool_calls"] = [*before.get("tool_calls", ()), *turn["tool_calls"]]


def _user(where: str, content: Any) -> Iterator[_Turn]:
    """Results stand where they stood among the texts."""
    texts: list[str] = []
    has_results = False
    for place, kind, block in _blocks(where, content, ("text", "tool_result")):
        if kind == "text":
            texts.append(_text(place, block, "text"))
            continue
        if texts:
            yield {"role": "user", "content": _lines(texts)}
        texts, has_results = [], True
        yield _result(place, block)
    if texts or not has_results:
        yield {"role": "user", "content": _lines(texts)}


def _result(where: str, block: Mapping[str, Any]) -> _Turn:
    content, failed = block.get("content"), block.get("is_error")
    if failed is not None and not isinstance(failed, bool):
        raise InvalidField(f"{where}.is_error", f"is {shown(failed)}, must be true or false")
    text = "" if content is None else _plain(f"{where}.content", content)
    return {
        "role": "tool",
        "tool_call_id": _text(where, block, "tool_use_id"),
        "content": FAILED * bool(failed) + text,
    }


def _assistant(where: str, content: Any) -> _Turn:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    kinds = ("text", "thinking", "redacted_thinking", "tool_use")
    for place, kind, block in _blocks(where, content, kinds):
        match kind:
            case "text":
                texts.append(_text(place, block, "text"))
            case "thinking":
                thoughts.append(_text(place, block, "thinking"))
            case "tool_use":
                calls.append(_call(place, block))
    turn: _Turn = {"role": "assistant", "content": _lines(texts)}
    if any(thoughts):
        turn["reasoning_content"] = _lines(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return turn


def _call(where: str, block: Mapping[str, Any]) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, Mapping):
        raise InvalidField(f"{where}.input", f"is {shown(arguments)}, must be an object")
    return {
        "id": _text(where, block, "id"),
        "type": "function",
        "function": {"name": _text(where, block, "name"), "arguments": arguments},
    }


def _plain(where: str, content: Any) -> str:
    """A text, or blocks of text alone."""
    return _lines([_text(place, block, "text") for place, _, block in _blocks(where, content)])


def _blocks(
    where: str, content: Any, kinds: Sequence[str] = ("text",)
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Each block with its place and its kind."""
    if isinstance(content, str):
        yield where, "text", {"text": content}
        return
    if not isinstance(content, list):
        raise InvalidField(where, f"is {shown(content)}, must be text or a list of blocks")
    for index, block in enumerate(content):
        place = f"{where}.{index}"
        if not isinstance(block, Mapping):
            raise InvalidField(place, f"is {shown(block)}, must be an object with a type")
        kind = block.get("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise InvalidField(
                f"{place}.type",
                f"is {shown(kind)}; this model reads text alone, so here a block must be of the "
                f"type {' or '.join(kinds)}",
            )
        yield place, kind, block


def _text(where: str, block: Mapping[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidField(f"{where}.{name}", f"is {shown(value)}, must be text")
    return value


def _lines(texts: Sequence[str]) -> str:
    """Those that say anything."""
    return "\n".join(filter(None, texts))
