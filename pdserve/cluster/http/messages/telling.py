"""An answer as the events of the Messages API. Pure: pieces in, events out.

    message_start                   the message, without content
    ping
      content_block_start           thinking, text or tool_use
        content_block_delta …       thinking_delta, text_delta or input_json_delta
        content_block_delta         of a thought the last: signature_delta
      content_block_stop
    message_delta                   why it ended, and the usage
    message_stop

Blocks follow one another; one ends when another kind of text begins. The message that a client gets
who does not stream is folded from the same events' texts, so both are told the same.

Space alone between blocks (models write line breaks around thoughts and calls) is no block: the API
itself refuses one that is sent back. At the beginning of a text that says more it stays.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from pdserve.cluster.gateway.calls import Piece
from pdserve.cluster.http.answers import Choice, Dialect
from pdserve.cluster.http.speech import in_order
from pdserve.errors import Cancelled
from pdserve.messages import FinishReason

Event = dict[str, Any]

PING: Event = {"type": "ping"}

_DELTAS: Mapping[str, tuple[str, str]] = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}
"""Of each kind of block, its deltas' type and the field of their text."""


@dataclass(slots=True)
class _Open:
    """The block that is being told."""

    block: dict[str, Any]  # as it stands in the message
    index: int
    call: int = -1  # of a tool_use: its index among the calls
    texts: list[str] = field(default_factory=list)


class Teller:
    """One message while it comes to be."""

    def __init__(
        self,
        message: dict[str, Any],
        *,
        dialect: Dialect,
        shows_thoughts: bool = True,
        is_window_bound: bool = False,
    ) -> None:
        """
        Args:
            message: is changed in place, and is what the client sees of it.
            dialect: of a chat, which tells the parts of a piece apart.
            shows_thoughts: False: of a thought only its signature is told.
            is_window_bound: an answer that came to its bound has filled the context, and has fewer
                tokens than it was allowed.
        """
        self.message = message
        self._dialect = dialect
        self._shows_thoughts = shows_thoughts
        self._is_window_bound = is_window_bound
        self._open: _Open | None = None
        self._space = ""  # that may yet be the beginning of a text
        self._thinking_tokens = 0
        self._finish: FinishReason | None = None
        self._stop: str | None = None

    def begin(self, usage: Mapping[str, Any]) -> list[Event]:
        self.message["usage"] |= usage
        message = {**self.message, "content": [], "usage": dict(self.message["usage"])}
        return [{"type": "message_start", "message": message}, PING]

    def tell(self, choice: Choice, piece: Piece) -> list[Event]:
        """What ``piece`` adds."""
        if piece.finish is not None:
            self._finish = piece.finish
            self._stop = piece.stop_reason if isinstance(piece.stop_reason, str) else None
        events: list[Event] = []
        for chunk in self._dialect.chunks(choice, piece):
            for kind, part in in_order(chunk["delta"], self._open.call if self._open else -1):
                events += self._call(part) if kind == "call" else self._text(kind, part)
        if self._open is not None and self._open.block["type"] == "thinking":
            self._thinking_tokens += len(piece.tokens)
        return events

    def end(self, usage: Mapping[str, Any]) -> list[Event]:
        """The end of a message whose pieces are told; ``usage`` without what is counted here.

        Raises:
            Cancelled: somebody cancelled the request; no stop reason of the API says so.
        """
        if self._finish is FinishReason.CANCELLED:
            raise Cancelled("the request was cancelled before its answer was complete")
        events = list(self._close())
        if (space := self._space) and not self.message["content"]:  # it is all that was said
            events += [*self._opened({"type": "text", "text": ""}), self._said(space)]
            events += self._close()
        usage = {**usage, "output_tokens_details": {"thinking_tokens": self._thinking_tokens}}
        ending = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop}
        self.message |= ending
        self.message["usage"] |= usage
        return [
            *events,
            {"type": "message_delta", "delta": ending, "usage": usage},
            {"type": "message_stop"},
        ]

    def _stop_reason(self) -> str:
        if self._finish is FinishReason.LENGTH:
            return "model_context_window_exceeded" if self._is_window_bound else "max_tokens"
        if self._stop is not None:
            return "stop_sequence"
        called = any(block["type"] == "tool_use" for block in self.message["content"])
        return "tool_use" if called else "end_turn"

    # ── blocks ───────────────────────────────────────────────────────────────────────────────────

    def _text(self, kind: str, text: str) -> Iterator[Event]:
        kind = "thinking" if kind == "reasoning" else "text"
        if self._open is None or self._open.block["type"] != kind:
            yield from self._close()
            if kind == "text":
                text = self._space + text
                if text.isspace():
                    self._space = text
                    return
                yield from self._opened({"type": "text", "text": ""})
            else:
                yield from self._opened({"type": "thinking", "thinking": "", "signature": ""})
        if kind == "text" or self._shows_thoughts:
            yield self._said(text)
        elif self._open is not None:
            self._open.texts.append(text)

    def _call(self, call: Mapping[str, Any]) -> Iterator[Event]:
        if self._open is None or self._open.call != call["index"]:
            yield from self._close()
            identity = f"toolu_{call['id'].removeprefix('call_')}"
            name = call["function"]["name"]
            block = {"type": "tool_use", "id": identity, "name": name, "input": {}}
            yield from self._opened(block, call=call["index"])
        if arguments := call["function"].get("arguments"):
            yield self._said(arguments)

    def _opened(self, block: dict[str, Any], *, call: int = -1) -> Iterator[Event]:
        self._space = ""
        self._open = _Open(block, len(self.message["content"]), call)
        self.message["content"].append(block)
        yield {
            "type": "content_block_start",
            "index": self._open.index,
            "content_block": dict(block),
        }

    def _said(self, text: str) -> Event:
        """More of the open block."""
        assert self._open is not None, "text belongs to a block"
        self._open.texts.append(text)
        delta, name = _DELTAS[self._open.block["type"]]
        return self._delta({"type": delta, name: text})

    def _delta(self, delta: dict[str, Any]) -> Event:
        assert self._open is not None, "a delta belongs to a block"
        return {"type": "content_block_delta", "index": self._open.index, "delta": delta}

    def _close(self) -> Iterator[Event]:
        """Ends the open block, if there is one."""
        if self._open is None:
            return
        block, text = self._open.block, "".join(self._open.texts)
        match block["type"]:
            case "text":
                block["text"] = text
            case "thinking":
                block["thinking"] = text if self._shows_thoughts else ""
                block["signature"] = _signature(text)
                yield self._delta({"type": "signature_delta", "signature": block["signature"]})
            case _:
                block["input"] = _input(text)
        yield {"type": "content_block_stop", "index": self._open.index}
        self._open = None


def _signature(thought: str) -> str:
    """Of a thought. Clients send it back with it; nobody here looks at it."""
    return hashlib.sha256(thought.encode(errors="surrogatepass")).hexdigest()


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call as an object: of a text that ends within one what is complete of it,
    as Anthropic's libraries read a stream. What is no object is none."""
    try:
        said = from_json(arguments or "{}", allow_inf_nan=False, allow_partial=True)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
