"""What the tests of the wire share: a listener, peers to talk to, and bounds on waiting."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from pdserve.ids import HostId, RequestId
from pdserve.messages import Cancel
from pdserve.wire.connection import Connection
from pdserve.wire.listener import Listener

HERE = HostId("here")
THERE = HostId("there")
MiB = 1 << 20


def cancel(name: str) -> Cancel:
    return Cancel(RequestId(name))


def within(scenario: Coroutine[Any, Any, None], seconds: float = 30.0) -> None:
    """Run a scenario; a bound turns a hang into a failure."""

    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await scenario

    asyncio.run(bounded())


async def until(condition: Any) -> None:
    """Let the event loop turn until ``condition()``."""
    while not condition():
        await asyncio.sleep(0.001)


async def echo(connection: Connection) -> None:
    """Answers every call with its own message and body."""
    while True:
        frame = await connection.receive()
        await connection.answer(frame, frame.message, [frame.body])


@contextlib.asynccontextmanager
async def listening(
    directory: Path, serve: Any = echo, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Listener]:
    listener = await Listener.open(
        directory / "sockets", "s", host=HERE, serve=serve, tcp_host="127.0.0.1", ssl_context=tls
    )
    try:
        yield listener
    finally:
        await listener.close()
