"""Listening to somebody who must not fall silent.

A closed connection is noticed at once, but a process that is stopped, or whose loop is dead, keeps
its connections. So who is to be relied on says something regularly, and who hears nothing hangs up.
"""

import asyncio
import contextlib
from collections.abc import Callable

from pdserve.wire.connection import Connection
from pdserve.wire.hearing import hear_all

LOOKS = 6
"""Silence is counted in looks of the listener's own loop, so many of them: a listener that was
itself held up has heard nothing either, and must not blame the other side."""

BEATS = 3
"""So often within the time that is taken for silence something is to be said."""


async def listen(
    connection: Connection, hear: Callable[[object], None], *, silence_s: float
) -> None:
    """Hands over every message until the connection ends.

    Raises:
        PdserveError: it has ended; by our own hand, where nothing came for ``silence_s``.
    """
    looks = 0

    async def look() -> None:
        nonlocal looks
        while looks < LOOKS:
            await asyncio.sleep(silence_s / LOOKS)
            looks += 1
        connection.abort()

    def listening(message: object) -> None:
        nonlocal looks
        looks = 0
        hear(message)

    looking = asyncio.create_task(look())
    try:
        await hear_all(connection, listening)
    finally:
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking
