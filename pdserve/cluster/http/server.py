"""The HTTP server of a gateway: uvicorn, and how it leaves.

uvicorn alone leaves too fast: it hangs up on clients that are about to ask, on connections that it
keeps for them, and answers what it cuts off with a bare 500. Here it goes on while its owner drains
(``drain``), tells every client to ask somebody else next (``connection: close``), and what is cut
off in the end gets an error that says so.
"""

import asyncio
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdserve.cluster.gateway.certificates import certificate_of
from pdserve.cluster.http.errors import error_response
from pdserve.cluster.http.slow_readers import SEND_BUFFER_BYTES, cutting
from pdserve.config import GatewayConfig
from pdserve.errors import ConfigError, PdserveError
from pdserve.wire.listening import retire
from pdserve.wire.tls import CERT_REQUIRED

BACKLOG = 2048

END_S = 2
"""For answers under way to be ended, once they have been told that they are cut off."""

KEEP_ALIVE_S = 120
"""Of idle connections: longer than clients and proxies keep them. Who closes one meets a request
that is on its way, and clients do not send a POST twice of themselves."""


_CLOSE = (b"connection", b"close")


class HttpServer:
    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        self._app = app
        self._config = config
        self._listening: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None
        self._server: _Server | None = None
        self._is_draining = False
        self._refusal: PdserveError | None = None
        self.port = 0  # once it has started

    @property
    def is_busy(self) -> bool:
        """Whether a request is under way."""
        return self._server is not None and bool(self._server.server_state.tasks)

    @property
    def has_connections(self) -> bool:
        return self._server is not None and bool(self._server.server_state.connections)

    async def start(self) -> None:
        """Raises ConfigError where the port is taken by somebody else."""
        self._listening = _bind(self._config)
        self.port = self._listening.getsockname()[1]
        self._server = _Server(
            uvicorn.Config(
                self._answer,
                interface="asgi3",
                log_level="warning",
                access_log=False,
                lifespan="off",
                http=cutting(self._config.write_timeout_s),
                timeout_graceful_shutdown=END_S,
                timeout_keep_alive=KEEP_ALIVE_S,
                **_tls(self._config),
            )
        )
        # Off the main thread, as replicas are, uvicorn leaves signals to their owner.
        self._serving = asyncio.create_task(self._server.serve([self._listening]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.005)

    async def drain(self) -> None:
        """Takes no new connection, but answers on those that there are. Returns when it listens no
        more."""
        if self._server is None or self._listening is None:
            return
        self._is_draining = True
        if self._config.replicas > 1:  # others listen at this port
            await retire([self._listening])
        self._server.stop_listening()

    def refuse(self, error: PdserveError) -> None:
        """From now on the answer to what comes, and to what is cut off."""
        self._refusal = error

    async def close(self) -> None:
        """Closes what idles, and whatever does not end of itself within ``END_S``."""
        if self._server is None or self._serving is None:
            return
        self._server.should_exit = True
        await self._serving
        if cancelled := self._server.server_state.tasks:
            await asyncio.wait(cancelled, timeout=END_S)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_and_see(message: Message) -> None:
            nonlocal has_begun
            if not has_begun and self._is_draining:
                message = {**message, "headers": [*message.get("headers", ()), _CLOSE]}
            has_begun = True
            await send(message)

        if self._refusal is not None:
            await error_response(self._refusal, scope["path"])(scope, receive, send_and_see)
            return
        try:
            await self._app(scope, receive, send_and_see)
        except asyncio.CancelledError:
            if has_begun or self._refusal is None:
                raise
            await error_response(self._refusal, scope["path"])(scope, receive, send_and_see)


class _Server(uvicorn.Server):
    def stop_listening(self) -> None:
        for server in self.servers:
            server.close()
        self.servers.clear()


def _bind(config: GatewayConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    if config.replicas > 1:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((config.host, config.http_port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"gateway.http_port is {config.http_port} on {config.host}: {error.strerror}; "
            "set another, or 0 for a free one"
        ) from error
    listening.listen(BACKLOG)
    return listening


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
