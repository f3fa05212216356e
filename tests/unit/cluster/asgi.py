"""Asks an ASGI application without a socket: one request in, status, headers and body out."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    writes: tuple[bytes, ...]

    @property
    def body(self) -> bytes:
        return b"".join(self.writes)

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json()["error"]
        return error

    def events(self) -> list[Any]:
        """The decoded events of a stream, which must have ended as streams end."""
        events = self.body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], events[-2:]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def ask(
    app: ASGIApp,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """``body`` is sent as JSON unless it is bytes already."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(_ask(app, method, path, data, headers or {}))


def post(app: ASGIApp, path: str, body: Any, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return ask(app, "POST", path, body, headers={"content-type": "application/json", **named})


def get(app: ASGIApp, path: str) -> Reply:
    return ask(app, "GET", path, b"")


async def _ask(
    app: ASGIApp, method: str, path: str, data: bytes, headers: Mapping[str, str]
) -> Reply:
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    parts = [data[at : at + 65_536] for at in range(0, len(data), 65_536)] or [b""]
    arriving = [
        {"type": "http.request", "body": part, "more_body": index < len(parts) - 1}
        for index, part in enumerate(parts)
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        if arriving:
            return arriving.pop(0)
        await asyncio.Event().wait()  # the client stays
        raise AssertionError("nobody sets it")

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *writes = sent
    return Reply(
        status=start["status"],
        headers={name.decode(): value.decode() for name, value in start["headers"]},
        writes=tuple(message["body"] for message in writes),
    )
