"""One generation, from its body to its last byte: run the calls, watch the client, tell the answer.

Two things happen at once: pieces arrive and are written, and the connection is listened to. The
first of "all written" and "client gone" ends the other; a client that went away takes its calls
with it before this returns.

Nothing is written before the first piece is there: until then an error has its own HTTP status.
Afterwards it is an event in the stream.
"""

import asyncio
import json
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import aclosing
from functools import cached_property
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pdserve.cluster.gateway.calls import Piece, Session
from pdserve.cluster.gateway.gathering import Numbered, batches
from pdserve.cluster.gateway.models import Models
from pdserve.cluster.http.access import tenant_in
from pdserve.cluster.http.answers import (
    Choice,
    decisions_report,
    server_timing,
    timing_report,
    usage,
)
from pdserve.cluster.http.asking import Asked
from pdserve.cluster.http.bodies import read_object
from pdserve.cluster.http.errors import error_body, error_response, error_status
from pdserve.cluster.http.hints import headers_of
from pdserve.cluster.http.metrics import DISCONNECTED, FrontMetrics, Meter
from pdserve.cluster.http.resuming import Trail, resumable
from pdserve.cluster.http.streaming import (
    DONE,
    HEADERS,
    Events,
    error_event,
    whole,
    with_id,
)
from pdserve.cluster.tracing import continued
from pdserve.config import GatewayConfig
from pdserve.errors import PdserveError
from pdserve.prompt_tasks import PromptScore

Ask = Callable[
    [Session, GatewayConfig, Mapping[str, Any], Mapping[str, str], str | None], Awaitable[Asked]
]

Batches = AsyncIterator[list[Numbered]]

US_PER_S = 1_000_000


class Generation(Response):
    """An ASGI response that does all its work when it is sent."""

    def __init__(
        self,
        models: Models,
        config: GatewayConfig,
        metrics: FrontMetrics,
        *,
        operation: str,
        ask: Ask,
        answer: "type[Answer] | None" = None,
    ) -> None:
        """``answer``: how it is told where that is not as a completion."""
        super().__init__()
        self._models = models
        self._config = config
        self._metrics = metrics
        self._operation = operation
        self._ask = ask
        self._answer = answer or Answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._metrics.follow("http", self._operation) as meter:
            try:
                request = Request(scope, receive)
                tree = await read_object(request, self._config.body_bytes_max)
                headers = headers_of(scope)
                session, config = self._models.asked(tree)
                asked = await self._ask(session, config, tree, headers, tenant_in(scope))
                asked, trail = resumable(asked, tree, headers, session.identity)
                meter.calls = asked.calls
                answer = self._answer(session, asked, meter, trail)
                with continued(headers):
                    stayed = await until_gone(receive, answer.tell(scope, receive, send))
                meter.status = answer.status if stayed else DISCONNECTED
            except ClientDisconnect:
                meter.status = DISCONNECTED
            except (PdserveError, HTTPException) as error:
                meter.status = str(error_status(error, scope["path"]))
                await error_response(error, scope["path"])(scope, receive, send)


async def until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Runs ``work`` until it ends (True, or its error) or the client is gone (False)."""
    # In this task: one that is made for it costs two turns of the event loop before it begins.
    working = asyncio.current_task()
    assert working is not None, "work is done in a task"
    is_over = has_gone = False

    def leave(_: object) -> None:
        nonlocal has_gone
        if not is_over:
            has_gone = True
            working.cancel()

    watching = asyncio.create_task(_gone(receive))
    watching.add_done_callback(leave)
    try:
        await work
    except (Exception, asyncio.CancelledError):
        # As in asyncio.timeout: who else has cancelled this task wants it to end.
        if not has_gone or working.uncancel():
            raise
        return False
    finally:
        is_over = True
        watching.cancel()
    if has_gone:  # it was told, and ended as if it had not been
        working.uncancel()
    return not has_gone


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Answer:
    """The answer to one request while it is being told; here as a completion, and what is said of
    it otherwise is said by whoever overrides ``_keep``, ``_body``, ``_told``, ``_last`` and
    ``_failed``."""

    def __init__(
        self, session: Session, asked: Asked, meter: Meter, trail: Trail | None = None
    ) -> None:
        self.status = "200"
        self._trail = trail
        self._session = session
        self._asked = asked
        self._meter = meter
        n, scores = asked.n, [list[PromptScore]() for _ in asked.calls]
        self._choices = [
            Choice(index, prompt_scores=scores[index // n]) for index in range(len(scores) * n)
        ]

    async def tell(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._trail is not None:
            for call in self._asked.calls:  # this gateway may not know yet that its client is gone
                self._session.cancel(call.call, tenant=call.tenant)
        async with aclosing(batches(self._session, self._asked.calls)) as gathered:
            if self._asked.stream:
                await self._stream(gathered, send)
            else:
                await self._whole(gathered, scope, receive, send)

    async def _whole(self, gathered: Batches, scope: Scope, receive: Receive, send: Send) -> None:
        async for batch in gathered:
            self._keep(batch)
        body = self._body()
        timing = self._timing()
        headers = {}
        if timing:
            headers["x-pdserve-timing"] = json.dumps(timing)
            headers["server-timing"] = server_timing(timing, ended=True)
        if (said := self._said_of_itself(timing)) is not None:
            body["pdserve"] = said
        data = json.dumps(body, ensure_ascii=False, allow_nan=False)
        await Response(data, 200, headers, "application/json")(scope, receive, send)

    async def _stream(self, gathered: Batches, send: Send) -> None:
        started = False
        try:
            async for batch in gathered:
                text = self._told(batch)
                if not started:
                    started = True
                    headers = [*HEADERS, *self._headers()]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                if text:
                    await _write(send, text.encode())
        except PdserveError as error:
            if not started:
                raise
            await _write(send, self._failed(error), more=False)
            return
        await _write(send, self._last(), more=False)

    # ── as a completion ──────────────────────────────────────────────────────────────────────────

    def _keep(self, batch: list[Numbered]) -> None:
        """For an answer that is sent whole."""
        for choice, piece in self._note(batch):
            choice.keep(piece)

    def _body(self) -> dict[str, Any]:
        """Of an answer that is complete."""
        return whole(self._asked, self._choices, self._usage())

    @cached_property
    def _events(self) -> Events:
        return Events(self._asked, created=self._trail.created if self._trail else None)

    def _told(self, batch: list[Numbered]) -> str:
        """The events that a batch makes."""
        events, parts = self._events, []
        is_bare = self._trail is None and not self._asked.continuous_usage
        for choice, piece in self._note(batch):
            if is_bare and self._asked.dialect.is_text(choice, piece):
                parts.append(events.text(choice, piece))
                continue
            for event_id, chunk in self._chunks(choice, piece):
                so_far = self._usage() if self._asked.continuous_usage else None
                event = events.chunk(chunk, so_far)
                parts.append(with_id(event, event_id) if event_id else event)
        return "".join(parts)

    def _failed(self, error: PdserveError) -> bytes:
        """The end of a stream that an error ends."""
        self.status = str(error_status(error))
        return error_event(error_body(error))

    def _chunks(self, choice: Choice, piece: Piece) -> Iterable[tuple[str, dict[str, Any]]]:
        """With the ids of their events, or none."""
        if self._trail is not None:
            return self._trail.chunks(self._asked.dialect, choice, piece)
        return [("", chunk) for chunk in self._asked.dialect.chunks(choice, piece)]

    def _last(self) -> bytes:
        """The end of a stream whose pieces are told."""
        asked = self._asked
        used = self._usage()
        if not (asked.include_usage or asked.include_timing or asked.include_why):
            return DONE
        text = self._events.last(
            used if asked.include_usage else None, self._said_of_itself(self._timing())
        )
        return text.encode() + DONE

    # ── what is known of it ──────────────────────────────────────────────────────────────────────

    def _said_of_itself(self, timing: dict[str, Any] | None) -> dict[str, Any] | None:
        """The ``pdserve`` field, as far as it was asked for."""
        asked = self._asked
        if timing is None or not (asked.include_timing or asked.include_why):
            return None
        return timing | (decisions_report(self._choices) if asked.include_why else {})

    def _note(self, batch: list[Numbered]) -> Iterator[tuple[Choice, Piece]]:
        self._meter.note(batch)
        for call, piece in batch:
            choice = self._choices[call * self._asked.n + piece.choice]
            if piece.scores:  # all choices of the call have this list
                choice.prompt_scores.extend(piece.scores)
                continue
            choice.note(piece)
            yield choice, piece

    def _usage(self) -> dict[str, Any]:
        """What was used so far; the meter keeps it for the metrics."""
        n = self._asked.n
        per_call = [self._choices[at : at + n] for at in range(0, len(self._choices), n)]
        used = usage(self._asked.prompt_tokens, per_call)
        self._meter.prompt_tokens = used["prompt_tokens"]
        self._meter.cached_tokens = used["prompt_tokens_details"]["cached_tokens"]
        return used

    def _headers(self) -> list[tuple[bytes, bytes]]:
        """Of a stream that begins: where the time to its first token went."""
        timing = self._timing()
        if timing is None:
            return []
        return [(b"server-timing", server_timing(timing, ended=False).encode())]

    def _timing(self) -> dict[str, Any] | None:
        """Of the first choice."""
        timing = self._choices[0].timing
        if timing is None:
            return None
        return timing_report(
            timing,
            first_token_us=round((self._meter.first_token_s or 0.0) * US_PER_S),
            total_us=round(self._meter.elapsed_s() * US_PER_S),
        )


async def _write(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})
