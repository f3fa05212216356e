"""Bodies to the kernel without a copy, past an asyncio transport that has nothing to send.

A transport copies what the kernel does not take at once, and takes one buffer per call. Here a
message and all parts of its body go out together, from where they lie.
"""

import asyncio
import os
import socket
from collections.abc import Sequence

from pdserve.wire.frame import sent_off


class DirectSender:
    """The socket of a transport, once more.

    Who sends here makes sure that the transport's own buffer is empty.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._socket = duplicate_of(transport)
        self._socket.setblocking(False)
        self._sendable: asyncio.Future[None] | None = None

    def send_some(self, views: list[memoryview]) -> list[memoryview]:
        """What the kernel does not take at once. Raises OSError when the peer is gone."""
        try:
            return sent_off(views, self._socket)
        except BlockingIOError:
            return views

    async def wait(self) -> None:
        """Until the kernel takes more, or ``wake``."""
        loop = asyncio.get_running_loop()
        self._sendable = loop.create_future()
        loop.add_writer(self._socket.fileno(), self.wake)
        try:
            await self._sendable
        finally:
            self._sendable = None
            if self._socket.fileno() >= 0:
                loop.remove_writer(self._socket.fileno())

    def wake(self) -> None:
        if self._sendable is not None and not self._sendable.done():
            self._sendable.set_result(None)

    def close(self) -> None:
        self.wake()
        if self._sendable is not None:
            asyncio.get_running_loop().remove_writer(self._socket.fileno())
        self._socket.close()


def send_files(transport: asyncio.Transport, data: bytes, descriptors: Sequence[int]) -> int:
    """How many bytes of ``data`` went out, with descriptors of open files; a transport cannot do
    this. Over a Unix socket. Raises OSError when the peer is gone, or takes nothing just now."""
    with duplicate_of(transport) as connected:
        return socket.send_fds(connected, [data], list(descriptors))


def duplicate_of(transport: asyncio.Transport) -> socket.socket:
    """The socket itself; both asyncio and uvloop wrap theirs and allow it little."""
    wrapped: socket.socket = transport.get_extra_info("socket")
    return socket.socket(fileno=os.dup(wrapped.fileno()))
