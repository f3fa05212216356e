"""The same frames on a blocking socket, for threads that must not touch asyncio.

One thread uses a connection at a time, with one call under way. After a timeout, or an answer that
does not fit, nobody knows where in the stream the next frame begins: the connection is closed, and
whoever needs it opens another.
"""

import contextlib
import itertools
import socket
import ssl
import time
from collections.abc import Sequence

from pdserve.errors import DeadlineExceeded, Disconnected, ErrorInfo, FrameError, WireError
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
    pack_header,
    parse_header,
)

_VECTOR_MAX = 512  # buffers in one sendmsg; the system's limit is 1024


class BlockingConnection:
    """One peer that answers calls. Made by ``connect_blocking``."""

    def __init__(self, connected: socket.socket, codec: Codec) -> None:
        self.peer = set_up(connected)
        self._socket = connected
        self._codec = codec
        self._call_ids = itertools.count(1)
        self._closed = False

    def call(
        self,
        message: object,
        body: Sequence[Buffer] = (),
        *,
        timeout_s: float,
        into: memoryview | None = None,
    ) -> Frame:
        """The answer to ``message``; an error that the peer answers is raised here.

        Args:
            into: where the answer's body goes, without another copy; it must be large enough.
                ``Frame.body`` is then the part of it that was written.

        Raises:
            DeadlineExceeded: no whole answer within ``timeout_s``; the connection is closed.
            Disconnected: the peer is gone, or the connection is closed.
            FrameError: the peer broke the protocol, or its body does not fit ``into``.
        """
        if self._closed:
            raise Disconnected(f"the connection to {self.peer} is closed")
        data = self._codec.encode(message)
        views = body_views(body)
        call = next(self._call_ids)
        head = pack_header(Header(Kind.MESSAGE, call, len(data), sum(map(len, views)))) + data
        deadline_s = time.monotonic() + timeout_s
        try:
            self._send_all([memoryview(head), *views], deadline_s)
            frame = self._receive_answer(call, into, deadline_s)
        except TimeoutError as error:
            self.close()
            raise DeadlineExceeded(
                f"{self.peer} did not answer {type(message).__name__} within {timeout_s} s"
            ) from error
        except OSError as error:
            self.close()
            raise Disconnected(f"{self.peer} is gone: {error.strerror or error}") from error
        except WireError:
            self.close()
            raise
        if isinstance(frame.message, ErrorInfo):
            raise frame.message.to_error()
        return frame

    def close(self) -> None:
        """Idempotent; a call under way in another thread ends with Disconnected."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _receive_answer(self, call: int, into: memoryview | None, deadline_s: float) -> Frame:
        head = memoryview(bytearray(HEADER_BYTES))
        self._receive_into(head, deadline_s)
        header = parse_header(head)
        if header.kind is not Kind.ANSWER or header.call != call:
            raise FrameError(
                f"{self.peer} sent {header.kind.name} {header.call}, not the answer to call {call}"
            )
        data = memoryview(bytearray(header.message_bytes))
        self._receive_into(data, deadline_s)
        if into is None:
            body = memoryview(bytearray(header.body_bytes))
        elif header.body_bytes <= into.nbytes:
            body = into.cast("B")[: header.body_bytes]
        else:
            raise FrameError(
                f"{self.peer} answers with {header.body_bytes} bytes, there is room for "
                f"{into.nbytes}"
            )
        self._receive_into(body, deadline_s)
        return Frame(self._codec.decode(data), body, call)

    def _send_all(self, views: list[memoryview], deadline_s: float) -> None:
        while views:
            self._socket.settimeout(_remaining_s(deadline_s))
            if isinstance(self._socket, ssl.SSLSocket):
                sent = self._socket.send(views[0])
            else:
                sent = self._socket.sendmsg(views[:_VECTOR_MAX])
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def _receive_into(self, view: memoryview, deadline_s: float) -> None:
        while len(view):
            self._socket.settimeout(_remaining_s(deadline_s))
            count = self._socket.recv_into(view)
            if count == 0:
                raise Disconnected(f"{self.peer} is gone")
            view = view[count:]


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


def _remaining_s(deadline_s: float) -> float:
    remaining_s = deadline_s - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s
