"""The door of the gRPC port: where there are keys, every service but the health check needs one."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc

from pdserve.cluster.gateway.access import Doorkeeper, secret_of
from pdserve.cluster.rpc.aborting import refusing
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
            return refusing(handler, error)
        return handler


def secret_in(metadata: Any) -> str | None:
    texts: Mapping[str, str] = {
        name: value for name, value in metadata or () if isinstance(value, str)
    }
    return secret_of(texts)
