"""The answer to a message while it is being told, and the count of its tokens.

In flow: ``asking`` makes a chat of the body, ``http.generation`` runs it while it watches the
client, and what is said of it, whole or as events, comes from ``telling``. A stream on which
nothing happens for a while gets a ping, so that no proxy takes it for dead.
"""

import asyncio
import json
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Send

from pdserve.cluster.gateway.calls import Session
from pdserve.cluster.gateway.gathering import Numbered
from pdserve.cluster.gateway.models import Models
from pdserve.cluster.http.asking import Asked
from pdserve.cluster.http.bodies import read_object
from pdserve.cluster.http.errors import error_status
from pdserve.cluster.http.generation import Answer, Batches, Generation
from pdserve.cluster.http.messages.asking import MessageAsked, counted, message_asked
from pdserve.cluster.http.messages.errors import PATH, message_error
from pdserve.cluster.http.messages.telling import PING, Event, Teller
from pdserve.cluster.http.metrics import FrontMetrics, Meter
from pdserve.cluster.http.resuming import Trail
from pdserve.cluster.http.streaming import named_event
from pdserve.cluster.logs import request_id
from pdserve.config import GatewayConfig
from pdserve.errors import PdserveError
from pdserve.messages import ServiceClass

PING_S = 15.0
"""Proxies cut a connection that says nothing for a minute, some after 30 s."""

_TIERS = {
    ServiceClass.INTERACTIVE: "priority",
    ServiceClass.STANDARD: "standard",
    ServiceClass.BATCH: "batch",
}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def message_generation(models: Models, config: GatewayConfig, metrics: FrontMetrics) -> Response:
    return Generation(
        models, config, metrics, operation="messages", ask=message_asked, answer=MessageAnswer
    )


def add_message_counts(app: FastAPI, models: Models, config: GatewayConfig) -> None:
    @app.post(f"{PATH}/count_tokens")
    async def count_message_tokens(request: Request) -> Response:
        tree = await read_object(request, config.body_bytes_max)
        return JSONResponse({"input_tokens": await counted(*models.asked(tree), tree)})


class MessageAnswer(Answer):
    def __init__(
        self, session: Session, asked: Asked, meter: Meter, trail: Trail | None = None
    ) -> None:
        assert isinstance(asked, MessageAsked), "messages are asked by message_asked"
        assert trail is None, "message_asked refuses event ids"
        super().__init__(session, asked, meter)
        self._begun = False
        self._teller = Teller(
            _new_message(asked),
            dialect=asked.dialect,
            shows_thoughts=asked.shows_thoughts,
            is_window_bound=asked.is_window_bound,
        )

    async def _stream(self, gathered: Batches, send: Send) -> None:
        pulse = _Pulse(send)
        beating = asyncio.create_task(pulse.beat(PING_S))
        try:
            await super()._stream(gathered, pulse.send)
        finally:
            beating.cancel()

    def _keep(self, batch: list[Numbered]) -> None:
        for choice, piece in self._note(batch):
            self._teller.tell(choice, piece)

    def _body(self) -> dict[str, Any]:
        self._teller.end(self._message_usage())
        return self._teller.message

    def _told(self, batch: list[Numbered]) -> str:
        events: list[Event] = []
        for choice, piece in self._note(batch):
            if not self._begun:
                self._begun = True
                events += self._teller.begin(self._message_usage())
            events += self._teller.tell(choice, piece)
        return _framed(events).decode()

    def _failed(self, error: PdserveError) -> bytes:
        self.status = str(error_status(error, PATH))
        return _framed([message_error(error, request_id.get())])

    def _last(self) -> bytes:
        try:
            events = self._teller.end(self._message_usage())
        except PdserveError as error:
            return self._failed(error)
        if (said := self._said_of_itself(self._timing())) is not None:
            events[-2]["pdserve"] = said  # the message_delta
        return _framed(events)

    def _message_usage(self) -> dict[str, Any]:
        """What was used so far. A prefix that is cached costs nobody anything to have written."""
        used = self._usage()
        cached_tokens = used["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": used["prompt_tokens"] - cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached_tokens,
            "output_tokens": used["completion_tokens"],
        }


class _Pulse:
    """Says a ping where nothing has been said for a while, between the first thing and the last."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._saying = asyncio.Lock()  # a ping is never behind the last message
        self._has_begun = self._is_over = False
        self._last_s = 0.0

    async def send(self, message: Message) -> None:
        async with self._saying:
            await self._send(message)
            self._has_begun = True
            self._is_over = not message.get("more_body", True)
            self._last_s = asyncio.get_running_loop().time()

    async def beat(self, every_s: float) -> None:
        loop = asyncio.get_running_loop()
        data = _framed([PING])
        ping = {"type": "http.response.body", "body": data, "more_body": True}
        while not self._is_over:
            due_s = self._last_s + every_s if self._has_begun else loop.time() + every_s
            if (wait_s := due_s - loop.time()) > 0:
                await asyncio.sleep(wait_s)
                continue
            with suppress(OSError):  # the client is gone; whoever watches it ends the answer
                await self._ping(ping)

    async def _ping(self, ping: Message) -> None:
        async with self._saying:
            if not self._is_over:
                await self._send(ping)
            self._last_s = asyncio.get_running_loop().time()


def _new_message(asked: MessageAsked) -> dict[str, Any]:
    """The message as it is before anything is said."""
    return {
        "id": f"msg_{asked.id.removeprefix(asked.dialect.id_prefix)}",
        "type": "message",
        "role": "assistant",
        "model": asked.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"service_tier": _TIERS[asked.calls[0].service_class]},
    }


def _framed(events: Iterable[Event]) -> bytes:
    return b"".join(named_event(event["type"], _encode(event).encode()) for event in events)
