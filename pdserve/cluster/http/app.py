"""The ASGI application: OpenAI's routes, vLLM's tokeniser routes, and what operators look at.

It owns nothing and starts nothing: whoever serves it (our uvicorn, or Serve's ingress) brings the
session. Routes here are thin; a generation is in ``generation``.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pdserve.cluster.gateway.access import Doorkeeper
from pdserve.cluster.gateway.calls import Session
from pdserve.cluster.gateway.models import Ask, Assign, Control, Controls, Models
from pdserve.cluster.gateway.parameters import check_model, check_tokens, shown, tenant_of
from pdserve.cluster.gateway.prompts import chat_prompt
from pdserve.cluster.http.access import Access, note_for_audit, tenant_in
from pdserve.cluster.http.asking import chat_asked, completion_asked
from pdserve.cluster.http.batches.asking import Endpoints
from pdserve.cluster.http.batches.wiring import add_batch_api
from pdserve.cluster.http.bodies import read_object
from pdserve.cluster.http.comparing.routes import add_comparisons
from pdserve.cluster.http.console import add_console
from pdserve.cluster.http.decisions.routes import add_decisions
from pdserve.cluster.http.embeddings import Embeddings
from pdserve.cluster.http.errors import error_response, internal_error
from pdserve.cluster.http.exposition import joined
from pdserve.cluster.http.generation import Generation
from pdserve.cluster.http.messages.answering import add_message_counts, message_generation
from pdserve.cluster.http.messages.errors import PATH as MESSAGES_PATH
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.cluster.http.openapi.bodies import Facts
from pdserve.cluster.http.openapi.document import document
from pdserve.cluster.http.queries import page_of
from pdserve.cluster.http.request_ids import RequestIds
from pdserve.cluster.http.responses.keeping import Responses, journals_of
from pdserve.cluster.http.responses.routes import PATH as RESPONSES_PATH
from pdserve.cluster.http.responses.routes import Creation, add_responses
from pdserve.cluster.http.schemas import (
    DetokenizeBody,
    TokenizeBody,
    checked,
)
from pdserve.cluster.http.vllm_metrics import VllmMetrics
from pdserve.cluster.version import installed_version
from pdserve.config import GatewayConfig
from pdserve.errors import ConflictingFields, InvalidField, PdserveError

SNAPSHOT_WAIT_S = 2.0
"""How long metrics and status wait for the router."""

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

StoreFigures = Callable[[Mapping[str, Any]], Awaitable[bytes]]


class AnyText(PathConvertor):
    """Slashes and line breaks too: Starlette's ``path`` ends at a line break, and a name with one
    would be no route at all instead of a model that nobody knows."""

    regex = "(?s:.*)"


register_url_convertor("anytext", AnyText())


def create_app(
    session: Session,
    *,
    config: GatewayConfig,
    metrics: FrontMetrics | None = None,
    snapshot: Ask | None = None,
    stores: StoreFigures | None = None,
    recording: Ask | None = None,
    operations: Mapping[str, Ask] | None = None,
    assign: Assign | None = None,
    doorkeeper: Doorkeeper | None = None,
    models: Models | None = None,
    controls: Controls | None = None,
) -> FastAPI:
    """The application around ``session``.

    Args:
        metrics: to share with the gRPC front; found again as ``app.state.metrics``.
        snapshot: the router's figures, for ``/metrics`` and ``/cluster/status``.
        stores: what the stores named there say for ``/metrics``, in its format.
        recording: what has arrived since it was last asked, for ``/cluster/recording``.
        operations: what else the router answers, by its path.
        assign: for ``/cluster/role``.
        doorkeeper: to share with the gRPC front; None: everybody is let in.
        models: where there may be several, of which ``session`` is the first.
        controls: their routers, for questions that name a model.
    """
    models = models or Models(session, config)
    app = FastAPI(title="pdserve", version=installed_version())
    app.state.metrics = metrics or FrontMetrics(
        VllmMetrics(session.model_name, session.context_tokens)
    )
    if doorkeeper is not None:
        app.state.metrics.ledger = doorkeeper.ledger
        app.add_middleware(Access, doorkeeper=doorkeeper)
    app.add_middleware(RequestIds)  # the last one added is the first to see a request
    app.add_exception_handler(PdserveError, _tell_error)
    app.add_exception_handler(HTTPException, _tell_error)
    app.add_exception_handler(Exception, _tell_bug)
    app.state.responses = Responses(
        models, app.state.metrics, journals_of(config), running_max=config.streams_max
    )
    _add_answers(app, models, config)
    add_responses(app, models, config, app.state.responses)
    add_message_counts(app, models, config)
    add_comparisons(app, models, config)
    add_decisions(app, models, config)
    _add_models(app, models)
    _add_tokenizer(app, models, config)
    _add_operations(app, snapshot, stores, controls)
    if recording is not None:
        _add_answer(app, "/cluster/recording", recording, controls, lambda each: each.recording)
    for path, ask in (operations or {}).items():
        _add_answer(app, path, ask, controls, partial(_operation, path=path))
    if assign is not None:
        _add_role(app, assign, config)
    _add_document(app, models, config, keys=doorkeeper is not None and doorkeeper.asks_for_keys)
    return app


def _add_document(app: FastAPI, models: Models, config: GatewayConfig, *, keys: bool) -> None:
    paths = [route.path_format for route in app.routes if isinstance(route, Route)]

    @lru_cache(maxsize=1)  # until a model comes or goes
    def tree(facts: Facts) -> dict[str, Any]:
        return document(facts, version=installed_version(), paths=paths, keys=keys)

    def openapi() -> dict[str, Any]:
        """Of several models the bounds are the widest: what one of them refuses, it says."""
        return tree(
            Facts(
                models=models.names,
                context_tokens=max(each.context_tokens for each in models),
                vocab_size=max(each.tokenizer.vocab_size for each in models),
                n_max=config.n_max,
            )
        )

    app.openapi = openapi  # type: ignore[method-assign]


def _add_answers(app: FastAPI, models: Models, config: GatewayConfig) -> None:
    """What generates or embeds, for clients and for the lines of their batches."""
    metrics, responses = app.state.metrics, app.state.responses
    endpoints: Endpoints = {
        "/v1/chat/completions": partial(
            Generation, models, config, metrics, operation="chat", ask=chat_asked
        ),
        "/v1/completions": partial(
            Generation, models, config, metrics, operation="completion", ask=completion_asked
        ),
        "/v1/embeddings": partial(Embeddings, models, config, metrics),
        RESPONSES_PATH: partial(Creation, models, config, metrics, responses),
    }
    answers: Endpoints = {
        **endpoints,
        MESSAGES_PATH: partial(message_generation, models, config, metrics),
    }
    for path, answer in answers.items():
        app.router.routes.append(Route(path, _Answering(answer), methods=["POST"]))
    app.state.batches = add_batch_api(app, endpoints, config)


class _Answering:
    """An endpoint whose answers read their requests themselves, so that there is nothing for
    FastAPI to find out about its parameters, which takes it a third of a millisecond."""

    def __init__(self, answer: Callable[[], Response]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer()(scope, receive, send)


def _add_models(app: FastAPI, models: Models) -> None:
    created = int(time.time())
    created_at = datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def card(session: Session, name: str) -> dict[str, Any]:
        """In the words of OpenAI, of Anthropic, and of vLLM."""
        base = session.model_name
        return {
            "id": name,
            "object": "model",
            "type": "model",
            "display_name": name,
            "created": created,
            "created_at": created_at,
            "owned_by": "pdserve",
            "root": name,
            "parent": None if name == base else base,
            "max_model_len": session.context_tokens,
        }

    @app.get("/v1/models")
    async def list_models() -> Response:
        cards = [
            card(session, name)
            for session in models
            for name in (session.model_name, *session.adapters)
        ]
        return JSONResponse(page_of(cards, None, len(cards)))

    @app.get("/v1/models/{model:anytext}")
    async def model(model: str) -> Response:
        session = models.of(model)
        return JSONResponse(card(session, check_model(model, session) or session.model_name))


def _add_tokenizer(app: FastAPI, models: Models, config: GatewayConfig) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = checked(TokenizeBody, await read_object(request, config.body_bytes_max))
        session = models.of(body.model)
        tokenizer, adapter = session.tokenizer, check_model(body.model, session)
        ways = body.prompt, body.messages, body.prompt_token_ids
        if sum(way is not None for way in ways) != 1:
            raise ConflictingFields(
                "prompt", "is one way, messages and prompt_token_ids are others; send one of them"
            )
        if body.prompt_token_ids is not None:
            check_tokens("prompt_token_ids", body.prompt_token_ids, tokenizer.vocab_size)
            tokens = body.prompt_token_ids
        elif body.prompt is not None:
            special = body.add_special_tokens is not False
            tokens = await asyncio.to_thread(
                tokenizer.encode, body.prompt, add_special_tokens=special
            )
        else:
            opened = body.add_generation_prompt is not False
            messages = body.messages or []
            prompt = await chat_prompt(
                session,
                messages,
                add_generation_prompt=opened,
                arguments=body.chat_template_kwargs,
            )
            tokens = [*prompt]
        answer = {
            "count": len(tokens),
            "max_model_len": session.context_tokens,
            "tokens": tokens,
            "token_strs": [tokenizer.token_text(token) for token in tokens]
            if body.return_token_strs
            else None,
        }
        if body.return_block_keys:
            tenant = tenant_in(request.scope) or tenant_of(body.user)
            keys = session.block_keys(tokens, tenant, adapter)
            answer["block_keys"] = [key.hex() for key in keys]
        return JSONResponse(answer)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = checked(DetokenizeBody, await read_object(request, config.body_bytes_max))
        tokenizer = models.of(body.model).tokenizer
        check_tokens("tokens", body.tokens, tokenizer.vocab_size)
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    @app.get("/tokenizer_info")
    async def tokenizer_info(request: Request) -> Response:
        """What clients that tokenise for themselves look for, in the words of transformers; of the
        model that ``?model=`` names."""
        session = models.of(request.query_params.get("model"))
        tokenizer = session.tokenizer
        begin, ends = tokenizer.bos_token_id, tokenizer.eos_token_ids
        end = tokenizer.token_text(ends[0]) if ends else None
        info = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": session.context_tokens,
            "bos_token": None if begin is None else tokenizer.token_text(begin),
            "eos_token": end,
            "pad_token": end,
            "chat_template": tokenizer.chat_template,
        }
        return JSONResponse(info)


def _add_operations(
    app: FastAPI,
    snapshot: Ask | None,
    stores: StoreFigures | None,
    controls: Controls | None,
) -> None:
    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/v2/health/live")
    async def is_live() -> Response:
        return JSONResponse({"live": True})

    @app.get("/v2/health/ready")
    async def is_ready() -> Response:
        return JSONResponse({"ready": True})

    @app.get("/load")
    async def load() -> Response:
        return JSONResponse({"server_load": app.state.metrics.in_flight})

    @app.get("/version")
    async def show_version() -> Response:
        return JSONResponse({"version": installed_version()})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        figures = None
        data = b""
        if snapshot is not None:
            try:
                async with asyncio.timeout(SNAPSHOT_WAIT_S):
                    figures = await snapshot()
            except (TimeoutError, PdserveError):
                figures = {}  # our own figures are worth showing, above all now
            if stores is not None:
                data = await stores(figures)
        text = joined([app.state.metrics.render(figures).decode(), data.decode()])
        return Response(text, headers={"content-type": METRICS_TYPE})

    if snapshot is not None:
        _add_answer(app, "/cluster/status", snapshot, controls, lambda each: each.snapshot)
        _add_answer(app, "/cluster/requests", _recent(app.state.metrics))
        add_console(app)


def _add_answer(
    app: FastAPI,
    path: str,
    ask: Ask,
    controls: Controls | None = None,
    of_one: Callable[[Control], Ask | None] = lambda _: None,
) -> None:
    """What the router answers, as JSON; with ``?model=`` that of this model, by ``of_one``."""

    @app.get(path)
    async def answer(request: Request) -> Response:
        asked = ask
        if controls is not None and (model := request.query_params.get("model")):
            asked = of_one(controls.of(model)) or ask
        try:
            async with asyncio.timeout(SNAPSHOT_WAIT_S):
                return JSONResponse(await asked())
        except TimeoutError:
            raise HTTPException(
                503, f"the router did not answer within {SNAPSHOT_WAIT_S:g} s; try again"
            ) from None


def _operation(control: Control, *, path: str) -> Ask | None:
    return control.operations.get(path)


def _recent(metrics: FrontMetrics) -> Ask:
    async def report() -> Mapping[str, Any]:
        return metrics.recent.report()

    return report


def _add_role(app: FastAPI, assign: Assign, config: GatewayConfig) -> None:
    @app.post("/cluster/role")
    async def role(request: Request) -> Response:
        body = await read_object(request, config.body_bytes_max)
        values = [body.get(name) for name in ("worker", "role")]
        texts = (value if isinstance(value, str) else shown(value) for value in values)
        note_for_audit(request.scope, dict(zip(("worker", "role"), texts, strict=True)))
        for name, value in zip(("worker", "role"), values, strict=True):
            if not isinstance(value, str) or not value:
                raise InvalidField(name, "is missing, or no text")
        async with asyncio.timeout(SNAPSHOT_WAIT_S):
            refused = await assign(*map(str, values))
        if refused:
            raise InvalidField("role", refused)
        return JSONResponse({"worker": values[0], "role": values[1]})


async def _tell_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PdserveError | HTTPException)
    if isinstance(error, HTTPException) and error.status_code == 405:
        error.headers = {"allow": ", ".join(_methods(request))}
    return error_response(error, request.url.path)


def _methods(request: Request) -> list[str]:
    """All that this path knows; a route tells of its own alone."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    matching = [route.path for route in routes if route.path_regex.match(request.url.path)]
    methods = [route.methods or () for route in routes if route.path in matching[:1]]
    return sorted({method for some in methods for method in some})


async def _tell_bug(request: Request, _: Exception) -> Response:
    return internal_error(request.url.path)
