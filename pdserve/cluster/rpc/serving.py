"""What every service of the gRPC port does with a call, whatever its messages look like.

gRPC cancels the handler's task when the client cancels or its deadline passes; that unwinds
through ``batches``, which closes the session's iterator.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

import grpc

from pdserve.cluster.gateway.access import Doorkeeper
from pdserve.cluster.gateway.calls import Call, Piece, Session
from pdserve.cluster.gateway.embedding import Embedded, embedded
from pdserve.cluster.gateway.gathering import batches
from pdserve.cluster.gateway.models import Models
from pdserve.cluster.http.answers import cached_tokens
from pdserve.cluster.http.hints import retries_of
from pdserve.cluster.http.metrics import DISCONNECTED, FrontMetrics, Meter
from pdserve.cluster.http.resuming import Trail
from pdserve.cluster.rpc.access import secret_in
from pdserve.cluster.rpc.requests import chunk_of, timing_of
from pdserve.cluster.tracing import continued, is_tracing
from pdserve.config import GatewayConfig
from pdserve.errors import Disconnected, PdserveError, status_of
from pdserve.messages import Timing
from pdserve.proto.v1 import inference_pb2 as pb

US_PER_S = 1_000_000

SCORES_MAX = 512
"""Of a prompt's tokens in one message."""

Ask = Callable[[str | None], Awaitable[Call]]
"""The call that a tenant asks for; None: whose it is, the request itself says."""

TrailOf = Callable[[Call], tuple[Call, Trail | None]]
"""The call as its ids say that it is, and the ids of its chunks if it has any."""

R = TypeVar("R")
Make = Callable[[Session, GatewayConfig, R, float | None, str | None], Awaitable[Call]]
"""A call of a model's, out of a request, the seconds that are left, and the key's tenant."""

Tell = Callable[[Call, pb.GenerateChunk], Awaitable[None]]


class Serving:
    def __init__(
        self,
        session: Session,
        config: GatewayConfig,
        metrics: FrontMetrics,
        doorkeeper: Doorkeeper | None = None,
        models: Models | None = None,
    ) -> None:
        """``models``: where there may be several, of which ``session`` is the first."""
        self.models = models or Models(session, config)
        self.config = config
        self._metrics = metrics
        self._doorkeeper = doorkeeper

    def asking(self, make: Make[R], request: R, context: Any, model: str) -> Ask:
        """Has ``make`` turn a request into a call of the model that it names."""

        async def ask(tenant: str | None) -> Call:
            session = self.models.of(model)
            config = self.models.config(session)
            return await make(session, config, request, context.time_remaining(), tenant)

        return ask

    def tenant(self, context: Any, *, counts: bool = False) -> str | None:
        """Of the key that the interceptor has let in; ``counts`` against its rate, once more."""
        if self._doorkeeper is None:
            return None
        key = self._doorkeeper.admit(secret_in(context.invocation_metadata()), counts=counts)
        return None if key is None else key.tenant

    async def run(
        self,
        operation: str,
        ask: Ask,
        context: Any,
        tell: Tell,
        *,
        why: bool = False,
        counts: bool = False,
        trail_of: TrailOf | None = None,
    ) -> None:
        """``tell`` gets the call's chunks in order. Raises PdserveError for what it failed with.

        Args:
            trail_of: for a service whose streams can be resumed.
        """
        headers = dict(context.invocation_metadata()) if is_tracing() else {}
        with self._metrics.follow("grpc", operation) as meter, continued(headers):
            try:
                call = await ask(self.tenant(context, counts=counts))
                call = replace(call, retries=retries_of(text_metadata(context)))
                call, trail = (call, None) if trail_of is None else trail_of(call)
                meter.calls = (call,)
                async with aclosing(self._chunks(call, meter, trail, why=why)) as chunks:
                    async for chunk in chunks:
                        await self._told(tell(call, chunk))
                meter.status = grpc.StatusCode.OK.name
            except asyncio.CancelledError:
                meter.status = DISCONNECTED
                raise
            except PdserveError as error:
                meter.status = status_of(error).grpc
                raise

    async def embed(self, ask: Ask, context: Any) -> tuple[Call, Embedded]:
        """The vector of a call that pools its prompt. Raises PdserveError."""
        headers = dict(context.invocation_metadata()) if is_tracing() else {}
        with self._metrics.follow("grpc", "embed") as meter, continued(headers):
            try:
                call = replace(
                    await ask(self.tenant(context)), retries=retries_of(text_metadata(context))
                )
                meter.calls = (call,)
                (found,) = await embedded(self.models.of(call.model), [call], meter)
                meter.prompt_tokens = len(call.prompt)
                meter.cached_tokens = found.timing.cached_tokens if found.timing else 0
                meter.status = grpc.StatusCode.OK.name
            except asyncio.CancelledError:
                meter.status = DISCONNECTED
                raise
            except PdserveError as error:
                meter.status = status_of(error).grpc
                raise
            return call, found

    async def _told(self, telling: Awaitable[None]) -> None:
        """
        Raises:
            Disconnected: the client has read nothing for as long as it may.
        """
        timeout_s = self.config.write_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await telling
        except TimeoutError:
            raise Disconnected(f"nothing was read for {timeout_s:g} s; read faster") from None

    async def _chunks(
        self, call: Call, meter: Meter, trail: Trail | None, *, why: bool
    ) -> AsyncGenerator[pb.GenerateChunk]:
        """The call's pieces as messages; the last one carries the usage. ``trail`` leaves out what
        was told before."""
        open_count = call.n
        generated_tokens = scored_tokens = 0
        timings: dict[int, Timing] = {}
        session = self.models.of(call.model)
        async with aclosing(batches(session, [call])) as gathered:
            async for batch in gathered:
                meter.note(batch)
                for piece in (part for _, each in batch for part in _in_parts(each)):
                    generated_tokens += len(piece.tokens)
                    rest = ("", piece) if trail is None else trail.rest(piece)
                    chunk = pb.GenerateChunk()  # told before; what it would have said counts
                    if rest is not None:
                        event_id, untold = rest
                        chunk = chunk_of(
                            call,
                            untold,
                            session.tokenizer,
                            event_id=event_id,
                            first_score=1 + scored_tokens,
                        )
                    scored_tokens += len(piece.scores)
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
                    if rest is not None:
                        yield chunk


def text_metadata(context: Any) -> dict[str, str]:
    """Of the call; names in lower case, as gRPC has them."""
    return {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}


def _in_parts(piece: Piece) -> Iterator[Piece]:
    """Clients take messages of 4 MiB."""
    if not piece.scores:
        yield piece
    for first in range(0, len(piece.scores), SCORES_MAX):
        yield replace(piece, scores=piece.scores[first : first + SCORES_MAX])


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
