"""Messages that are heard in the turn of the event loop in which they arrive.

Who waits in ``receive`` is woken for each message, a turn later. Who hears many small ones, and
does what they ask for without waiting, is called instead: that saves a future, a task's step and a
turn of the loop for each. Order is kept, and so are the bounds of the connection: nothing that is
heard waits anywhere.
"""

from collections.abc import Callable, Sequence
from typing import Any

from pdserve.wire.connection import Connection
from pdserve.wire.frame import Frame

Hear = Callable[[Any], bool | None]
"""Takes a message. False: it was the last one that is wanted."""


async def hear_all(connection: Connection, hear: Hear) -> None:
    """Gives every message to ``hear``, until that returns False.

    Raises:
        WireError: the connection has ended, and everything that had come before was heard.
        Exception: what ``hear`` raised; it hears nothing more.
    """
    hearing = _Hearing(hear)
    connection.attend(hearing)
    try:
        while not hearing.is_over:
            # What came before anybody waited, and what wakes us because it is over.
            frame = await connection.receive()
            if hearing.error is not None:
                raise hearing.error
            if not hearing.is_over and hear(frame.message) is False:
                return
    finally:
        hearing.is_over = True


class _Hearing:
    """A connection's attendant."""

    def __init__(self, hear: Hear) -> None:
        self._hear = hear
        self.is_over = False
        self.error: Exception | None = None

    def place(self, message: Any, body_bytes: int) -> Sequence[memoryview] | None:  # noqa: ARG002
        """Of none: a body comes in a buffer of its own."""
        return None

    def take(self, frame: Frame) -> bool:
        """False for the last one: it wakes who waits."""
        if self.is_over:
            return False
        try:
            self.is_over = self._hear(frame.message) is False
        except Exception as error:
            self.error, self.is_over = error, True
        return not self.is_over
