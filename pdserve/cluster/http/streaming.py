"""Server-sent events: one event per chunk, all events of a batch in one write.

This runs once per token and stream, so the part of a chunk that never changes is encoded once: its
head for all, and for those that say text alone everything around the text.
"""

import json
import time
from dataclasses import replace
from typing import Any

from pdserve.cluster.gateway.calls import Piece
from pdserve.cluster.http.answers import Choice
from pdserve.cluster.http.asking import Asked

DONE = b"data: [DONE]\n\n"

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would gather tokens for its clients
)

_MARK = "\ue000text\ue000"
"""Stands where an event's text will; from the right it is the first of its kind."""

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class Events:
    """Encodes the events of one answer."""

    def __init__(self, asked: Asked, *, created: int | None = None) -> None:
        """``created``: unix time, s, of an answer that began elsewhere."""
        head = _encode(
            {
                "id": asked.id,
                "object": asked.dialect.chunk_object,
                "created": int(time.time()) if created is None else created,
                "model": asked.model,
            }
        )
        self._head = f"data: {head[:-1]},"
        self._tail = '"usage":null}\n\n' if asked.include_usage else ""
        self._dialect = asked.dialect
        self._around: dict[int, tuple[str, str]] = {}  # a choice's text, in its events

    def chunk(self, choice: dict[str, Any], usage: dict[str, Any] | None = None) -> str:
        """``usage`` for those who asked for it with every chunk."""
        if usage is not None:
            return f'{self._head}"choices":[{_encode(choice)}],"usage":{_encode(usage)}}}\n\n'
        if self._tail:
            return f'{self._head}"choices":[{_encode(choice)}],{self._tail}'
        return f'{self._head}"choices":[{_encode(choice)}]}}\n\n'

    def text(self, choice: Choice, piece: Piece) -> str:
        """The event of a piece that says text alone (``Dialect.is_text``): the same bytes as
        ``chunk`` makes, of which only the text is encoded anew."""
        around = self._around.get(choice.index)
        if around is None:
            marked = replace(piece, text=_MARK)
            (chunk,) = self._dialect.chunks(choice, marked)
            before, found, after = self.chunk(chunk).rpartition(_encode(_MARK))
            assert found, f"no text in the chunk {chunk}"
            around = self._around[choice.index] = (before, after)
        return around[0] + _encode(piece.text) + around[1]

    def last(self, usage: dict[str, Any] | None, timing: dict[str, Any] | None) -> str:
        """The chunk without choices that ends an answer, of what was asked for."""
        parts: dict[str, Any] = {"choices": [], "usage": usage, "pdserve": timing}
        said = {name: value for name, value in parts.items() if value is not None}
        return f"{self._head}{_encode(said)[1:]}\n\n"


def named_event(name: str, line: bytes) -> bytes:
    """An event of an API whose events have names; ``line`` is its data."""
    return b"event: " + name.encode() + b"\ndata: " + line + b"\n\n"


def with_id(event: str, event_id: str) -> str:
    """The id stands last: clients that know none look for ``data:`` at the beginning."""
    return f"{event[:-1]}id: {event_id}\n\n"


def error_event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode() + DONE


def whole(asked: Asked, choices: list[Choice], usage: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    return {
        "id": asked.id,
        "object": asked.dialect.object,
        "created": int(time.time()),
        "model": asked.model,
        "choices": [asked.dialect.whole(choice) for choice in choices],
        "usage": usage,
        **asked.dialect.beside(choices),
    }
