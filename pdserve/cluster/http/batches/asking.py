"""One line of a batch, answered as if a client had sent it: by the very response that its endpoint
gives, in the lowest service class, with a tenant that nobody has to prove again."""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Message

from pdserve.cluster.http.errors import error_body, error_status, internal_error
from pdserve.cluster.http.hints import TIMEOUT_HEADER, TIMEOUT_MS_MAX
from pdserve.errors import InvalidField, PdserveError

SERVICE_TIER = "batch"

Endpoints = Mapping[str, Callable[[], Response]]
"""By their path, what answers."""


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: Mapping[str, Any]
    retry_after_ms: int = 0

    @property
    def is_refusal(self) -> bool:
        """Whether it says to come back, and not that anything is wrong with the request."""
        return self.status in (429, 503)


def refusal(error: PdserveError) -> Reply:
    return Reply(error_status(error), error_body(error), error.retry_after_ms or 0)


async def reply_of(
    endpoints: Endpoints, path: str, body: Mapping[str, Any], *, owner: str, left_ms: int
) -> Reply:
    """
    Args:
        owner: the tenant; empty where there are no keys, and ``user`` counts.
        left_ms: until the batch's window closes.
    """
    for name in ("stream", "background"):
        if body.get(name):
            return refusal(InvalidField(name, "is not for batches; leave it out"))
    data = json.dumps({**body, "service_tier": SERVICE_TIER}).encode()
    timeout_ms = max(1, min(left_ms, TIMEOUT_MS_MAX))
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [
            (b"content-type", b"application/json"),
            (TIMEOUT_HEADER.encode(), str(timeout_ms).encode()),
        ],
        "state": {"tenant": owner} if owner else {},
    }
    arriving = [data]
    sent: list[Message] = []

    async def receive() -> Message:
        if arriving:
            return {"type": "http.request", "body": arriving.pop(), "more_body": False}
        await asyncio.Event().wait()  # this client stays; whoever listens for its end is cancelled
        raise AssertionError("nobody sets it")

    async def send(message: Message) -> None:
        sent.append(message)

    try:
        await endpoints[path]()(scope, receive, send)
    except PdserveError as error:
        return refusal(error)
    return _read(sent)


def _read(sent: list[Message]) -> Reply:
    if not sent:  # a client that goes away has no answer; this one does not
        return Reply(500, json.loads(bytes(internal_error().body)))
    start, *parts = sent
    headers = dict(start["headers"])
    wait = headers.get(b"retry-after-ms", b"")
    return Reply(
        start["status"],
        json.loads(b"".join(part.get("body", b"") for part in parts)),
        int(wait) if wait.isdigit() else 0,
    )
