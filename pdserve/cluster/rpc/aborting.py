"""How a typed error ends a gRPC call."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc

from pdserve.errors import NOT_AGAIN, RETRY_AFTER_MS_MAX, PdserveError, PoisonRequest, status_of


async def abort(context: Any, error: PdserveError) -> NoReturn:
    """With its status, and in trailing metadata what the HTTP front says in headers and body."""
    metadata = [("pdserve-error-kind", error.kind)]
    if error.field is not None:
        metadata.append(("pdserve-error-field", error.field))
    if isinstance(error, PoisonRequest):
        metadata.append(("pdserve-request-id", error.request))
    if error.retry_after_ms is not None:
        pushback_ms = min(max(1, error.retry_after_ms), RETRY_AFTER_MS_MAX)
        metadata.append(("grpc-retry-pushback-ms", str(pushback_ms)))
    elif isinstance(error, NOT_AGAIN):
        metadata.append(("grpc-retry-pushback-ms", "-1"))  # gRPC's word for "do not"
    code = grpc.StatusCode[status_of(error).grpc]
    await context.abort(code, str(error), tuple(metadata))
    raise AssertionError("abort() raises")


@asynccontextmanager
async def aborting(context: Any) -> AsyncIterator[None]:
    """A typed error within ends the call."""
    try:
        yield
    except PdserveError as error:
        await abort(context, error)


def refusing(handler: Any, error: PdserveError) -> Any:
    """A handler of the same kind that ends every call with ``error``."""

    async def refuse(_: Any, context: Any) -> None:
        await abort(context, error)

    return alike(handler, refuse)


def alike(handler: Any, serve: Callable[..., Any]) -> Any:
    """A handler of the same kind, whose calls are ``serve``'s."""
    kinds: dict[tuple[bool, bool], Callable[..., Any]] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    return kinds[handler.request_streaming, handler.response_streaming](
        serve,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
