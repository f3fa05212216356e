"""Connections whose client has stopped reading are cut.

What a client does not read waits: in the kernel, in the transport, and then as pieces of its
answers. ``SEND_BUFFER_BYTES`` bounds the first, asyncio's high-water mark of 64 KiB the second, and
for the third nothing is written while the transport is full, for as long as ``write_timeout_s``
allows. Then the connection is aborted, which ends its calls like any disconnect; what a slow reader
had coming is dropped. Whoever reads a little now and then must drain the transport in that time.
"""

import asyncio
from typing import Any

from pdserve.cluster.http.patience import PatientHTTP

SEND_BUFFER_BYTES = 128 * 1024
"""Of a connection in the kernel, which doubles it; of itself it would grow to megabytes."""


def cutting(timeout_s: float) -> type[asyncio.Protocol]:
    """Our HTTP protocol, which also aborts what cannot be written for ``timeout_s``."""

    class CuttingProtocol(PatientHTTP):
        _cut: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._cut = self.loop.call_later(timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stay()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stay()
            super().connection_lost(exc)

        def _stay(self) -> None:
            if self._cut is not None:
                self._cut.cancel()
                self._cut = None

    protocol: Any = CuttingProtocol
    kind: type[asyncio.Protocol] = protocol
    return kind
