"""One end of a socket pair between the ranks of a split model, with a bound on every wait.

Two kinds of things go over it: messages of any length, and buffers whose length both ends know.
The end of a process closes its ends: whoever reads learns of it at once. After an error an end is
closed for good, and so the other process ends too: an answer that comes too late must not be taken
for that to the next question.
"""

import socket
import struct

from pdserve.errors import RankLost

_LENGTH = struct.Struct("<Q")


class Channel:
    def __init__(self, end: socket.socket, *, wait_s: float | None) -> None:
        """``wait_s``: None waits for as long as the other end is open."""
        end.settimeout(wait_s)
        self._end = end
        self._wait_s = wait_s

    @staticmethod
    def pair(*, wait_s: float) -> tuple["Channel", socket.socket]:
        """One end, and the other for another process to wrap."""
        ours, theirs = socket.socketpair()
        return Channel(ours, wait_s=wait_s), theirs

    def bound(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._end.settimeout(wait_s)

    def send(self, message: bytes) -> None:
        self.write(_LENGTH.pack(len(message)) + message)

    def receive(self) -> bytes:
        length = bytearray(_LENGTH.size)
        self.read(memoryview(length))
        message = bytearray(_LENGTH.unpack(length)[0])
        self.read(memoryview(message))
        return bytes(message)

    def write(self, data: bytes | memoryview) -> None:
        try:
            self._end.sendall(data)
        except OSError as error:
            raise self._lost(error) from error

    def read(self, buffer: memoryview) -> None:
        """Fill ``buffer``.

        Raises:
            RankLost: the other end is closed, or says nothing for ``wait_s``.
        """
        done = 0
        while done < buffer.nbytes:
            try:
                count = self._end.recv_into(buffer[done:])
            except OSError as error:
                raise self._lost(error) from error
            if not count:
                raise self._lost("it has hung up")
            done += count

    def close(self) -> None:
        self._end.close()

    def _lost(self, why: object) -> RankLost:
        self.close()
        within = "" if self._wait_s is None else f", bound {self._wait_s:g} s"
        return RankLost(
            f"no word with another process of this split model ({why}{within}); the worker must "
            "be started again"
        )
