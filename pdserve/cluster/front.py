"""The servers of one gateway: HTTP on our own uvicorn, and gRPC, around one session.

The same ASGI application also stands behind Serve's proxy; this server is there because the proxy
costs about 3 ms a request. With several gateways on one host the kernel spreads connections over
them (``SO_REUSEPORT``).
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from pdserve.access_config import AccessConfig
from pdserve.cluster.access import Doorkeeper
from pdserve.cluster.audit import Audit, AuditFile
from pdserve.cluster.certificates import certificate_of, grpc_credentials
from pdserve.cluster.http.app import Assign, create_app
from pdserve.cluster.http.slow_readers import SEND_BUFFER_BYTES, cutting
from pdserve.cluster.pinning import Pinning
from pdserve.cluster.quota_exchange import exchange_for_ever
from pdserve.cluster.rpc.server import GrpcServer, serve_grpc
from pdserve.cluster.session import GatewaySession
from pdserve.cluster.store_metrics import master_of, render, reports_of
from pdserve.config import ClusterConfig, GatewayConfig
from pdserve.errors import ConfigError
from pdserve.kvstore.security import credentials_of
from pdserve.kvstore.shared_counts import SharedCounts
from pdserve.wire.tls import CERT_REQUIRED

STOP_S = 5.0
"""How long open connections may go on once the gateway leaves."""

KEEP_ALIVE_S = 120
"""Of idle connections: longer than clients and proxies keep them. Who closes one meets a request
that is on its way, and clients do not send a POST twice of themselves."""

Snapshot = Callable[[], Awaitable[dict[str, Any]]]


class Front:
    def __init__(
        self,
        session: GatewaySession,
        config: ClusterConfig,
        *,
        snapshot: Snapshot,
        recording: Snapshot,
        operations: Mapping[str, Snapshot] | None = None,
        assign: Assign | None = None,
    ) -> None:
        """
        Args:
            operations: more answers of the router, by their path.
            assign: gives a worker another role.
        """
        self._session = session
        self._config = config.gateway
        keys = config.gateway.api_keys
        self._doorkeeper = Doorkeeper(
            None if keys is None else Path(keys), audit=_audit_of(config.gateway.access)
        )
        self._tenants = config.store.tenant_shares
        self._store_credentials = credentials_of(config.store)
        self.app: FastAPI = create_app(
            session,
            config=config.gateway,
            snapshot=snapshot,
            recording=recording,
            operations=operations,
            assign=assign,
            doorkeeper=self._doorkeeper,
            stores=self._store_figures,
        )
        session.pinning = self._pinning = Pinning(snapshot, self._store_credentials)
        redis = config.gateway.access.quota_redis
        self._counts = None if redis is None else SharedCounts(redis)
        self._exchanging: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self.ports: dict[str, int] = {}
        self._grpc: GrpcServer | None = None
        self._http: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises ConfigError where a port is taken by somebody else."""
        self._keeping = asyncio.create_task(self._pinning.run())
        if self._counts is not None:
            self._exchanging = asyncio.create_task(
                exchange_for_ever(self._doorkeeper.ledger, self._counts)
            )
        if self._config.http_port >= 0:
            await self._start_http()
        if self._config.grpc_port >= 0:
            self._grpc = await serve_grpc(
                self._session,
                config=self._config,
                metrics=self.app.state.metrics,
                credentials=grpc_credentials(self._config),
                doorkeeper=self._doorkeeper,
            )
            self.ports["grpc"] = self._grpc.port

    async def stop(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
        if self._exchanging is not None and self._counts is not None:
            self._exchanging.cancel()
            await self._counts.close()
        await self.app.state.responses.close()
        if self._grpc is not None:
            await self._grpc.stop()
        if self._http is not None and self._serving is not None:
            self._http.should_exit = True
            await self._serving

    async def _store_figures(self, snapshot: Mapping[str, Any]) -> bytes:
        reports = await reports_of(snapshot, self._store_credentials)
        return render(reports, self._tenants, await master_of(reports, self._store_credentials))

    async def _start_http(self) -> None:
        listening = self._bind(self._config.http_port)
        self.ports["http"] = listening.getsockname()[1]
        self._http = uvicorn.Server(
            uvicorn.Config(
                self.app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                http=cutting(self._config.write_timeout_s),
                timeout_graceful_shutdown=int(STOP_S),
                timeout_keep_alive=KEEP_ALIVE_S,
                **_tls(self._config),
            )
        )
        # Off the main thread, as replicas are, uvicorn leaves signals to their owner.
        self._serving = asyncio.create_task(self._http.serve([listening]))
        while not self._http.started and not self._serving.done():
            await asyncio.sleep(0.005)

    def _bind(self, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._config.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if self._config.replicas > 1:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            listening.bind((self._config.host, port))
        except OSError as error:
            listening.close()
            raise ConfigError(
                f"gateway.http_port is {port} on {self._config.host}: {error.strerror}; "
                "set another, or 0 for a free one"
            ) from error
        listening.listen(2048)
        return listening


def _audit_of(settings: AccessConfig) -> Audit:
    if settings.audit_log is None:
        return Audit()
    file = AuditFile(
        Path(settings.audit_log),
        bytes_max=settings.audit_bytes_max,
        files_max=settings.audit_files_max,
    )
    return Audit(file.write)


def _tls(config: GatewayConfig) -> dict[str, Any]:
    """What uvicorn wants to be told."""
    if config.tls_certificate is None:
        return {}
    certificate_of(config)  # what is wrong with the files is said here, by name
    wanted: dict[str, Any] = {
        "ssl_certfile": config.tls_certificate,
        "ssl_keyfile": config.tls_key,
    }
    if config.tls_client_authority is not None:
        wanted |= {
            "ssl_ca_certs": config.tls_client_authority,
            "ssl_cert_reqs": CERT_REQUIRED,
        }
    return wanted
