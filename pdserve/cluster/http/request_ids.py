"""``x-request-id``: what the client calls a request comes back with the answer, or one is drawn.

What is logged meanwhile says it, too (``cluster.logs``). Anthropic's clients look for it in
``request-id``, so on their paths it stands there as well."""

import re
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdserve.cluster.http.messages.errors import speaks_messages
from pdserve.cluster.logs import request_id

HEADER = b"x-request-id"
ANTHROPIC_HEADER = b"request-id"

_ACCEPTABLE = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestIds:
    """ASGI middleware; it touches the response's first message only."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == HEADER), b"")
        request = given if _ACCEPTABLE.fullmatch(given) else secrets.token_hex(12).encode()

        said = [(HEADER, request)]
        if speaks_messages(scope["path"]):
            said.append((ANTHROPIC_HEADER, request))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *said]
            await send(message)

        token = request_id.set(request.decode())
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            request_id.reset(token)
