"""The same frames on a blocking socket, for threads that must not touch asyncio.

One thread uses a connection at a time. ``call`` asks and waits. Who wants several answers under way
submits his questions, and takes the answers in the order of the questions: ``answer_to``, then
``receive_body`` until the body's bytes are all where he wants them. He may ``abandon`` what he does
not want any more: it is dropped when it comes, and the connection stays as good as it was.

After a deadline has passed, or an answer that does not fit, the connection is closed, and whoever
needs it opens another.
"""

import array
import contextlib
import itertools
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.errors import (
    Cancelled,
    DeadlineExceeded,
    Disconnected,
    ErrorInfo,
    FrameError,
    WireError,
)
from pdserve.ids import HostId
from pdserve.messages import Address
from pdserve.wire.codec import Codec
from pdserve.wire.endpoint import UnixTarget, refused, set_up, target_of
from pdserve.wire.frame import (
    HEADER_BYTES,
    Buffer,
    Frame,
    Header,
    Kind,
    body_views,
    check_message,
    pack_head,
    parse_header,
    sent_off,
)

WAIT_S = 0.05
"""How long the kernel waits before we look at deadline and cancellation again."""

FILES_MAX = 8
"""That may come with one answer."""

_AHEAD_BYTES = 20 << 10
"""A frame's start is read with so much of what follows, which is copied: cheaper than another call
of the kernel for a block of 16 KiB, and not much for a large one."""
_DROP_BYTES = 256 << 10
_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Wait:
    """How long to wait, and for what else."""

    until_s: float  # by ``time.monotonic``
    limit_s: float  # as it was at the beginning, for the message
    cancelled: threading.Event | None = None

    @staticmethod
    def of(limit_s: float, cancelled: threading.Event | None = None) -> "Wait":
        return Wait(time.monotonic() + limit_s, limit_s, cancelled)

    def for_all(self) -> "Wait":
        """The same for what cannot be cancelled half-way."""
        return self if self.cancelled is None else Wait(self.until_s, self.limit_s)

    def check(self) -> None:
        """Raises Cancelled or DeadlineExceeded."""
        if self.cancelled is not None and self.cancelled.is_set():
            raise Cancelled("the transfer was cancelled")
        if time.monotonic() >= self.until_s:
            raise DeadlineExceeded(f"{self.limit_s:g} s have passed")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer whose body is on its way."""

    message: Any
    body_bytes: int


class BlockingConnection:
    """One peer that answers calls. Made by ``connect_blocking``."""

    def __init__(self, connected: socket.socket, codec: Codec) -> None:
        self.peer = set_up(connected)
        _wait_at_most(connected, WAIT_S)
        self._socket = connected
        # A body is received by one call of the kernel; TLS knows no such thing.
        self._whole = 0 if isinstance(connected, ssl.SSLSocket) else socket.MSG_WAITALL
        self._codec = codec
        self._call_ids = itertools.count(1)
        self._closed = False
        self._awaited: deque[tuple[int, str]] = deque()  # calls whose answers have not begun
        self._dropped: set[int] = set()  # those of them that nobody wants any more
        self._body_left = 0  # of the answer that was begun
        self._ahead = memoryview(bytearray(_AHEAD_BYTES))
        self._ahead_start = self._ahead_end = 0
        self._unsent = _NOTHING  # of a post
        self._files: list[int] | None = None  # where those go that come with an awaited answer
        self._poll = select.poll()
        self._poll.register(connected, select.POLLRDHUP)

    def call(
        self,
        message: object,
        body: Sequence[Buffer] = (),
        *,
        timeout_s: float,
        into: memoryview | None = None,
        files: list[int] | None = None,
    ) -> Frame:
        """The answer to ``message``; an error that the peer answers is raised here.

        Args:
            into: where the answer's body goes, without another copy; it must be large enough.
                ``Frame.body`` is then the part of it that was written.
            files: gets descriptors of what comes with the answer, also when the call fails; they
                are the caller's to close.

        Raises:
            DeadlineExceeded: no whole answer within ``timeout_s``; the connection is closed.
            Disconnected: the peer is gone, or the connection is closed.
            FrameError: the peer broke the protocol, or its body does not fit ``into``.
        """
        wait = Wait.of(timeout_s)
        call = self.submit(message, body, wait=wait)
        self._files = files
        try:
            answer = self.answer_to(call, wait=wait)
        finally:
            self._files = None
        if into is None:
            room = memoryview(bytearray(answer.body_bytes))
        elif answer.body_bytes <= into.nbytes:
            room = into.cast("B")[: answer.body_bytes]
        else:
            self.close()
            raise FrameError(
                f"{self.peer} answers with {answer.body_bytes} bytes, there is room for "
                f"{into.nbytes}"
            )
        if len(room):
            self.receive_body(room, wait=wait)
        return Frame(answer.message, room, call)

    def own_host(self) -> str:
        """The address of this process as the peer sees it; of a TCP connection."""
        return str(self._socket.getsockname()[0])

    def submit(self, message: object, body: Sequence[Buffer] = (), *, wait: Wait) -> int:
        """Ask, and do not wait for the answer; the number to ask for it by.

        When it returns the kernel has the body. Once begun it cannot be cancelled. Who submits
        must see to it that the peer is never kept from answering: answers with large bodies are to
        be taken before many more questions are asked.
        """
        data = self._codec.encode(message)
        views = body_views(body)
        call = next(self._call_ids)
        head = pack_head(Kind.MESSAGE, call, data, sum(map(len, views)))
        name = type(message).__name__
        with self._ends_on_failure(name, wait):
            unsent, self._unsent = self._unsent, _NOTHING
            self._send_all([*body_views([unsent]), memoryview(head), *views], wait.for_all())
        self._awaited.append((call, name))
        return call

    def answer_to(self, call: int, *, wait: Wait) -> Answer:
        """The answer to the oldest call that was not taken yet; an error of the peer is raised.

        Raises:
            Cancelled: nothing has been taken, the answer is still to come.
        """
        with self._ends_on_failure(self._awaited[0][1], wait):
            while True:
                self._drop_body(wait)
                header, message = self._receive_head(wait)
                self._awaited.popleft()
                self._body_left = header.body_bytes
                if header.call not in self._dropped:
                    break
                self._dropped.remove(header.call)
            if header.call != call:
                raise FrameError(f"the answer to call {header.call} is next, not to {call}")
        if isinstance(message, ErrorInfo):
            raise message.to_error()
        return Answer(message, header.body_bytes)

    def receive_body(self, view: memoryview, *, wait: Wait) -> None:
        """The next bytes of the body of the last answer."""
        with self._ends_on_failure("with all of a body", wait):
            wait.check()
            if len(view) > self._body_left:
                raise FrameError(f"{len(view)} bytes of a body wanted, it has {self._body_left}")
            self._receive_into(view, wait)

    def abandon(self) -> None:
        """Want nothing of what is under way; what still comes of it is dropped then."""
        self._dropped.update(call for call, _ in self._awaited)

    def post(self, message: object) -> bool:
        """Send a message that expects no answer, and do not wait. False: the peer is gone or takes
        nothing just now, and the message is dropped. Not over TLS."""
        if self._closed:
            return False
        try:
            if len(self._unsent):
                self._unsent = self._unsent[self._send_now(self._unsent) :]
                if len(self._unsent):
                    return False
            data = self._codec.encode(message)
            packed = memoryview(pack_head(Kind.MESSAGE, 0, data))
            self._unsent = packed[self._send_now(packed) :]
        except OSError:  # it is full, or the peer is gone: the next call says which
            return False
        return True

    def is_open(self) -> bool:
        """Whether the peer was there a moment ago. Costs a microsecond."""
        return not self._closed and not self._poll.poll(0)

    def close(self) -> None:
        """Idempotent; a call under way in another thread ends with Disconnected."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _ends_on_failure(self, what: str, wait: Wait) -> "_EndsOnFailure":
        if self._closed:
            raise Disconnected(f"the connection to {self.peer} is closed")
        return _EndsOnFailure(self, what, wait)

    def _receive_head(self, wait: Wait) -> tuple[Header, object]:
        self._read_ahead(HEADER_BYTES, wait)
        start = self._ahead_start
        header = parse_header(self._ahead[start : start + HEADER_BYTES])
        if header.kind is not Kind.ANSWER or header.call != self._awaited[0][0]:
            raise FrameError(
                f"{self.peer} sent {header.kind.name} {header.call}, not the answer to call "
                f"{self._awaited[0][0]}"
            )
        size = HEADER_BYTES + header.message_bytes
        if size <= _AHEAD_BYTES:
            self._read_ahead(size, wait)
            start = self._ahead_start
            data = self._ahead[start + HEADER_BYTES : start + size]
            check_message(header, data)
            message = self._codec.decode(data)
            self._ahead_start += size
        else:
            self._ahead_start += HEADER_BYTES
            data = memoryview(bytearray(header.message_bytes))
            self._take(data, wait)
            check_message(header, data)
            message = self._codec.decode(data)
        return header, message

    def _read_ahead(self, count: int, wait: Wait) -> None:
        """Have ``count`` bytes in the buffer. What is there already survives a cancellation."""
        if self._ahead_start == self._ahead_end:
            # Empty: its whole length takes what comes, or half of all small blocks would not fit.
            self._ahead_start = self._ahead_end = 0
        elif len(self._ahead) - self._ahead_start < count:
            rest = bytes(self._ahead[self._ahead_start : self._ahead_end])
            self._ahead[: len(rest)] = rest
            self._ahead_start, self._ahead_end = 0, len(rest)
        while self._ahead_end - self._ahead_start < count:
            self._ahead_end += self._receive(self._ahead[self._ahead_end :], wait)

    def _receive_into(self, view: memoryview, wait: Wait) -> None:
        """Of the body; what has come is counted, whatever happens then."""
        while len(view):
            count = min(len(view), self._ahead_end - self._ahead_start)
            if count:
                view[:count] = self._ahead[self._ahead_start : self._ahead_start + count]
                self._ahead_start += count
            else:
                count = self._receive(view, wait, self._whole)
            self._body_left -= count
            view = view[count:]

    def _take(self, data: memoryview, wait: Wait) -> None:
        """A message that is larger than the buffer: all of it, it cannot be cancelled."""
        self._body_left += len(data)
        self._receive_into(data, wait.for_all())

    def _drop_body(self, wait: Wait) -> None:
        """Receive what nobody wants of the last answer's body."""
        while self._body_left:
            room = memoryview(bytearray(min(self._body_left, _DROP_BYTES)))
            self._receive_into(room, wait)

    def _receive(self, view: memoryview, wait: Wait, flags: int = 0) -> int:
        """At least one byte; with ``MSG_WAITALL`` as many as come within ``WAIT_S``."""
        while True:
            wait.check()  # each time: a peer that trickles has a deadline too
            try:
                if self._files is None:
                    count = self._socket.recv_into(view, 0, flags)
                else:
                    count = self._receive_files(view, self._files)
            except BlockingIOError:
                continue  # ``WAIT_S`` are over
            except TimeoutError as error:
                _raise_if_dead(error)
                continue
            if count == 0:
                raise Disconnected(f"{self.peer} is gone")
            return count

    def _receive_files(self, view: memoryview, files: list[int]) -> int:
        """The kernel hands files over with the first byte that they were sent with."""
        descriptors = array.array("i")
        space = socket.CMSG_SPACE(FILES_MAX * descriptors.itemsize)
        count, ancillary, flags, _ = self._socket.recvmsg_into(
            [view], space, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        files += descriptors
        if flags & socket.MSG_CTRUNC:
            raise FrameError(f"{self.peer} sent more than {FILES_MAX} files with one answer")
        return count

    def _send_now(self, view: memoryview) -> int:
        return self._socket.send(view, socket.MSG_DONTWAIT)

    def _send_all(self, views: list[memoryview], wait: Wait) -> None:
        while views:
            try:
                if isinstance(self._socket, ssl.SSLSocket):
                    sent = self._socket.send(views[0])
                    views = [views[0][sent:], *views[1:]] if sent < len(views[0]) else views[1:]
                else:
                    views = sent_off(views, self._socket)
            except BlockingIOError:
                pass
            except TimeoutError as error:
                _raise_if_dead(error)
            wait.check()


class _EndsOnFailure:
    """Closes the connection when the stream is of no use any more, and says why in our words. A
    class, since a generator takes a microsecond more, three times per call."""

    __slots__ = ("_connection", "_wait", "_what")

    def __init__(self, connection: BlockingConnection, what: str, wait: Wait) -> None:
        self._connection = connection
        self._what = what
        self._wait = wait

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None or not isinstance(error, DeadlineExceeded | OSError | WireError):
            return
        self._connection.close()
        peer = self._connection.peer
        if isinstance(error, DeadlineExceeded):
            raise DeadlineExceeded(
                f"{peer} did not answer {self._what} within {self._wait.limit_s:g} s"
            ) from error
        if isinstance(error, OSError):
            raise Disconnected(f"{peer} is gone: {error.strerror or error}") from error


def _wait_at_most(connected: socket.socket, wait_s: float) -> None:
    """By the kernel's own clock, which saves a call of it each time; TLS needs Python's."""
    if isinstance(connected, ssl.SSLSocket):
        connected.settimeout(wait_s)
        return
    connected.settimeout(None)
    limit = struct.pack("ll", 0, int(wait_s * 1e6))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _raise_if_dead(error: TimeoutError) -> None:
    """The kernel gave the peer up; without a number it was only our ``WAIT_S``."""
    if error.errno is not None:
        raise error


def connect_blocking(
    address: Address,
    *,
    host: HostId,
    codec: Codec,
    timeout_s: float = 5.0,
    ssl_context: ssl.SSLContext | None = None,
) -> BlockingConnection:
    """A connection to ``address``; as ``connection.connect``, without an event loop."""
    target = target_of(address, host)
    with contextlib.ExitStack() as closes_on_failure:
        try:
            if isinstance(target, UnixTarget):
                connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                closes_on_failure.callback(connected.close)
                connected.settimeout(timeout_s)
                connected.connect(target.path)
            else:
                connected = socket.create_connection((target.host, target.port), timeout_s)
                closes_on_failure.callback(connected.close)
                if ssl_context is not None:
                    connected = ssl_context.wrap_socket(connected, server_hostname=target.host)
                    closes_on_failure.callback(connected.close)
            connection = BlockingConnection(connected, codec)
        except OSError as error:
            raise refused(target, error) from error
        closes_on_failure.pop_all()
    return connection
