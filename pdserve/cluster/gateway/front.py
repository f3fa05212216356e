"""The servers of one gateway: HTTP on our own uvicorn, and gRPC, around one session.

The same ASGI application also stands behind Serve's proxy; this server is there because the proxy
costs about 3 ms a request. With several gateways on one host the kernel spreads connections over
them (``SO_REUSEPORT``).
"""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from pdserve.access_config import AccessConfig
from pdserve.clock import S, monotonic
from pdserve.cluster.gateway.access import Doorkeeper
from pdserve.cluster.gateway.audit import Audit, AuditFile
from pdserve.cluster.gateway.certificates import grpc_credentials
from pdserve.cluster.gateway.draining import Seen, connection_age_ns, left_ns
from pdserve.cluster.gateway.models import Control, Controls, Models
from pdserve.cluster.gateway.pinning import Pinning
from pdserve.cluster.gateway.quota_exchange import exchange_for_ever
from pdserve.cluster.gateway.session import GatewaySession
from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.server import HttpServer
from pdserve.cluster.http.vllm_metrics import VllmMetrics
from pdserve.cluster.rpc.server import GrpcServer, serve_grpc
from pdserve.cluster.store_metrics import master_of, render, reports_of
from pdserve.config import ClusterConfig, GatewayConfig
from pdserve.errors import GatewayLeaving
from pdserve.kvstore.security import credentials_of
from pdserve.kvstore.shared_counts import SharedCounts

log = logging.getLogger(__name__)

LOOK_S = 0.05
"""How often a gateway that leaves looks whether it may."""

END_S = 2.0
"""For calls that are cut off to be told so."""

ELSEWHERE_MS = 1000
"""When who is cut off should ask again; clients' libraries wait that long of themselves."""


class Front:
    def __init__(self, session: GatewaySession, config: ClusterConfig, control: Control) -> None:
        """``control``: of the model's router."""
        self._session = session
        self._sessions = {session.model_name: session}  # of all models
        self._config = config.gateway
        self._models = Models(session, config.gateway)
        self._controls = Controls(session.model_name, control)
        keys = config.gateway.api_keys
        self._doorkeeper = Doorkeeper(
            None if keys is None else Path(keys), audit=_audit_of(config.gateway.access)
        )
        self._tenants = config.store.tenant_shares
        self._store_credentials = credentials_of(config.store)
        self.app: FastAPI = create_app(
            session,
            config=config.gateway,
            snapshot=self._controls.snapshot,
            recording=control.recording,
            operations=control.operations,
            assign=None if control.assign is None else self._controls.assign,
            doorkeeper=self._doorkeeper,
            stores=self._store_figures,
            models=self._models,
            controls=self._controls,
        )
        session.pinning = self._pinning = Pinning(self._controls.snapshot, self._store_credentials)
        redis = config.gateway.access.quota_redis
        self._counts = None if redis is None else SharedCounts(redis)
        self._exchanging: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self.ports: dict[str, int] = {}
        self._grpc: GrpcServer | None = None
        self._http: HttpServer | None = None
        self._drain_s = config.drain_timeout_s

    def add_model(self, session: GatewaySession, config: GatewayConfig, control: Control) -> None:
        """Serves one more model from now on.

        Args:
            config: the gateway's settings, with how this model's texts are read.

        Raises:
            ConfigError: there is a model of this name, or of an adapter's.
        """
        self._models.add(session, config)
        self._sessions[session.model_name] = session
        self._controls.add(session.model_name, control)
        self.app.state.metrics.add_model(VllmMetrics(session.model_name, session.context_tokens))
        session.pinning = self._pinning

    def remove_model(self, name: str) -> None:
        """Nobody finds it from now on; what runs goes on."""
        self._models.remove(name)
        del self._sessions[name]
        self._controls.remove(name)
        self.app.state.metrics.remove_model(name)

    async def start(self) -> None:
        """Raises ConfigError where a port is taken by somebody else."""
        self._keeping = asyncio.create_task(self._pinning.run())
        if self._counts is not None:
            self._exchanging = asyncio.create_task(
                exchange_for_ever(self._doorkeeper.ledger, self._counts)
            )
        if self._config.responses_redis is not None:  # there may be work that others left
            self.app.state.batches.start()
        if self._config.http_port >= 0:
            self._http = HttpServer(self.app, self._config)
            await self._http.start()
            self.ports["http"] = self._http.port
        if self._config.grpc_port >= 0:
            self._grpc = await serve_grpc(
                self._session,
                config=self._config,
                metrics=self.app.state.metrics,
                credentials=grpc_credentials(self._config),
                doorkeeper=self._doorkeeper,
                models=self._models,
                connection_age_ns=connection_age_ns(limit_ns=int(self._drain_s * S)),
            )
            self.ports["grpc"] = self._grpc.port

    async def stop(self) -> None:
        """Takes no new connection, finishes what it has for as long as ``draining`` allows, and
        ends the rest with an error that says so."""
        await self.app.state.batches.close()  # others go on with them
        if not await self._drain():
            log.warning("this gateway leaves with %d requests", self._in_flight)
        gone = GatewayLeaving(
            f"this gateway ends, and the request was not done within {self._drain_s:g} s or "
            "without a router; send it again, to any other one",
            retry_after_ms=ELSEWHERE_MS,
        )
        if self._http is not None:
            self._http.refuse(gone)
        if self._grpc is not None:
            self._grpc.refuse(gone)
        for session in self._sessions.values():
            session.end_all(gone)
        if self._grpc is not None:
            await self._grpc.stop(grace_s=END_S)
        if self._http is not None:
            await self._http.close()
        await self.app.state.responses.close()
        await self.app.state.batches.documents.close()
        if self._keeping is not None:
            self._keeping.cancel()
        if self._exchanging is not None and self._counts is not None:
            self._exchanging.cancel()
            await self._counts.close()

    @property
    def _in_flight(self) -> int:
        return sum(session.in_flight for session in self._sessions.values())

    async def _drain(self) -> bool:
        """Whether everything was done in its time."""
        grpc = self._grpc
        servers = [each for each in (self._http, grpc) if each is not None]
        partings = [asyncio.create_task(each.drain()) for each in servers]
        asked_ns = led_ns = busy_ns = monotonic()
        while True:
            now_ns = monotonic()
            is_busy = (
                self._in_flight > 0
                or not all(parting.done() for parting in partings)
                or any(each.is_busy for each in servers)
            )
            is_led = any(session.has_router for session in self._sessions.values())
            led_ns = now_ns if is_led else led_ns
            busy_ns = now_ns if is_busy else max(busy_ns, 0 if grpc is None else grpc.busy_ns)
            has_connections = any(each.has_connections for each in servers)
            seen = Seen(asked_ns, led_ns, busy_ns, is_busy, has_connections)
            left = left_ns(seen, limit_ns=int(self._drain_s * S), now_ns=now_ns)
            if not left:
                return not is_busy
            await asyncio.sleep(min(left / S, LOOK_S))

    async def _store_figures(self, snapshot: Mapping[str, Any]) -> bytes:
        reports = await reports_of(snapshot, self._store_credentials)
        return render(reports, self._tenants, await master_of(reports, self._store_credentials))


def _audit_of(settings: AccessConfig) -> Audit:
    if settings.audit_log is None:
        return Audit()
    file = AuditFile(
        Path(settings.audit_log),
        bytes_max=settings.audit_bytes_max,
        files_max=settings.audit_files_max,
    )
    return Audit(file.write)
