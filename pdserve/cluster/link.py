"""The one connection a gateway or a worker keeps to the router.

It survives the router: when the connection breaks, the link asks where the router is now, connects
again, says hello again, and only then sends what waited. What waited is bounded; a link that
cannot reach a router for that long has a bigger problem than lost load reports.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from pdserve.errors import PdserveError, QueueFull
from pdserve.ids import HostId
from pdserve.messages import Address
from pdserve.wire.connection import Connection, connect

log = logging.getLogger(__name__)

OUTBOX_MAX = 16_384
RETRY_S = 0.05
RETRY_S_MAX = 1.0


class Person(Protocol):
    """Who holds the link: what it says first, and what it does with what it hears."""

    def hello(self) -> object: ...
    def hear(self, message: object) -> None: ...
    def reconnected(self) -> None:
        """Called after hello on every connection but the first."""
        ...


class RouterLink:
    def __init__(
        self, person: Person, *, find_router: Callable[[], Awaitable[Address]], host: HostId
    ) -> None:
        self._person = person
        self._find_router = find_router
        self._host = host
        self._outbox: asyncio.Queue[object] = asyncio.Queue(OUTBOX_MAX)
        self._task: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()

    async def start(self, *, timeout_s: float) -> None:
        """Connects for the first time.

        Raises:
            TimeoutError: no router answered within ``timeout_s``.
        """
        self._task = asyncio.create_task(self._run())
        await asyncio.wait_for(self._connected.wait(), timeout_s)

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    def post(self, message: object) -> None:
        """Sends in order, later. Never blocks.

        Raises:
            QueueFull: the router has not taken anything for ``OUTBOX_MAX`` messages.
        """
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            raise QueueFull(
                f"{OUTBOX_MAX} messages wait for the router already", retry_after_ms=1000
            ) from None

    async def close(self) -> None:
        """Sends what waits, then hangs up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while self._connected.is_set() and not self._outbox.empty():
                    await asyncio.sleep(0.005)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        retry_s, first = RETRY_S, True
        while True:
            try:
                connection = await connect(await self._find_router(), host=self._host)
            except (PdserveError, OSError, TimeoutError) as error:
                log.debug("no router yet: %s", error)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_S_MAX)
                continue
            retry_s = RETRY_S
            try:
                await connection.send(self._person.hello())
                self._connected.set()
                if not first:
                    log.warning("connected to the router again")
                    self._person.reconnected()
                first = False
                await self._converse(connection)
            except (PdserveError, OSError) as error:
                log.warning("lost the router: %s", error)
            finally:
                self._connected.clear()
                await connection.close()

    async def _converse(self, connection: Connection) -> None:
        sender = asyncio.create_task(self._send(connection))
        try:
            while True:
                frame = await connection.receive()
                self._person.hear(frame.message)
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, PdserveError, OSError):
                await sender

    async def _send(self, connection: Connection) -> None:
        while True:
            await connection.send(await self._outbox.get())
