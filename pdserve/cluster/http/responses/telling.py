"""An answer as the events of the responses API. Pure: pieces in, events out.

    response.created, response.queued (in the background), response.in_progress
      response.output_item.added                           reasoning, message or function_call
        response.content_part.added                        not of a call
          response.output_text.delta …                     or reasoning_text, or the arguments
        response.output_text.done
        response.content_part.done
      response.output_item.done
    response.completed | incomplete | failed               with the whole response

Items follow one another; one ends when another kind of text begins. The API has no event for a
cancelled response: it ends with response.incomplete, and its status says ``cancelled``. The
response that a client gets who does not stream is the one in the last event, so both are told the
same.

Events are numbered from 0, in ``sequence_number``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pdserve.cluster.gateway.calls import Piece
from pdserve.cluster.http.answers import Choice, Dialect, cached_tokens
from pdserve.cluster.http.responses.items import new_id
from pdserve.cluster.http.speech import in_order
from pdserve.errors import CapacityError, PdserveError, RequestError
from pdserve.messages import FinishReason

Event = dict[str, Any]

QUEUED, IN_PROGRESS = "queued", "in_progress"
COMPLETED, INCOMPLETE, FAILED, CANCELLED = "completed", "incomplete", "failed", "cancelled"
TERMINAL = frozenset({COMPLETED, INCOMPLETE, FAILED, CANCELLED})

_ENDS: Mapping[FinishReason, str] = {
    FinishReason.STOP: COMPLETED,
    FinishReason.LENGTH: INCOMPLETE,
    FinishReason.CANCELLED: CANCELLED,
}


@dataclass(slots=True)
class _Open:
    """The item that is being told."""

    item: dict[str, Any]  # as it stands in the response
    index: int  # among the response's items
    call: int = -1  # of a function call: its index among the calls
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.item["id"], "output_index": self.index}


class Teller:
    """One response while it comes to be."""

    def __init__(
        self, response: dict[str, Any], *, dialect: Dialect, prompt_tokens: int, logprobs: bool
    ) -> None:
        """``response`` is changed in place, and is what the client sees of it."""
        self.response = response
        self._dialect = dialect
        self._prompt_tokens = prompt_tokens
        self._logprobs = logprobs
        self._choice = Choice(0)
        self._open: _Open | None = None
        self._next_number = 0
        self._reasoning_tokens = 0
        self._scores: list[dict[str, Any]] = []  # of tokens whose text is not settled

    def begin(self) -> list[Event]:
        events = [self._whole("response.created")]
        if self.response["background"]:
            events.append(self._whole("response.queued"))
        self.response["status"] = IN_PROGRESS
        return [*events, self._whole("response.in_progress")]

    def tell(self, piece: Piece, *, now_s: int) -> list[Event]:
        """What ``piece`` adds; with the last one, the end."""
        self._choice.note(piece)
        events: list[Event] = []
        for chunk in self._dialect.chunks(self._choice, piece):
            delta = chunk["delta"]
            self._scores += (chunk["logprobs"] or {}).get("content") or ()
            for kind, part in in_order(delta, self._open.call if self._open else -1):
                events += self._call(part) if kind == "call" else self._text(kind, part)
        if self._open is not None and self._open.item["type"] == "reasoning":
            self._reasoning_tokens += len(piece.tokens)
        if piece.finish is not None:
            events += self._finish(_ENDS.get(piece.finish, COMPLETED), now_s)
        return events

    def fail(self, error: PdserveError) -> list[Event]:
        """The end of a response that an error ends, whatever has been told."""
        self.response["error"] = {"code": _code(error), "message": str(error)}
        return [*self._close(INCOMPLETE), self._end(FAILED)]

    def cancel(self) -> list[Event]:
        """The end of one that somebody did not want any more."""
        return [*self._close(INCOMPLETE), self._end(CANCELLED)]

    def _finish(self, status: str, now_s: int) -> list[Event]:
        events = []
        if self._open is None and status == COMPLETED:
            events += self._text("message", "")  # nothing was said; that is a message too
        events += self._close(COMPLETED if status == COMPLETED else INCOMPLETE)
        if status == INCOMPLETE:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        if status == COMPLETED:
            self.response["completed_at"] = now_s
        self.response["usage"] = self._usage()
        return [*events, self._end(status)]

    def _usage(self) -> dict[str, Any]:
        output_tokens = self._choice.token_count
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": cached_tokens([self._choice.timing]),
                "cache_write_tokens": 0,
            },
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": self._prompt_tokens + output_tokens,
        }

    # ── items ────────────────────────────────────────────────────────────────────────────────────

    def _text(self, kind: str, text: str) -> list[Event]:
        events = list(self._opened(kind))
        assert self._open is not None
        self._open.texts.append(text)
        said = {"content_index": 0, "delta": text, **self._open.place}
        if kind == "message":
            self._open.logprobs += self._scores
            said["logprobs"] = self._scores
        self._scores = []
        return [*events, self._event(f"response.{_PARTS[kind]}.delta", said)]

    def _call(self, call: Mapping[str, Any]) -> Iterator[Event]:
        function = call["function"]
        if self._open is None or self._open.call != call["index"]:
            yield from self._close(COMPLETED)
            item = {
                "type": "function_call",
                "id": new_id("fc"),
                "call_id": call["id"],
                "name": function["name"],
                "arguments": "",
                "status": IN_PROGRESS,
            }
            yield from self._added(item, call=call["index"])
        assert self._open is not None
        arguments = function.get("arguments") or ""
        if arguments:
            self._open.texts.append(arguments)
            said = {"delta": arguments, **self._open.place}
            yield self._event("response.function_call_arguments.delta", said)

    def _opened(self, kind: str) -> Iterator[Event]:
        """Makes the open item one of ``kind``."""
        if self._open is not None and self._open.item["type"] == kind:
            return
        yield from self._close(COMPLETED)
        item: dict[str, Any] = {"type": kind, "content": [], "status": IN_PROGRESS}
        if kind == "message":
            item |= {"id": new_id("msg"), "role": "assistant"}
        else:
            item |= {"id": new_id("rs"), "summary": []}
        yield from self._added(item)
        yield self._part("response.content_part.added", _part(kind, "", []))

    def _added(self, item: dict[str, Any], *, call: int = -1) -> Iterator[Event]:
        self._open = _Open(item, len(self.response["output"]), call)
        self.response["output"].append(item)
        yield self._event(
            "response.output_item.added", {"output_index": self._open.index, "item": dict(item)}
        )

    def _close(self, status: str) -> Iterator[Event]:
        """Ends the open item, if there is one."""
        if self._open is None:
            return
        item, text = self._open.item, "".join(self._open.texts)
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            said = {"name": item["name"], "arguments": text, **self._open.place}
            yield self._event("response.function_call_arguments.done", said)
        else:
            said = {"content_index": 0, "text": text, **self._open.place}
            if item["type"] == "message":
                self._open.logprobs += self._scores  # of a token whose text was never said
                said["logprobs"] = self._open.logprobs
            part = _part(item["type"], text, self._open.logprobs if self._logprobs else [])
            item["content"] = [part]
            yield self._event(f"response.{_PARTS[item['type']]}.done", said)
            yield self._part("response.content_part.done", part)
        yield self._event(
            "response.output_item.done", {"output_index": self._open.index, "item": dict(item)}
        )
        self._open = None

    def _part(self, name: str, part: dict[str, Any]) -> Event:
        assert self._open is not None
        return self._event(name, {"content_index": 0, "part": part, **self._open.place})

    # ── events ───────────────────────────────────────────────────────────────────────────────────

    def _end(self, status: str) -> Event:
        self.response["status"] = status
        return self._whole(f"response.{INCOMPLETE if status == CANCELLED else status}")

    def _whole(self, name: str) -> Event:
        response = {**self.response, "output": [dict(item) for item in self.response["output"]]}
        return self._event(name, {"response": response})

    def _event(self, name: str, said: Mapping[str, Any]) -> Event:
        number = self._next_number
        self._next_number += 1
        return {"type": name, "sequence_number": number, **said}


_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


def _part(kind: str, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _code(error: PdserveError) -> str:
    """One of the codes that the API has for an error within a response."""
    if isinstance(error, CapacityError):
        return "rate_limit_exceeded"
    return "invalid_prompt" if isinstance(error, RequestError) else "server_error"
