"""The door of the gRPC port: where there are keys, every service but the health check needs one."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc

from pdserve.cluster.access import Doorkeeper, secret_of
from pdserve.cluster.rpc.aborting import abort
from pdserve.errors import PdserveError

OPEN_SERVICE = "/grpc.health.v1.Health/"
COUNTED = frozenset(
    {
        "/pdserve.v1.Inference/Generate",
        "/pdserve.v1.Inference/Chat",
        "/inference.GRPCInferenceService/ModelInfer",  # a stream counts each of its requests
        "/vllm.grpc.engine.VllmEngine/Generate",
    }
)


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    def __init__(self, doorkeeper: Doorkeeper) -> None:
        self._doorkeeper = doorkeeper

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(OPEN_SERVICE):
            return handler
        try:
            self._doorkeeper.admit(
                secret_in(handler_call_details.invocation_metadata),
                counts=handler_call_details.method in COUNTED,
                asked={"method": "gRPC", "path": handler_call_details.method},
            )
        except PdserveError as error:
            return _refusing(handler, error)
        return handler


def secret_in(metadata: Any) -> str | None:
    texts: Mapping[str, str] = {
        name: value for name, value in metadata or () if isinstance(value, str)
    }
    return secret_of(texts)


def _refusing(handler: Any, error: PdserveError) -> Any:
    """A handler of the same kind that ends every call with ``error``."""

    async def refuse(_: Any, context: Any) -> None:
        await abort(context, error)

    async def refuse_stream(_: Any, context: Any) -> AsyncIterator[Any]:
        await abort(context, error)
        yield

    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = kinds[handler.request_streaming, handler.response_streaming]
    return make(
        refuse_stream if handler.response_streaming else refuse,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
