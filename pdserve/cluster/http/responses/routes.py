"""The routes of the responses API. What they take and give is said in ``http.openapi``."""

import json
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from pdserve.cluster.gateway.calls import Session
from pdserve.cluster.gateway.gathering import batches
from pdserve.cluster.gateway.models import Models
from pdserve.cluster.http.access import owner_in, tenant_in
from pdserve.cluster.http.bodies import read_object
from pdserve.cluster.http.errors import error_response, error_status
from pdserve.cluster.http.generation import until_gone
from pdserve.cluster.http.metrics import DISCONNECTED, FrontMetrics, Meter
from pdserve.cluster.http.queries import flag_in, number_in, page_of, word_in
from pdserve.cluster.http.responses.asking import (
    INCLUDES_LOGPROBS,
    ResponseAsked,
    ResponsesBody,
    checked_body,
    response_asked,
)
from pdserve.cluster.http.responses.items import new_id
from pdserve.cluster.http.responses.keeping import Record, Responses, after, unix_s
from pdserve.cluster.http.responses.telling import IN_PROGRESS, QUEUED, Event, Teller
from pdserve.cluster.http.streaming import HEADERS, named_event
from pdserve.cluster.tracing import continued
from pdserve.config import GatewayConfig
from pdserve.errors import ConflictingFields, PdserveError, UnusableValue

ITEMS_PAGE_MAX = 100
ITEMS_PAGE = 20

PATH = "/v1/responses"

_TIERS = {"auto": "default", "fast": "priority", "interactive": "priority", "batch": "flex"}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def add_responses(
    app: FastAPI,
    models: Models,
    config: GatewayConfig,
    responses: Responses,
) -> None:
    """All but ``Creation``'s."""

    @app.post(f"{PATH}/input_tokens")
    async def count_input_tokens(request: Request) -> Response:
        tree = await read_object(request, config.body_bytes_max)
        asked = await _asked(models, responses, tree, request)
        count = asked.asked.prompt_tokens
        return JSONResponse({"object": "response.input_tokens", "input_tokens": count})

    one = f"{PATH}/{{response_id}}"

    @app.get(one)
    async def retrieve_response(response_id: str, request: Request) -> Response:
        query = request.query_params
        stream = flag_in(query, "stream")
        after_number = number_in(query, "starting_after", 0, 2**31)
        record = await responses.found(response_id, owner_in(request.scope))
        if not stream:
            if after_number is not None:
                raise ConflictingFields("starting_after", "is for streams; set stream to true")
            return _json(record.response)
        if not record.response["background"]:
            raise UnusableValue("stream", "is for responses that were made in the background")
        return _Following(responses, response_id, 0 if after_number is None else after_number + 1)

    @app.delete(one)
    async def delete_response(response_id: str, request: Request) -> Response:
        await responses.remove(response_id, owner_in(request.scope))
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @app.post(f"{one}/cancel")
    async def cancel_response(response_id: str, request: Request) -> Response:
        record = await responses.cancelled(response_id, owner_in(request.scope))
        return _json(record.response)

    @app.get(f"{one}/input_items")
    async def list_input_items(response_id: str, request: Request) -> Response:
        query = request.query_params
        limit = number_in(query, "limit", 1, ITEMS_PAGE_MAX) or ITEMS_PAGE
        order = word_in(query, "order", ("asc", "desc")) or "desc"
        record = await responses.found(response_id, owner_in(request.scope))
        items = record.items if order == "asc" else record.items[::-1]
        return JSONResponse(page_of(items, query.get("after"), limit))


async def _asked(
    models: Models,
    responses: Responses,
    tree: Mapping[str, Any],
    request: Request,
) -> ResponseAsked:
    body = checked_body(tree)
    session, config = models.asked(tree)
    before = await responses.before(body.previous_response_id, owner_in(request.scope))
    return await response_asked(
        session,
        config,
        body,
        request.headers,
        tenant_in(request.scope),
        before=before,
        extras=tree,
    )


class Creation(Response):
    """An ASGI response that does all its work when it is sent."""

    def __init__(
        self,
        models: Models,
        config: GatewayConfig,
        metrics: FrontMetrics,
        responses: Responses,
    ) -> None:
        super().__init__()
        self._models = models
        self._config = config
        self._metrics = metrics
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = Request(scope, receive)
            tree = await read_object(request, self._config.body_bytes_max)
            asked = await _asked(self._models, self._responses, tree, request)
            teller = Teller(
                new_response(asked.body, asked.asked.model),
                dialect=asked.asked.dialect,
                prompt_tokens=asked.asked.prompt_tokens,
                logprobs=INCLUDES_LOGPROBS in (asked.body.include or ()),
            )
            record = Record(owner_in(scope), teller.response, asked.items, asked.messages)
            if asked.body.background:
                with continued(request.headers):
                    await self._responses.start(record, teller, asked)
                answer: Response = (
                    _Following(self._responses, record.response["id"], 0)
                    if asked.body.stream
                    else _json(record.response)
                )
                await answer(scope, receive, send)
            else:
                await self._stay(asked, record, teller, scope, receive, send)
        except ClientDisconnect:
            pass
        except (PdserveError, HTTPException) as error:
            await error_response(error)(scope, receive, send)

    async def _stay(
        self,
        asked: ResponseAsked,
        record: Record,
        teller: Teller,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answers while the client waits; whoever goes away takes the response along."""
        with self._metrics.follow("http", "responses") as meter:
            meter.calls = asked.asked.calls
            session = self._models.of(asked.asked.model)
            telling = _Telling(session, self._responses, asked, record, teller, meter)
            try:
                with continued(Request(scope).headers):
                    stayed = await until_gone(receive, telling.tell(scope, receive, send))
                meter.status = telling.status if stayed else DISCONNECTED
            except PdserveError as error:
                meter.status = str(error_status(error))
                raise


class _Telling:
    """One response while its client waits for it."""

    def __init__(
        self,
        session: Session,
        responses: Responses,
        asked: ResponseAsked,
        record: Record,
        teller: Teller,
        meter: Meter,
    ) -> None:
        self.status = "200"
        self._session = session
        self._responses = responses
        self._asked = asked
        self._record = record
        self._teller = teller
        self._meter = meter
        self._started = False

    async def tell(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises PdserveError for what goes wrong before anything was written."""
        stream = bool(self._asked.body.stream)
        waiting = self._teller.begin()
        try:
            async with aclosing(batches(self._session, self._asked.asked.calls)) as gathered:
                async for batch in gathered:
                    self._meter.note(batch)
                    for _, piece in batch:
                        waiting += self._teller.tell(piece, now_s=unix_s())
                    if stream and not self._record.is_over:
                        await self._write(send, waiting)
                        waiting = []
        except PdserveError as error:
            if not self._started:
                raise
            self.status = str(error_status(error))
            await self._write(send, [*waiting, *self._teller.fail(error)], more=False)
            return
        usage = self._record.response["usage"]
        self._meter.prompt_tokens = usage["input_tokens"]
        self._meter.cached_tokens = usage["input_tokens_details"]["cached_tokens"]
        if self._asked.is_stored:  # before it is told, so that who hears of it finds it
            self._record.messages = after(self._asked, self._record.response)
            await self._responses.keep(self._record)
            waiting[-1]["response"]["store"] = self._record.response["store"]
        if stream:
            await self._write(send, waiting, more=False)
        else:
            await _json(self._record.response)(scope, receive, send)

    async def _write(self, send: Send, events: Sequence[Event], *, more: bool = True) -> None:
        if not self._started:
            self._started = True
            await _start(send)
        data = b"".join(named_event(event["type"], _encode(event).encode()) for event in events)
        await send({"type": "http.response.body", "body": data, "more_body": more})


class _Following(Response):
    """The events of a response in the background; its client may go and come again."""

    def __init__(self, responses: Responses, response: str, start: int) -> None:
        super().__init__()
        self._responses = responses
        self._response = response
        self._start = start

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        await until_gone(receive, self._tell(send))

    async def _tell(self, send: Send) -> None:
        await _start(send)
        try:
            async for lines in self._responses.follow(self._response, self._start):
                data = b"".join(named_event(json.loads(line)["type"], line) for line in lines)
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except PdserveError as error:  # the events stay where they are; the client may come again
            said = {"type": "error", "code": error.kind, "message": str(error), "param": None}
            line = _encode({**said, "sequence_number": self._start}).encode()
            data = named_event("error", line)
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def new_response(body: ResponsesBody, model: str) -> dict[str, Any]:
    """The response as it is before anything happens."""
    tools = [
        {"description": None, "parameters": None, "strict": None, **tool}
        for tool in body.tools or ()
    ]
    tier = body.service_tier or "default"
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": unix_s(),
        "completed_at": None,
        "status": QUEUED if body.background else IN_PROGRESS,
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": _TIERS.get(tier, tier),
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


def _json(response: Mapping[str, Any]) -> Response:
    return Response(_encode(response), 200, media_type="application/json")


async def _start(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS]})
