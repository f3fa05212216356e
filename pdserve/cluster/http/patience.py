"""How long a client may take to say what it wants.

A body has its own bound (``bodies.BODY_WAIT_S``). uvicorn waits for the head of a request forever,
so that a client who sends a byte now and then holds a connection at no cost to itself; here it has
``HEADERS_WAIT_S`` from its first byte on. A connection on which nothing at all is said is held as
long as an idle one.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADERS_WAIT_S = 30.0


class PatientHTTP(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol, with an end to its patience."""

    _due: asyncio.TimerHandle | None = None
    _has_begun = False  # to say something

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait(float(self.config.timeout_keep_alive))

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._has_begun and self._due is not None:
            self._due.cancel()
            self._due = None
        self._has_begun = True
        if self._due is None and self._is_between():
            self._wait(HEADERS_WAIT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._due is not None:
            self._due.cancel()
        super().connection_lost(exc)

    def _is_between(self) -> bool:
        """No request is under way: what has come since the last one is no whole head."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def _wait(self, seconds: float) -> None:
        self._due = self.loop.call_later(seconds, self._give_up, self.cycle)

    def _give_up(self, cycle: object) -> None:
        self._due = None
        if self.cycle is cycle and self._is_between() and not self.transport.is_closing():
            self.transport.close()
