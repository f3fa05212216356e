"""From bytes as they arrive to frames: the receiving half of a connection, without its socket.

Bytes land in one small buffer, from which frames are cut; a frame that does not fit gets a buffer
of its own size, into which the kernel then writes, so that a large body is never copied again. A
body may also be received where somebody wants it: he is asked when the message before it is known.
"""

import mmap
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pdserve.errors import FrameError
from pdserve.values import value
from pdserve.wire.codec import Codec
from pdserve.wire.frame import (
    BODY_BYTES_MAX,
    HEADER_BYTES,
    Frame,
    Header,
    Kind,
    check_message,
    parse_header,
)

_RECEIVE_BYTES = 64 << 10  # the start of a large body lands here too, and is copied

_MAPPED_FROM_BYTES = 4 << 20
"""A body of so much gets pages of its own, which take memory when bytes arrive in them: a header
may announce 256 MiB, and nothing may follow."""

_NOTHING = memoryview(b"")

POSTERS_MAX = 4096

Place = Callable[[Any, int], Sequence[memoryview] | None]
"""Where the body, of so many bytes, of a message is to be received; None: in its own buffer."""


@value
class Arrived:
    """One frame."""

    header: Header
    data: memoryview  # the message's bytes, until the next of them are received
    message: Any  # decoded; None if nobody had to know it yet
    body: memoryview
    placed: bool  # the body is in its place, ``body`` is empty


class Received(OrderedDict[int, int]):
    """The last sequence number received from each poster, so that a post repeated after a broken
    connection is dropped. Remembers the ``POSTERS_MAX`` posters that came last."""

    def last(self, poster: int) -> int:
        return self.get(poster, 0)

    def note(self, poster: int, sequence: int) -> None:
        self[poster] = sequence
        self.move_to_end(poster)
        if len(self) > POSTERS_MAX:
            self.popitem(last=False)


class Attendant(Protocol):
    """Asked only while ``receive`` waits and nothing that came before is left: order is kept."""

    def place(self, message: Any, body_bytes: int) -> Sequence[memoryview] | None:
        """Where the body of ``message`` is to be received; None for a buffer of its own.

        The views are written until the frame is complete, or ``dismiss`` is called.
        """
        ...

    def take(self, frame: Frame) -> bool:
        """Serve a frame, a call by ``answer_now``; False leaves it to ``receive``. ``frame.placed``
        says that its body is in its place."""
        ...


class Inbound:
    def __init__(self, codec: Codec) -> None:
        self.place: Place | None = None
        self.body_bytes_max = BODY_BYTES_MAX
        self._codec = codec
        # [start, end) of the view is not yet parsed. A frame under way that lacks bytes means that
        # the view is empty.
        self._view = memoryview(bytearray(_RECEIVE_BYTES))
        self._start = 0
        self._end = 0
        self._header: Header | None = None
        self._apart = False  # its body does not follow its message in one buffer
        self._data = _NOTHING  # its message, when the body is awaited apart
        self._message: Any = None
        self._placed = False
        self._part = _NOTHING  # the buffer that is being filled
        self._filled = 0
        self._parts: list[memoryview] = []  # those that come after it

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._header is not None and self._start == self._end:
            return self._part[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
            return self._view
        if self._start > 0:
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._view[self._end :]

    def filled(self, count: int) -> None:
        """``count`` bytes are in the last ``buffer``."""
        if self._header is not None and self._start == self._end:
            self._filled += count
        else:
            self._end += count

    def forget(self) -> None:
        """What was not taken is gone."""
        self._start = self._end = 0

    def displace(self) -> None:
        """When this returns, nothing more is written to where a body was placed."""
        self.place = None
        if self._header is not None and self._placed:
            left = len(self._part) - self._filled + sum(map(len, self._parts))
            self._part, self._filled, self._parts = _room(left), 0, []

    def take(self) -> Arrived | None:
        """The next frame; None until more bytes are there. Raises FrameError."""
        if self._header is None:
            if self._end - self._start < HEADER_BYTES:
                return None
            header = parse_header(self._view[self._start : self._start + HEADER_BYTES])
            self._start += HEADER_BYTES
            end = self._start + header.message_bytes
            if end <= self._end and not header.body_bytes:  # as most are: no need of a copy
                data = self._view[self._start : end]
                self._start = end
                return Arrived(header, data, None, _NOTHING, placed=False)
            self._begin(header)
        if not self._take_payload():
            return None
        assert self._header is not None
        header, self._header = self._header, None
        if not self._apart:
            end = header.message_bytes
            return Arrived(header, self._part[:end], None, self._part[end:], placed=False)
        body = _NOTHING if self._placed else self._part
        placed, self._placed = self._placed, False
        return Arrived(header, self._data, self._message, body, placed)

    def _begin(self, header: Header) -> None:
        """A frame that is received into buffers of its own: the first of them is allocated."""
        if header.body_bytes > self.body_bytes_max:
            raise FrameError(
                f"a body of {header.body_bytes} bytes, at this point at most "
                f"{self.body_bytes_max} are allowed"
            )
        is_call = header.kind is Kind.MESSAGE and header.body_bytes > 0
        self._apart = is_call and self.place is not None
        size = header.message_bytes + (0 if self._apart else header.body_bytes)
        self._part, self._filled = _room(size), 0
        self._header, self._data = header, _NOTHING

    def _take_payload(self) -> bool:
        """Whether message and body are complete."""
        while True:
            count = min(len(self._part) - self._filled, self._end - self._start)
            if count:
                source = self._view[self._start : self._start + count]
                self._part[self._filled : self._filled + count] = source
                self._start += count
                self._filled += count
            if self._filled < len(self._part):
                return False
            if not self._next_part():
                return True

    def _next_part(self) -> bool:
        """Whether there is one more buffer to fill for the frame under way."""
        assert self._header is not None
        if self._apart and not self._data:
            self._data, size = self._part, self._header.body_bytes
            check_message(self._header, self._data)
            self._message = self._codec.decode(self._data)
            places = None if self.place is None else self.place(self._message, size)
            self._placed = places is not None
            self._parts = list(places or [_room(size)])
            assert sum(map(len, self._parts)) == size, "a body needs room for all of it"
        if not self._parts:
            return False
        self._part, self._filled = self._parts.pop(0), 0
        return True


def _room(size: int) -> memoryview:
    return memoryview(bytearray(size) if size < _MAPPED_FROM_BYTES else mmap.mmap(-1, size))
