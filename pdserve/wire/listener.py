"""Many peers: a Unix socket, and a TCP port where other hosts take part.

Each connection gets one task that runs ``serve``; when that returns, the connection is closed. A
peer that goes away or breaks the protocol ends its own task and nothing else.
"""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

from pdserve.errors import ConfigError, Disconnected, WireError
from pdserve.ids import HostId
from pdserve.messages import Address
from pdserve.wire.codec import MESSAGES, Codec
from pdserve.wire.connection import HANDSHAKE_TIMEOUT_S, Connection
from pdserve.wire.endpoint import bind_unix, format_tcp
from pdserve.wire.inbound import Received

CONNECTIONS_MAX = 4096
BACKLOG = 1024
"""Connections that wait to be accepted; a Unix socket refuses one more at once."""

_log = logging.getLogger(__name__)

Serve = Callable[[Connection], Awaitable[None]]


class Listener:
    """Open until ``close``. Made by ``open``."""

    address: Address

    def __init__(self, codec: Codec, serve: Serve) -> None:
        self._codec = codec
        self._serve = serve
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._received = Received()

    @staticmethod
    async def open(
        directory: Path,
        name: str,
        *,
        host: HostId,
        serve: Serve,
        codec: Codec = MESSAGES,
        tcp_host: str | None = None,
        tcp_port: int = 0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> "Listener":
        """Listen at ``directory/name`` and, with ``tcp_host``, at that address.

        Args:
            host: of this process.
            serve: awaited once per connection.
            tcp_host: an address under which other hosts reach this one; None for none.
            tcp_port: 0 takes a free one.
            ssl_context: for TCP; without it TCP trusts its network.

        Raises:
            ConfigError: it cannot listen there.
        """
        listener = Listener(codec, serve)
        loop = asyncio.get_running_loop()
        unix = bind_unix(directory, name)
        listener._servers.append(
            await loop.create_unix_server(listener._connection, sock=unix, backlog=BACKLOG)
        )
        listener.address = Address(host, str(directory / name), "")
        if tcp_host is None:
            return listener
        try:
            server = await loop.create_server(
                listener._connection,
                tcp_host,
                tcp_port,
                backlog=BACKLOG,
                ssl=ssl_context,
                ssl_handshake_timeout=None if ssl_context is None else HANDSHAKE_TIMEOUT_S,
            )
        except OSError as error:
            await listener.close()
            raise ConfigError(
                f"cannot listen at {format_tcp(tcp_host, tcp_port)}: {error.strerror or error}"
            ) from error
        listener._servers.append(server)
        port = server.sockets[0].getsockname()[1]
        listener.address = Address(host, str(directory / name), format_tcp(tcp_host, port))
        return listener

    async def close(self) -> None:
        """Stop listening, end every connection and its task, and remove the socket. Idempotent."""
        for server in self._servers:
            server.close()
        Path(self.address.unix_path).unlink(missing_ok=True)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _connection(self) -> Connection:
        return Connection(self._codec, on_open=self._opened, received=self._received)

    def _opened(self, connection: Connection) -> None:
        if len(self._tasks) >= CONNECTIONS_MAX:
            _log.warning("%s refused: %d connections already", connection.peer, len(self._tasks))
            connection.abort()
            return
        task = asyncio.get_running_loop().create_task(self._run(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, connection: Connection) -> None:
        try:
            await self._serve(connection)
        except Disconnected:
            pass
        except WireError as error:
            _log.warning("%s: %s; connection closed", connection.peer, error)
        except Exception:
            _log.exception("serving %s failed; connection closed", connection.peer)
        finally:
            await connection.close()
