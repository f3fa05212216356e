"""What the tests of the wire share: a listener, peers to talk to, and bounds on waiting."""

import asyncio
import contextlib
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from pdserve.ids import HostId, RequestId
from pdserve.messages import Cancel
from pdserve.wire.connection import Connection
from pdserve.wire.listener import Listener

HERE = HostId("here")
THERE = HostId("there")
MiB = 1 << 20


_loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop


@pytest.fixture(autouse=True, params=["asyncio", "uvloop"])
def each_event_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test twice: Ray's actors run on uvloop, everything else on asyncio's own loop."""
    if request.param == "uvloop":
        uvloop = pytest.importorskip("uvloop")
        monkeypatch.setattr(sys.modules[__name__], "_loop_factory", uvloop.new_event_loop)


def cancel(name: str) -> Cancel:
    return Cancel(RequestId(name))


def within(scenario: Coroutine[Any, Any, None], seconds: float = 30.0) -> None:
    """Run a scenario; a bound turns a hang into a failure."""

    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await scenario

    with asyncio.Runner(loop_factory=_loop_factory) as runner:
        runner.run(bounded())


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
