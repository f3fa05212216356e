"""What waits for one connection, oldest first: messages as bytes, bounded by their number and size.

A message is encoded as it is put in. So one that no frame can carry is its sender's error, at once,
and not that of whoever sends it later, and the bytes that wait are known to the byte.
"""

import asyncio
from collections import deque

from pdserve.errors import QueueFull
from pdserve.wire.codec import MESSAGES, Codec

OUTBOX_MAX = 16_384
"""Messages that may wait, …"""

OUTBOX_BYTES_MAX = 64 << 20
"""… and how many bytes of them. One message that is larger still finds an empty outbox."""


class Outbox:
    """Filled by anybody, emptied by one who waits; used from one event loop."""

    def __init__(
        self,
        *,
        codec: Codec = MESSAGES,
        count_max: int = OUTBOX_MAX,
        bytes_max: int = OUTBOX_BYTES_MAX,
    ) -> None:
        self._codec = codec
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._waiting: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self.byte_count = 0
        """Of what waits."""

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: object, *, peer: str, retry_after_ms: int) -> None:
        """Never blocks. On failure nothing has changed.

        Args:
            peer: who does not take what waits, for the error, which says when to try again.

        Raises:
            QueueFull: too many messages or bytes wait already.
            MessageTooLarge: no frame can carry it.
        """
        data = self._codec.encode(message)
        count, byte_count = len(self), self.byte_count + len(data)
        if count >= self._count_max or (count and byte_count > self._bytes_max):
            raise QueueFull(
                f"{count} messages of {self.byte_count} bytes wait for {peer} already, at most "
                f"{self._count_max} of {self._bytes_max} may",
                retry_after_ms=retry_after_ms,
            )
        self._waiting.append(data)
        self.byte_count = byte_count
        self._changed.set()

    def clear(self) -> None:
        self._waiting.clear()
        self.byte_count = 0

    async def take(self) -> bytes:
        """The oldest message, encoded; waits for one."""
        while not self._waiting:
            self._changed.clear()
            await self._changed.wait()
        data = self._waiting.popleft()
        self.byte_count -= len(data)
        return data
