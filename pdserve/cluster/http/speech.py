"""An assistant's text, told apart: what it thinks, what it says, which tools it calls. Pure."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.config import ReasoningStyle
from pdserve.text.reasoning import Parts, ReasoningParser
from pdserve.text.tool_calls import CallDelta, Style, Told, ToolCallParser


@dataclass(frozen=True, slots=True)
class Manner:
    """How a model's answer is to be read; None: it does not do that."""

    reasoning: ReasoningStyle | None = None
    calls: Style | None = None

    @property
    def is_plain(self) -> bool:
        return self.reasoning is None and self.calls is None


PLAIN = Manner()


class Speech:
    """One choice's text, as it arrives."""

    def __init__(self, manner: Manner) -> None:
        self._thoughts = ReasoningParser(manner.reasoning) if manner.reasoning else None
        self._calls = ToolCallParser(manner.calls) if manner.calls else None

    @property
    def has_calls(self) -> bool:
        return self._calls is not None and self._calls.has_calls

    def delta(self, text: str, *, last: bool) -> dict[str, Any]:
        """The fields of a stream's delta that are settled now; none where nothing is."""
        thought, told = self._push(text, last=last)
        fields: dict[str, Any] = _thought(thought) if thought else {}
        if told.content:
            fields["content"] = told.content
        if told.calls:
            fields["tool_calls"] = [_call_delta(call) for call in told.calls]
        return fields

    def message(self, text: str) -> dict[str, Any]:
        """The fields of a message that hold the whole of ``text``. What is empty is null."""
        thought, told = self._push(text, last=True)
        nothing = None if told.calls or self._thoughts else ""
        fields: dict[str, Any] = {"content": told.content or nothing}
        if self._thoughts is not None:
            fields |= _thought(thought or None)
        if told.calls:
            fields["tool_calls"] = _gathered(told.calls)
        return fields

    def _push(self, text: str, *, last: bool) -> tuple[str, Told]:
        parts = Parts(content=text)
        if self._thoughts is not None:
            parts = self._thoughts.push(text) + (self._thoughts.flush() if last else Parts())
        if self._calls is None:
            return parts.reasoning, Told(parts.content)
        told = self._calls.push(parts.content)
        return parts.reasoning, told + self._calls.flush() if last else told


def in_order(delta: Mapping[str, Any], open_call: int) -> Iterator[tuple[str, Any]]:
    """The parts of a stream's delta in the order in which the model wrote them: a text of
    "reasoning" or of the "message", or a "call".

    A delta does not say that order itself. What goes on with the open call was before all else,
    and a call ends before text begins.

    Args:
        open_call: the index of the call that is being told; -1: none is.
    """
    calls = list(delta.get("tool_calls") or ())
    while calls and calls[0]["index"] == open_call:
        yield "call", calls.pop(0)
    for kind, field in (("reasoning", "reasoning_content"), ("message", "content")):
        if delta.get(field):
            yield kind, delta[field]
    for call in calls:
        yield "call", call


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, **_call(call.name, call.arguments)}


def _gathered(deltas: Sequence[CallDelta]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if delta.name is not None:
            calls.append(_call(delta.name, delta.arguments))
        else:
            calls[delta.index]["function"]["arguments"] += delta.arguments
    return calls


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _thought(reasoning: str | None) -> dict[str, Any]:
    """Under both names that clients read: DeepSeek's, and the one that vLLM gave it later."""
    return {"reasoning_content": reasoning, "reasoning": reasoning}
