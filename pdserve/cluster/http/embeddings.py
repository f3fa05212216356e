"""``/v1/embeddings``: from its body to the vectors, in OpenAI's shape with vLLM's fields."""

import asyncio
import base64
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pdserve.cluster.calls import Call, Session
from pdserve.cluster.embedding import Embedded, Vector, embedded, pooling_call, shortened
from pdserve.cluster.http.access import tenant_in
from pdserve.cluster.http.asking import ending_of, limits_of
from pdserve.cluster.http.bodies import read_object
from pdserve.cluster.http.errors import error_response, error_status
from pdserve.cluster.http.generation import until_gone
from pdserve.cluster.http.hints import retries_of
from pdserve.cluster.http.metrics import DISCONNECTED, FrontMetrics, Meter
from pdserve.cluster.http.schemas import EmbeddingBody, checked, prompts_of
from pdserve.cluster.models import Models
from pdserve.cluster.parameters import (
    Parameters,
    check_model,
    service_class_of,
    shown,
    tenant_of,
    truncated,
)
from pdserve.cluster.prompts import text_prompt, token_prompt
from pdserve.cluster.tracing import continued
from pdserve.config import GatewayConfig
from pdserve.errors import InvalidField, PdserveError
from pdserve.prompt_tasks import Pooling, PoolingKind

INPUTS_MAX = 2048
"""In one request, as OpenAI has it."""

DIMENSIONS_MAX = 1 << 16
"""More than any model's; the model's own bound is known once a vector is there."""

ENCODINGS = ("float", "base64")


@dataclass(frozen=True, slots=True)
class _Wanted:
    id: str
    model: str
    calls: tuple[Call, ...]
    dimensions: int | None
    normalize: bool
    base64: bool


class Embeddings(Response):
    """An ASGI response that does all its work when it is sent."""

    def __init__(self, models: Models, config: GatewayConfig, metrics: FrontMetrics) -> None:
        super().__init__()
        self._models = models
        self._config = config
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._metrics.follow("http", "embedding") as meter:
            try:
                request = Request(scope, receive)
                tree = await read_object(request, self._config.body_bytes_max)
                session, config = self._models.asked(tree)
                wanted = await _wanted(session, config, tree, request.headers, tenant_in(scope))
                meter.calls = wanted.calls
                with continued(request.headers):
                    answering = _answer(session, wanted, meter, scope, receive, send)
                    stayed = await until_gone(receive, answering)
                meter.status = "200" if stayed else DISCONNECTED
            except ClientDisconnect:
                meter.status = DISCONNECTED
            except (PdserveError, HTTPException) as error:
                meter.status = str(error_status(error))
                await error_response(error)(scope, receive, send)


async def _answer(
    session: Session, wanted: _Wanted, meter: Meter, scope: Scope, receive: Receive, send: Send
) -> None:
    found = await embedded(session, wanted.calls, meter)
    meter.prompt_tokens = sum(len(call.prompt) for call in wanted.calls)
    meter.cached_tokens = sum(each.timing.cached_tokens for each in found if each.timing)
    data = await asyncio.to_thread(_told, wanted, found, meter)  # it may have megabytes
    await Response(data, 200, None, "application/json")(scope, receive, send)


async def _wanted(
    session: Session,
    config: GatewayConfig,
    tree: Mapping[str, Any],
    headers: Mapping[str, str],
    tenant: str | None,
) -> _Wanted:
    body = checked(EmbeddingBody, tree)
    adapter = check_model(body.model, session)
    encoding = "float" if body.encoding_format is None else body.encoding_format
    if encoding not in ENCODINGS:
        raise InvalidField(
            "encoding_format", f"is {shown(encoding)}, must be one of {', '.join(ENCODINGS)}"
        )
    if body.dimensions is not None and not 1 <= body.dimensions <= DIMENSIONS_MAX:
        raise InvalidField(
            "dimensions", f"is {shown(body.dimensions)}, must be from 1 to what the model has"
        )
    said = body.use_activation if body.normalize is None else body.normalize
    task = Pooling(PoolingKind(config.pooling), normalize=said is not False)
    limits = limits_of(session, config)
    name = f"embd-{secrets.token_hex(12)}"
    whose = tenant_of(body.user) if tenant is None else tenant
    ends_unix_ms = ending_of(headers, config, stream=False)
    service_class = service_class_of(Parameters(service_tier=body.service_tier))
    prompts = await _prompts(session, body)
    calls = [
        pooling_call(
            name if len(prompts) == 1 else f"{name}-{index}",
            truncated(prompt, body.truncate_prompt_tokens, limits),
            task,
            limits,
            prompt_field=field,
            tenant=whose,
            service_class=service_class,
            deadline_unix_ms=ends_unix_ms,
            model=session.model_name,
            adapter=adapter,
            retries=retries_of(headers),
        )
        for index, (field, prompt) in enumerate(prompts)
    ]
    return _Wanted(
        id=name,
        model=adapter or session.model_name,
        calls=tuple(calls),
        dimensions=body.dimensions,
        normalize=task.normalize,
        base64=encoding == "base64",
    )


async def _prompts(session: Session, body: EmbeddingBody) -> list[tuple[str, tuple[int, ...]]]:
    """Each input's name and tokens."""
    given = prompts_of(body.input, name="input")
    if len(given) > INPUTS_MAX:
        raise InvalidField("input", f"holds {len(given)} inputs, at most {INPUTS_MAX} pass")
    special = body.add_special_tokens is not False
    prompts = []
    for index, item in enumerate(given):
        field = "input" if len(given) == 1 else f"input.{index}"
        if isinstance(item, str):
            tokens = await text_prompt(session, item, field=field, add_special_tokens=special)
        else:
            tokens = token_prompt(session, item, field=field)
        prompts.append((field, tokens))
    return prompts


def _told(wanted: _Wanted, found: Sequence[Embedded], meter: Meter) -> bytes:
    vectors = [
        shortened(each.vector, wanted.dimensions, normalize=wanted.normalize) for each in found
    ]
    body = {
        "id": wanted.id,
        "object": "list",
        "created": int(time.time()),
        "model": wanted.model,
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(vector) if wanted.base64 else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ],
        "usage": {
            "prompt_tokens": meter.prompt_tokens,
            "total_tokens": meter.prompt_tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": meter.cached_tokens},
        },
    }
    return json.dumps(body, allow_nan=False).encode()


def _base64(vector: Vector) -> str:
    """Of float32, little-endian, as OpenAI's libraries read it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
