"""The calls of tools in a model's answer, apart from what it says. Pure, and incremental.

Models write a call as a JSON object with a name and its arguments, and differ in what stands
around it:

    hermes        <tool_call>{"name": …, "arguments": …}</tool_call>, among text; also Qwen 2.5, 3
    llama3_json   the answer begins with {"name": …, "parameters": …}; several with ; between
    required      [{"name": …, "arguments": …}, …], which is all there is: what the answer is
                  constrained to where a tool must be called

A call is told as soon as its name is known, and its arguments as they come, as the text that the
model wrote. What turns out to be no call is content, every character of it. What is told does not
depend on how the stream was cut into pushes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

from pdserve.config import ToolCallStyle
from pdserve.text.call_object import CallObject

Style = ToolCallStyle | Literal["required"]

CALLS_MAX = 128
"""Of one answer; what would be the next is content."""

PYTHON_TAG = "<|python_tag|>"
"""What Llama 3 may write before a call."""


@dataclass(frozen=True, slots=True)
class CallDelta:
    """More of call ``index``. ``name`` stands in the first of each call alone."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Told:
    content: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __add__(self, other: "Told") -> "Told":
        return Told(self.content + other.content, self.calls + other.calls)


class _Place(StrEnum):
    BEGINNING = "beginning"  # calls from here on, or none at all
    CONTENT = "content"
    CALL = "call"  # within a call's object
    BETWEEN = "between"  # behind one


@dataclass(frozen=True, slots=True)
class _Form:
    """What stands around calls."""

    opens: str
    divides: str  # between two calls; "" where each is opened and closed
    closes: str
    in_text: bool  # whether calls may come behind content


_FORMS: Mapping[Style, _Form] = MappingProxyType(
    {
        "hermes": _Form("<tool_call>", "", "</tool_call>", in_text=True),
        "llama3_json": _Form("", ";", "", in_text=False),
        "required": _Form("[", ",", "]", in_text=False),
    }
)


class ToolCallParser:
    """One answer's text, as it arrives."""

    def __init__(self, style: Style) -> None:
        self._form = _FORMS[style]
        self._place = _Place.CONTENT if self._form.in_text else _Place.BEGINNING
        self._held = ""  # not settled yet
        self._call = CallObject()
        self._unsaid: str | None = None  # of a call whose name is not known yet
        self._call_count = 0

    @property
    def has_calls(self) -> bool:
        return self._call_count > 0

    def push(self, text: str) -> Told:
        """What is settled now."""
        self._held += text
        told = Told()
        while True:
            before = self._place, len(self._held)
            told += self._step()
            if (self._place, len(self._held)) == before:
                return told

    def flush(self) -> Told:
        """What was kept back and, now that no more comes, is no call."""
        rest, self._held, self._unsaid = (self._unsaid or "") + self._held, "", None
        closing = self._place is _Place.BETWEEN and self._form.closes.startswith(rest.strip())
        return Told() if self.has_calls and (closing or not rest.strip()) else Told(rest)

    # ── places ───────────────────────────────────────────────────────────────────────────────────

    def _step(self) -> Told:
        match self._place:
            case _Place.BEGINNING:
                return self._at_beginning()
            case _Place.CONTENT:
                return self._in_content()
            case _Place.CALL:
                return self._in_call()
            case _Place.BETWEEN:
                return self._between()

    def _at_beginning(self) -> Told:
        text = self._held.lstrip().removeprefix(PYTHON_TAG).lstrip()
        opens = self._form.opens or "{"
        if text.startswith(opens):
            self._open(0, len(self._held) - len(text) + len(self._form.opens))
        elif not (opens.startswith(text) or PYTHON_TAG.startswith(text)):
            self._place = _Place.CONTENT
        return Told()

    def _in_content(self) -> Told:
        content, opens = self._held, self._form.opens
        if self._form.in_text and self._call_count < CALLS_MAX:
            start = content.find(opens)
            if start >= 0:
                content = content[:start].rstrip()
                self._open(len(content), start + len(opens))
                return Told(content)
            content = content[: _settled_length(content, opens)]
        self._held = self._held[len(content) :]
        return Told(content)

    def _in_call(self) -> Told:
        taken = self._call.take(self._held)
        text, self._held = self._held[:taken], self._held[taken:]
        if self._unsaid is not None:
            self._unsaid += text
        told = self._said()
        if self._call.ended:
            self._place = _Place.BETWEEN
            if self._unsaid is not None:  # it had no name
                self._place = _Place.CONTENT
                told, self._unsaid = Told(self._unsaid), None
        return told

    def _between(self) -> Told:
        form, text = self._form, self._held.lstrip()
        if form.closes.startswith(text):
            if text and text == form.closes:
                self._place, self._held = _Place.CONTENT, ""
        elif form.closes and text.startswith(form.closes):
            self._place, self._held = _Place.CONTENT, text[len(form.closes) :]
        elif form.divides and text.startswith(form.divides) and self._call_count < CALLS_MAX:
            self._open(0, len(self._held) - len(text) + len(form.divides))
        elif text:
            self._place = _Place.CONTENT
        return Told()

    # ── calls ────────────────────────────────────────────────────────────────────────────────────

    def _open(self, settled: int, start: int) -> None:
        """Of what is held, ``settled`` characters have been told; a call begins at ``start``."""
        self._place, self._call = _Place.CALL, CallObject()
        self._unsaid, self._held = self._held[settled:start], self._held[start:]

    def _said(self) -> Told:
        if self._call.name is None:
            return Told()
        arguments = self._call.take_arguments()
        if self._unsaid is not None:
            self._unsaid = None
            self._call_count += 1
            return Told(calls=(CallDelta(self._call_count - 1, self._call.name, arguments),))
        if not arguments:
            return Told()
        return Told(calls=(CallDelta(self._call_count - 1, arguments=arguments),))


def _settled_length(text: str, tag: str) -> int:
    """Without what may become the tag, and the white space before it."""
    held = max((n for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)
    return len(text[: len(text) - held].rstrip())
