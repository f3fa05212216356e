"""The calls that a gRPC server works on, counted, so that it can leave without cutting one off.

A call counts from when its handler is called until gRPC's core has its last byte. Health checks and
reflection do not: whoever watches watches for ever, and loses nothing.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from pdserve.clock import Clock, monotonic
from pdserve.cluster.rpc.aborting import alike, refusing
from pdserve.errors import PdserveError


class UnderWay(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    def __init__(self, services: tuple[str, ...], *, clock: Clock = monotonic) -> None:
        """``services``: the full names of those whose calls count."""
        self._prefixes = tuple(f"/{name}/" for name in services)
        self._clock = clock
        self._count = 0
        self._ended_ns = 0
        self._refusal: PdserveError | None = None

    @property
    def busy_ns(self) -> int:
        """When a call was under way, at the latest: now, or when the last one ended."""
        return self._clock() if self._count else self._ended_ns

    @property
    def is_busy(self) -> bool:
        return self._count > 0

    def refuse(self, error: PdserveError) -> None:
        """From now on the answer to every call that comes."""
        self._refusal = error

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefixes):
            return handler
        if self._refusal is not None:
            handler = refusing(handler, self._refusal)
        return self._counting(handler)

    def _counting(self, handler: Any) -> Any:
        """The handler, whose calls count. All of ours are coroutine functions."""
        serve = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )

        async def counted(request: Any, context: Any) -> Any:
            self._count += 1
            context.add_done_callback(self._note_end)
            return await serve(request, context)

        return alike(handler, counted)

    def _note_end(self, _: Any) -> None:
        self._count -= 1
        self._ended_ns = self._clock()
