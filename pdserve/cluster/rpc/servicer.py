"""The service itself: runs calls and writes their pieces as chunks.

gRPC cancels the handler's task when the client cancels or its deadline passes; that unwinds
through ``batches``, which closes the session's iterator. A typed error ends the call with its
status, and trailing metadata says what the HTTP front says in headers and body.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc

from pdserve.cluster.calls import Call, Session
from pdserve.cluster.gathering import batches
from pdserve.cluster.http.answers import cached_tokens
from pdserve.cluster.http.metrics import DISCONNECTED, FrontMetrics, Meter
from pdserve.cluster.rpc.requests import chat_call, chunk_of, generate_call, timing_of
from pdserve.cluster.tracing import continued, is_tracing
from pdserve.config import GatewayConfig
from pdserve.errors import PdserveError, status_of
from pdserve.messages import Timing
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import InferenceServicer

US_PER_S = 1_000_000


class Servicer(InferenceServicer):
    def __init__(self, session: Session, config: GatewayConfig, metrics: FrontMetrics) -> None:
        self._session = session
        self._config = config
        self._metrics = metrics

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # noqa: N802
        call = generate_call(self._session, self._config, request, context.time_remaining())
        await self._serve("generate", call, context, why=request.why)

    async def Chat(self, request: pb.ChatRequest, context: Any) -> None:  # noqa: N802
        call = chat_call(self._session, self._config, request, context.time_remaining())
        await self._serve("chat", call, context, why=request.why)

    async def Cancel(self, request: pb.CancelRequest, _: Any) -> pb.CancelResponse:  # noqa: N802
        return pb.CancelResponse(was_running=self._session.cancel(request.id))

    async def ListModels(  # noqa: N802
        self, _: pb.ListModelsRequest, __: Any
    ) -> pb.ListModelsResponse:
        model = pb.Model(id=self._session.model_name, context_tokens=self._session.context_tokens)
        return pb.ListModelsResponse(models=[model])

    async def _serve(
        self, operation: str, asked: Awaitable[Call], context: Any, *, why: bool
    ) -> None:
        headers = dict(context.invocation_metadata()) if is_tracing() else {}
        with self._metrics.follow("grpc", operation) as meter, continued(headers):
            try:
                async with aclosing(self._chunks(await asked, meter, why=why)) as chunks:
                    async for chunk in chunks:
                        await context.write(chunk)
                meter.status = grpc.StatusCode.OK.name
            except asyncio.CancelledError:
                meter.status = DISCONNECTED
                raise
            except PdserveError as error:
                meter.status = status_of(error).grpc
                await _abort(context, error)

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


async def _abort(context: Any, error: PdserveError) -> NoReturn:
    metadata = [("pdserve-error-kind", error.kind)]
    if error.field is not None:
        metadata.append(("pdserve-error-field", error.field))
    if error.retry_after_ms is not None:
        metadata.append(("grpc-retry-pushback-ms", str(error.retry_after_ms)))
    code = grpc.StatusCode[status_of(error).grpc]
    await context.abort(code, str(error), tuple(metadata))
    raise AssertionError("abort() raises")
