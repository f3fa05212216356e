"""The gRPC port: our service, KServe's, vLLM's, ``grpc.health.v1`` and reflection on one
``grpc.aio`` server."""

import asyncio
import contextlib

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from pdserve.clock import MS, monotonic
from pdserve.cluster.gateway.access import Doorkeeper
from pdserve.cluster.gateway.calls import Session
from pdserve.cluster.gateway.draining import CONNECTION_AGE_NS_MAX
from pdserve.cluster.gateway.models import Models
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.cluster.rpc import kserve, vllm_engine
from pdserve.cluster.rpc.access import AccessInterceptor
from pdserve.cluster.rpc.reflecting import add_reflection
from pdserve.cluster.rpc.servicer import Servicer
from pdserve.cluster.rpc.serving import Serving
from pdserve.cluster.rpc.under_way import UnderWay
from pdserve.config import GatewayConfig
from pdserve.errors import ConfigError, PdserveError
from pdserve.proto.kserve.inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import add_InferenceServicer_to_server
from pdserve.proto.vllm.engine_pb2_grpc import add_VllmEngineServicer_to_server
from pdserve.wire.listening import (
    accepted_at,
    hang_up_at,
    listeners_at,
    retire,
    shut_listeners_at,
)

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
SERVICES = (SERVICE, kserve.SERVICE, vllm_engine.SERVICE)

PING_INTERVAL_MIN_MS = 10_000


CONNECTIONS_LOOK_NS = 500 * MS
"""To look for connections is to go through all open files of the process."""

_LOOK_S = 0.01


class GrpcServer:
    """A server that is up.

    It ends in three steps, since gRPC's core knows only one: as it stops, it asks clients to go
    elsewhere (GOAWAY) and ends with a bare CANCELLED, which nobody repeats, what they have sent
    until they hear of it. So here it takes no new connection first (``drain``) and serves on, while
    connections reach the age at which their clients leave by themselves. Then what still comes is
    refused (``refuse``). Last it falls silent on the connections that are left, and only then
    stops (``stop``): whoever is still there sees a connection that ended, which is UNAVAILABLE.
    """

    def __init__(
        self,
        server: grpc.aio.Server,
        port: int,
        servicer: health.aio.HealthServicer,
        under_way: UnderWay,
        *,
        is_one_of_many: bool,
    ) -> None:
        """``is_one_of_many``: others listen at this port too."""
        self.port = port
        self._server = server
        self._health = servicer
        self._under_way = under_way
        self._is_one_of_many = is_one_of_many
        self._has_connections = False
        self._looked_ns = 0

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way."""
        return self._under_way.is_busy

    @property
    def busy_ns(self) -> int:
        """When a call was under way, at the latest."""
        return self._under_way.busy_ns

    @property
    def has_connections(self) -> bool:
        """Of clients, as of ``CONNECTIONS_LOOK_NS`` ago."""
        now_ns = monotonic()
        if now_ns - self._looked_ns >= CONNECTIONS_LOOK_NS:
            found = accepted_at(self.port)
            for each in found:
                each.close()
            self._has_connections, self._looked_ns = bool(found), now_ns
        return self._has_connections

    async def drain(self) -> None:
        """Says NOT_SERVING and takes no new connection, but serves those that there are. Returns
        when it listens no more."""
        await self._health.enter_graceful_shutdown()
        if self._is_one_of_many:
            with contextlib.ExitStack() as stack:
                ours = [stack.enter_context(each) for each in listeners_at(self.port)]
                await retire(ours)
        shut_listeners_at(self.port)

    def refuse(self, error: PdserveError) -> None:
        """From now on the answer to every call that comes."""
        self._under_way.refuse(error)

    async def stop(self, *, grace_s: float) -> None:
        """Gives calls under way ``grace_s`` to end, and hangs up."""
        await self._health.enter_graceful_shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self.is_busy:
                    await asyncio.sleep(_LOOK_S)
        shut_listeners_at(self.port)
        hang_up_at(self.port)
        await self._server.stop(0)


async def serve_grpc(
    session: Session,
    *,
    config: GatewayConfig,
    metrics: FrontMetrics | None = None,
    credentials: grpc.ServerCredentials | None = None,
    doorkeeper: Doorkeeper | None = None,
    models: Models | None = None,
    connection_age_ns: int = CONNECTION_AGE_NS_MAX,
) -> GrpcServer:
    """Listens on ``config.host`` and ``config.grpc_port``; with credentials, on TLS only.

    Args:
        models: where there may be several, of which ``session`` is the first.
        connection_age_ns: when clients are asked to open a new connection; calls under way go on.

    Raises:
        ConfigError: the port cannot be had.
    """
    under_way = UnderWay(SERVICES)
    doors = [] if doorkeeper is None else [AccessInterceptor(doorkeeper)]
    server = grpc.aio.server(
        interceptors=[under_way, *doors], options=_options(config, connection_age_ns)
    )
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
    return GrpcServer(server, port, checks, under_way, is_one_of_many=config.replicas > 1)


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


def _options(config: GatewayConfig, connection_age_ns: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_connection_age_ms", connection_age_ns // MS),
        ("grpc.max_receive_message_length", config.body_bytes_max),
        ("grpc.max_concurrent_streams", config.streams_max),
        # Two servers that quietly share a port are a riddle, unless several gateways are wanted.
        ("grpc.so_reuseport", int(config.replicas > 1)),
        # A stream may be silent for as long as its prompt waits: clients that ping are welcome.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MIN_MS),
    ]
