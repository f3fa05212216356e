"""The gRPC port: our service, KServe's, vLLM's, ``grpc.health.v1`` and reflection on one
``grpc.aio`` server."""

import contextlib

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from pdserve.cluster.access import Doorkeeper
from pdserve.cluster.calls import Session
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.cluster.models import Models
from pdserve.cluster.rpc import kserve, vllm_engine
from pdserve.cluster.rpc.access import AccessInterceptor
from pdserve.cluster.rpc.reflecting import add_reflection
from pdserve.cluster.rpc.servicer import Servicer
from pdserve.cluster.rpc.serving import Serving
from pdserve.config import GatewayConfig
from pdserve.errors import ConfigError
from pdserve.proto.kserve.inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import add_InferenceServicer_to_server
from pdserve.proto.vllm.engine_pb2_grpc import add_VllmEngineServicer_to_server
from pdserve.wire.listening import listeners_at, retire

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
SERVICES = (SERVICE, kserve.SERVICE, vllm_engine.SERVICE)

PING_INTERVAL_MIN_MS = 10_000


class GrpcServer:
    """A server that is up."""

    def __init__(
        self,
        server: grpc.aio.Server,
        port: int,
        servicer: health.aio.HealthServicer,
        *,
        is_one_of_many: bool,
    ) -> None:
        """``is_one_of_many``: others listen at this port too."""
        self.port = port
        self._server = server
        self._health = servicer
        self._is_one_of_many = is_one_of_many

    async def drain(self, *, limit_s: float) -> None:
        """Says NOT_SERVING and takes nothing new; returns when no call is under way any more, and
        cancels those that are after ``limit_s``."""
        await self._health.enter_graceful_shutdown()
        if self._is_one_of_many:
            with contextlib.ExitStack() as stack:
                ours = [stack.enter_context(each) for each in listeners_at(self.port)]
                await retire(ours)
        await self._server.stop(limit_s)

    async def stop(self, *, grace_s: float) -> None:
        """Takes nothing new, and cancels what still runs after ``grace_s``; also while it drains,
        for which it ends sooner then."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def serve_grpc(
    session: Session,
    *,
    config: GatewayConfig,
    metrics: FrontMetrics | None = None,
    credentials: grpc.ServerCredentials | None = None,
    doorkeeper: Doorkeeper | None = None,
    models: Models | None = None,
) -> GrpcServer:
    """Listens on ``config.host`` and ``config.grpc_port``; with credentials, on TLS only.

    ``models``: where there may be several, of which ``session`` is the first.

    Raises:
        ConfigError: the port cannot be had.
    """
    interceptors = [] if doorkeeper is None else [AccessInterceptor(doorkeeper)]
    server = grpc.aio.server(interceptors=interceptors, options=_options(config))
    serving = Serving(session, config, metrics or FrontMetrics(), doorkeeper, models)
    for add, servicer in (
        (add_InferenceServicer_to_server, Servicer(serving)),
        (add_GRPCInferenceServiceServicer_to_server, kserve.KserveServicer(serving)),
        (add_VllmEngineServicer_to_server, vllm_engine.VllmServicer(serving)),
    ):
        add(servicer, server)  # type: ignore[no-untyped-call]
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    add_reflection(server, (*SERVICES, health.SERVICE_NAME))
    port = _bind(server, config, credentials)
    await server.start()
    for name in ("", *SERVICES):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    return GrpcServer(server, port, checks, is_one_of_many=config.replicas > 1)


def _bind(
    server: grpc.aio.Server, config: GatewayConfig, credentials: grpc.ServerCredentials | None
) -> int:
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"{host}:{config.grpc_port}"
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise ConfigError(
            f"gateway.grpc_port is {config.grpc_port} on {config.host}, which cannot be had; "
            "set another, 0 for a free one, or -1 for no gRPC"
        ) from error


def _options(config: GatewayConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.body_bytes_max),
        ("grpc.max_concurrent_streams", config.streams_max),
        # Two servers that quietly share a port are a riddle, unless several gateways are wanted.
        ("grpc.so_reuseport", int(config.replicas > 1)),
        # A stream may be silent for as long as its prompt waits: clients that ping are welcome.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MIN_MS),
    ]
