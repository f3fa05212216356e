"""The service itself: runs calls and writes their pieces as chunks.

gRPC cancels the handler's task when the client cancels or its deadline passes; that unwinds
through ``batches``, which closes the session's iterator. A typed error ends the call with its
status, and trailing metadata says what the HTTP front says in headers and body.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc

from pdserve.cluster.access import Doorkeeper
from pdserve.cluster.calls import Call, Session
from pdserve.cluster.gathering import batches
from pdserve.cluster.http.answers import cached_tokens
from pdserve.cluster.http.metrics import DISCONNECTED, FrontMetrics, Meter
from pdserve.cluster.rpc.aborting import abort
from pdserve.cluster.rpc.access import secret_in
from pdserve.cluster.rpc.requests import chat_call, chunk_of, generate_call, timing_of
from pdserve.cluster.tracing import continued, is_tracing
from pdserve.config import GatewayConfig
from pdserve.errors import PdserveError, status_of
from pdserve.messages import Timing
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import InferenceServicer

US_PER_S = 1_000_000

_Ask = Callable[[str | None], Awaitable[Call]]
"""The call that a tenant asks for; None: whose it is, the request itself says."""


class Servicer(InferenceServicer):
    def __init__(
        self,
        session: Session,
        config: GatewayConfig,
        metrics: FrontMetrics,
        doorkeeper: Doorkeeper | None = None,
    ) -> None:
        self._doorkeeper = doorkeeper
        self._session = session
        self._config = config
        self._metrics = metrics

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # noqa: N802
        ask = partial(generate_call, self._session, self._config, request, context.time_remaining())
        await self._serve("generate", ask, context, why=request.why)

    async def Chat(self, request: pb.ChatRequest, context: Any) -> None:  # noqa: N802
        ask = partial(chat_call, self._session, self._config, request, context.time_remaining())
        await self._serve("chat", ask, context, why=request.why)

    def _tenant(self, context: Any) -> str | None:
        """Of the key that the interceptor has let in."""
        if self._doorkeeper is None:
            return None
        key = self._doorkeeper.admit(secret_in(context.invocation_metadata()), counts=False)
        return None if key is None else key.tenant

    async def Cancel(  # noqa: N802
        self, request: pb.CancelRequest, context: Any
    ) -> pb.CancelResponse:
        was_running = self._session.cancel(request.id, tenant=self._tenant(context))
        return pb.CancelResponse(was_running=was_running)

    async def ListModels(  # noqa: N802
        self, _: pb.ListModelsRequest, __: Any
    ) -> pb.ListModelsResponse:
        session = self._session
        base = pb.Model(id=session.model_name, context_tokens=session.context_tokens)
        adapters = [
            pb.Model(id=name, context_tokens=session.context_tokens, parent=session.model_name)
            for name in session.adapters
        ]
        return pb.ListModelsResponse(models=[base, *adapters])

    async def _serve(self, operation: str, ask: _Ask, context: Any, *, why: bool) -> None:
        headers = dict(context.invocation_metadata()) if is_tracing() else {}
        with self._metrics.follow("grpc", operation) as meter, continued(headers):
            try:
                call = await ask(self._tenant(context))
                meter.calls = (call,)
                async with aclosing(self._chunks(call, meter, why=why)) as chunks:
                    async for chunk in chunks:
                        await context.write(chunk)
                meter.status = grpc.StatusCode.OK.name
            except asyncio.CancelledError:
                meter.status = DISCONNECTED
                raise
            except PdserveError as error:
                meter.status = status_of(error).grpc
                await abort(context, error)

    async def _chunks(
        self, call: Call, meter: Meter, *, why: bool
    ) -> AsyncGenerator[pb.GenerateChunk]:
        """The call's pieces as messages; the last one carries the usage."""
        open_count = call.n
        generated_tokens = 0
        timings: dict[int, Timing] = {}
        async with aclosing(batches(self._session, [call])) as gathered:
            async for batch in gathered:
                meter.note(batch)
                for _, piece in batch:
                    chunk = chunk_of(call, piece, self._session.tokenizer)
                    generated_tokens += len(piece.tokens)
                    if piece.timing is not None:
                        timings[piece.choice] = piece.timing
                    if piece.finish is not None:
                        open_count -= 1
                        _add_timing(chunk, timings.get(piece.choice), meter, why=why)
                    if open_count == 0:
                        meter.prompt_tokens = len(call.prompt)
                        meter.cached_tokens = cached_tokens(timings.values())
                        chunk.usage.prompt_tokens = meter.prompt_tokens
                        chunk.usage.completion_tokens = generated_tokens
                        chunk.usage.cached_tokens = meter.cached_tokens
                    yield chunk


def _add_timing(chunk: pb.GenerateChunk, timing: Timing | None, meter: Meter, *, why: bool) -> None:
    if timing is not None:
        chunk.timing.CopyFrom(
            timing_of(
                timing,
                first_token_us=round((meter.first_token_s or 0.0) * US_PER_S),
                total_us=round(meter.elapsed_s() * US_PER_S),
                why=why,
            )
        )
