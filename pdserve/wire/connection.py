"""One peer, from asyncio: messages, calls with answers, and back-pressure both ways.

Inbound bytes land in one small buffer, from which frames are cut; a frame that does not fit gets a
buffer of its own size, into which the kernel then writes, so that a large body is never copied
again. At most ``INBOUND_FRAMES_MAX`` frames or ``INBOUND_BYTES_MAX`` bytes wait to be received;
then the socket is not read until somebody receives. Answers queue behind messages: who never
receives must not expect answers either, beyond that bound.

Outbound, ``send`` returns when the kernel has the body (which may then be reused), and waits for
earlier bytes to go before it hands over its own: at most one message is buffered here.

When the peer dies or breaks the protocol, every waiting call and ``receive`` end with a
``WireError``; what had arrived before is still received first.
"""

import asyncio
import itertools
import os
import socket
import ssl
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import cast

from pdserve.errors import (
    CapacityError,
    DeadlineExceeded,
    Disconnected,
    ErrorInfo,
    FrameError,
    WireError,
)
from pdserve.ids import HostId
from pdserve.messages import Address
from pdserve.wire.codec import MESSAGES, Codec
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

__all__ = ["Connection", "Frame", "connect"]

INBOUND_FRAMES_MAX = 4096
INBOUND_BYTES_MAX = 64 << 20
CALLS_MAX = 4096
"""Calls that may wait for their answers on one connection."""

CLOSE_TIMEOUT_S = 1.0
HANDSHAKE_TIMEOUT_S = 10.0
POSTERS_MAX = 4096
_RECEIVE_BYTES = 256 << 10
_PIECE_BYTES = 256 << 10  # a body goes to the transport in such pieces: what it buffers it copies


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


class Connection(asyncio.BufferedProtocol):
    """One peer. Made by ``connect`` and by ``Listener``; used from one event loop."""

    def __init__(
        self,
        codec: Codec,
        *,
        on_open: Callable[["Connection"], None] | None = None,
        on_receipt: Callable[[int], None] | None = None,
        on_end: Callable[[], None] | None = None,
        received: Received | None = None,
    ) -> None:
        self.peer = "nobody yet"
        self._codec = codec
        self._on_open = on_open
        self._on_receipt = on_receipt
        self._on_end = on_end
        self._transport: asyncio.Transport
        self._ended: WireError | None = None
        self._gone = asyncio.Event()  # the transport is closed
        # Inbound: [start, end) of the buffer is not yet parsed. A payload that is not complete
        # means that the buffer is empty.
        self._view = memoryview(bytearray(_RECEIVE_BYTES))
        self._start = 0
        self._end = 0
        self._header: Header | None = None
        self._payload = memoryview(b"")
        self._filled = 0
        self._inbound: deque[Frame] = deque()
        self._inbound_bytes = 0
        self._arrived = asyncio.Event()
        self._calls: dict[int, asyncio.Future[Frame]] = {}
        self._call_ids = itertools.count(1)
        # Posts, see ``postbox``.
        self._received = Received() if received is None else received
        self._poster: int | None = None
        self._receipt_due = False
        # Outbound.
        self._sending = asyncio.Lock()
        self._writable = asyncio.Event()
        self._writable.set()

    # ── for everybody ────────────────────────────────────────────────────────────────────────────

    async def send(self, message: object, body: Sequence[Buffer] = ()) -> None:
        """Hand a message to the kernel, in order; waits while the peer does not read."""
        await self._send(Kind.MESSAGE, 0, message, body)

    async def receive(self) -> Frame:
        """The next frame that is not an answer.

        Raises:
            Disconnected: the peer is gone, and everything it sent has been received.
            FrameError: it broke the protocol; the connection is closed.
        """
        while not self._inbound:
            self.raise_if_ended()
            self._arrived.clear()
            await self._arrived.wait()
        frame = self._inbound.popleft()
        self._inbound_bytes -= len(frame.body)
        if not self._is_full():
            self._take_frames()
            if not self._is_full() and not self._transport.is_closing():
                self._transport.resume_reading()
        return frame

    async def call(
        self, message: object, body: Sequence[Buffer] = (), *, timeout_s: float
    ) -> Frame:
        """The answer to ``message``; an error that the peer answers is raised here.

        Raises:
            DeadlineExceeded: no answer within ``timeout_s``; a later one is dropped.
            CapacityError: ``CALLS_MAX`` calls wait already.
        """
        self.raise_if_ended()
        if len(self._calls) >= CALLS_MAX:
            raise CapacityError(f"{CALLS_MAX} calls to {self.peer} wait", retry_after_ms=50)
        call = next(self._call_ids)
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._calls[call] = future
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(Kind.MESSAGE, call, message, body)
                frame = await future
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{self.peer} did not answer {type(message).__name__} within {timeout_s} s"
            ) from error
        finally:
            self._calls.pop(call, None)
            future.cancel()
        if isinstance(frame.message, ErrorInfo):
            raise frame.message.to_error()
        return frame

    async def answer(self, frame: Frame, message: object, body: Sequence[Buffer] = ()) -> None:
        """Answer a frame that came by ``call``; once."""
        assert frame.call != 0, "nobody waits for an answer to this frame"
        await self._send(Kind.ANSWER, frame.call, message, body)

    async def close(self) -> None:
        """Send what is buffered, for at most ``CLOSE_TIMEOUT_S``, and close. Idempotent."""
        self._transport.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._gone.wait()
        except TimeoutError:
            self._transport.abort()
            await self._gone.wait()

    def abort(self) -> None:
        """Close at once; what is buffered is lost."""
        self._transport.abort()

    def raise_if_ended(self) -> None:
        """Raise what ended this connection, if anything did."""
        if self._ended is not None:
            raise type(self._ended)(str(self._ended))

    # ── for the postbox ──────────────────────────────────────────────────────────────────────────

    async def introduce(self, poster: int) -> None:
        """Say whose posts follow; before the first of them."""
        await self._write(pack_header(Header(Kind.POSTER, poster, 0, 0)))

    async def post(self, posts: Sequence[tuple[int, bytes]]) -> None:
        """Send encoded messages under their sequence numbers, in one write."""
        await self._write(
            b"".join(
                part
                for sequence, data in posts
                for part in (pack_header(Header(Kind.POST, sequence, len(data), 0)), data)
            )
        )

    # ── outbound ─────────────────────────────────────────────────────────────────────────────────

    async def _send(self, kind: Kind, call: int, message: object, body: Sequence[Buffer]) -> None:
        data = self._codec.encode(message)
        views = body_views(body)
        header = Header(kind, call, len(data), sum(map(len, views)))
        await self._write(pack_header(header) + data, views)

    async def _write(self, head: bytes, body: Sequence[memoryview] = ()) -> None:
        async with self._sending:
            await self._drained()
            self._transport.write(head)
            try:
                for view in body:
                    for start in range(0, len(view), _PIECE_BYTES):
                        self._transport.write(view[start : start + _PIECE_BYTES])
                        await self._drained()
            except asyncio.CancelledError:
                # Half a frame is out; nothing sensible can follow it.
                self._transport.abort()
                raise

    async def _drained(self) -> None:
        """Wait until the kernel has all bytes."""
        await self._writable.wait()
        self.raise_if_ended()
        if self._transport.is_closing():
            raise Disconnected(f"the connection to {self.peer} is closed")

    # ── inbound ──────────────────────────────────────────────────────────────────────────────────

    def _is_full(self) -> bool:
        return len(self._inbound) >= INBOUND_FRAMES_MAX or self._inbound_bytes >= INBOUND_BYTES_MAX

    def _take_frames(self) -> None:
        """Cut frames from what was read, until a bound is met or bytes are missing."""
        try:
            while not self._is_full() and self._take_header() and self._take_payload():
                assert self._header is not None
                header, self._header = self._header, None
                self._deliver(header, self._payload)
        except WireError as error:
            self._end_with(error)
            self._start = self._end = 0
            self._transport.abort()

    def _take_header(self) -> bool:
        """Whether the header of the frame under way is known, and its payload allocated."""
        if self._header is None:
            if self._end - self._start < HEADER_BYTES:
                return False
            self._header = parse_header(self._view[self._start : self._start + HEADER_BYTES])
            self._start += HEADER_BYTES
            size = self._header.message_bytes + self._header.body_bytes
            self._payload = memoryview(bytearray(size))
            self._filled = 0
        return True

    def _take_payload(self) -> bool:
        """Whether the payload is complete."""
        count = min(len(self._payload) - self._filled, self._end - self._start)
        if count:
            source = self._view[self._start : self._start + count]
            self._payload[self._filled : self._filled + count] = source
            self._start += count
            self._filled += count
        return self._filled == len(self._payload)

    def _deliver(self, header: Header, payload: memoryview) -> None:
        if header.kind in (Kind.POSTER, Kind.RECEIPT) and len(payload):
            raise FrameError(f"a {header.kind.name} carries {len(payload)} bytes, it must be bare")
        if header.kind is Kind.RECEIPT:
            if self._on_receipt is not None:
                self._on_receipt(header.call)
            return
        if header.kind is Kind.POSTER:
            self._poster = header.call
            self._give_receipt()  # tells the poster what need not be repeated
            return
        if header.kind is Kind.POST:
            if self._poster is None:
                raise FrameError("a post without a poster before it")
            if header.call <= self._received.last(self._poster):
                return
            self._received.note(self._poster, header.call)
            self._give_receipt()
        message = self._codec.decode(payload[: header.message_bytes])
        call = header.call if header.kind is not Kind.POST else 0
        frame = Frame(message, payload[header.message_bytes :], call)
        if header.kind is Kind.ANSWER:
            future = self._calls.get(header.call)
            if future is not None and not future.done():
                future.set_result(frame)
            return
        self._inbound.append(frame)
        self._inbound_bytes += len(frame.body)
        self._arrived.set()
        if self._is_full():
            self._transport.pause_reading()

    def _give_receipt(self) -> None:
        """One receipt for all posts that this turn of the event loop brings."""
        if not self._receipt_due:
            self._receipt_due = True
            asyncio.get_running_loop().call_soon(self._write_receipt)

    def _write_receipt(self) -> None:
        if self._transport.is_closing() or not self._receipt_due:
            return
        if self._sending.locked() or not self._writable.is_set():
            # Not into the middle of somebody's frame; and a receipt can wait for room.
            asyncio.get_running_loop().call_later(0.001, self._write_receipt)
            return
        assert self._poster is not None
        self._receipt_due = False
        self._transport.write(
            pack_header(Header(Kind.RECEIPT, self._received.last(self._poster), 0, 0))
        )

    def _end_with(self, error: WireError) -> None:
        if self._ended is None:
            self._ended = error
        for future in self._calls.values():
            if not future.done():
                future.set_exception(type(self._ended)(str(self._ended)))
                future.exception()  # its caller may be busy sending; asyncio must not complain
        self._arrived.set()
        self._writable.set()

    # ── called by the event loop ─────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is not one
        # "Writable" means that the kernel has everything, so buffers may be reused. For TLS, which
        # copies, asyncio takes the limit for the first size that is too much.
        tls = transport.get_extra_info("sslcontext") is not None
        transport.set_write_buffer_limits(high=1 if tls else 0)
        try:
            with _socket_of(transport) as connected:
                self.peer = set_up(connected)
        except (WireError, OSError) as error:
            self._end_with(error if isinstance(error, WireError) else Disconnected(str(error)))
            transport.abort()
            return
        if self._on_open is not None:
            self._on_open(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  (asyncio's signature)
        if self._header is not None and self._start == self._end:
            return self._payload[self._filled :]
        if self._start > 0:
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._header is not None and self._start == self._end:
            self._filled += nbytes
        else:
            self._end += nbytes
        self._take_frames()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f": {exc}" if exc is not None else ""
        self._end_with(Disconnected(f"{self.peer} is gone{reason}"))
        self._gone.set()
        if self._on_end is not None:
            self._on_end()


def _socket_of(transport: asyncio.Transport) -> socket.socket:
    """The socket itself, once more; both asyncio and uvloop wrap theirs and allow it little."""
    wrapped: socket.socket = transport.get_extra_info("socket")
    return socket.socket(fileno=os.dup(wrapped.fileno()))


async def connect(
    address: Address,
    *,
    host: HostId,
    codec: Codec = MESSAGES,
    timeout_s: float = 5.0,
    ssl_context: ssl.SSLContext | None = None,
) -> Connection:
    """A connection to ``address``: over its Unix socket from the same host, else over TCP.

    Args:
        host: of this process.
        ssl_context: for TCP; a Unix socket needs none.

    Raises:
        Disconnected: nobody answers there within ``timeout_s``.
    """
    return await dial(
        Connection(codec), address, host=host, timeout_s=timeout_s, ssl_context=ssl_context
    )


async def dial(
    connection: Connection,
    address: Address,
    *,
    host: HostId,
    timeout_s: float,
    ssl_context: ssl.SSLContext | None,
) -> Connection:
    """``connection``, connected to ``address``."""
    target = target_of(address, host)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            if isinstance(target, UnixTarget):
                await loop.create_unix_connection(lambda: connection, target.path)
            else:
                await loop.create_connection(
                    lambda: connection, target.host, target.port, ssl=ssl_context
                )
    except TimeoutError as error:
        raise Disconnected(f"{target} did not answer within {timeout_s} s") from error
    except OSError as error:
        raise refused(target, error) from error
    connection.raise_if_ended()
    return connection
