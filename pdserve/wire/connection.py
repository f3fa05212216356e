"""One peer, from asyncio: messages, calls with answers, and back-pressure both ways.

``inbound`` makes frames of what arrives. At most ``INBOUND_FRAMES_MAX`` frames or
``INBOUND_BYTES_MAX`` bytes wait to be received; then the socket is not read until somebody
receives. Answers queue behind messages: who never receives must not expect answers either, beyond
that bound.

Outbound, ``send`` returns when the kernel has the body (which may then be reused), and waits for
earlier bytes to go before it hands over its own: at most one message is buffered here. A body goes
from where it lies to the kernel without a copy, except through TLS.

Who serves many small frames may ``attend`` to them instead: called in the turn of the event loop in
which one arrives, it saves waking a task, and it may say where a body is to be received.

When the peer dies or breaks the protocol, every waiting call and ``receive`` end with a
``WireError``; what had arrived before is still received first.
"""

import asyncio
import itertools
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

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
from pdserve.wire.direct import DirectSender, duplicate_of, send_files
from pdserve.wire.endpoint import dial, set_up
from pdserve.wire.frame import (
    Buffer,
    Frame,
    Header,
    Kind,
    body_views,
    check_message,
    pack_head,
    pack_header,
)
from pdserve.wire.inbound import Arrived, Attendant, Inbound, Received

__all__ = ["Connection", "Frame", "connect"]

INBOUND_FRAMES_MAX = 4096
INBOUND_BYTES_MAX = 64 << 20
CALLS_MAX = 4096
"""Calls that may wait for their answers on one connection."""

CLOSE_TIMEOUT_S = 1.0
HANDSHAKE_TIMEOUT_S = 10.0
_PIECE_BYTES = 256 << 10  # a body goes to the transport in such pieces: what it buffers it copies


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
        self._frames = Inbound(codec)
        self._attendant: Attendant | None = None
        self._is_awaited = False  # somebody waits in ``receive``
        self._inbound: deque[Frame] = deque()
        self._inbound_bytes = 0
        self._arrived = asyncio.Event()
        self._calls: dict[int, asyncio.Future[Frame]] = {}
        self._call_ids = itertools.count(1)
        self._received = Received() if received is None else received
        self._poster: int | None = None
        self._receipt_due = False
        self._sending = asyncio.Lock()
        self._writable = asyncio.Event()
        self._writable.set()
        self._direct: DirectSender | None = None  # for bodies; made for the first of them
        self._is_tls = False
        self._rest: list[memoryview] = []  # of an answer that ``answer_now`` began
        self._on_sent: Callable[[], None] | None = None

    # ── for everybody ────────────────────────────────────────────────────────────────────────────

    async def send(self, message: object, body: Sequence[Buffer] = ()) -> None:
        """Hand a message to the kernel, in order; waits while the peer does not read."""
        await self._send(Kind.MESSAGE, 0, message, body)

    async def send_encoded(self, data: bytes) -> None:
        """``send``, of a message that its codec has made bytes of."""
        await self._write(pack_head(Kind.MESSAGE, 0, data))

    def send_now(self, message: object) -> bool:
        """``send`` in this turn of the event loop; False, unsent, where others are under way."""
        is_free = self._writable.is_set() and not (self._sending.locked() or self._rest)
        if is_free := is_free and not self._transport.is_closing():
            self._transport.write(pack_head(Kind.MESSAGE, 0, self._codec.encode(message), 0))
        return is_free

    async def receive(self) -> Frame:
        """The next frame that is not an answer.

        Raises:
            Disconnected: the peer is gone, and everything it sent has been received.
            FrameError: it broke the protocol; the connection is closed.
        """
        while not self._inbound:
            self.raise_if_ended()
            if self._rest:
                await self._write(b"")
                continue
            self._arrived.clear()
            self._is_awaited = True
            try:
                await self._arrived.wait()
            finally:
                self._is_awaited = False
        if self._rest:
            await self._write(b"")
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

    def limit_bodies(self, body_bytes_max: int) -> None:
        """From the next frame on; a larger body ends the connection before it is allocated."""
        self._frames.body_bytes_max = body_bytes_max

    def attend(self, attendant: Attendant) -> None:
        """From now on ``attendant`` serves what it can; ``receive`` gives the rest."""
        self._attendant = attendant
        self._frames.place = self._place

    def dismiss(self) -> None:
        """End ``attend``: from now on nothing is written to where a body was placed, and nothing
        is sent from where an answer's body lies. An answer that is half out ends the connection."""
        self._attendant = None
        if self._rest or self._sending.locked():
            self._rest, self._on_sent = [], None
            self._transport.abort()
        self._frames.displace()

    def answer_now(
        self,
        frame: Frame,
        message: object,
        body: Sequence[Buffer] = (),
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        """``answer`` for an attendant: what the kernel does not take at once ``receive`` sends,
        before it gives another frame. ``on_sent`` is called when ``body`` may change; not at all if
        the connection ends before."""
        assert not self._rest, "an answer is under way"
        assert frame.call != 0, "nobody waits for an answer to this frame"
        data = self._codec.encode(message)
        views = body_views(body)
        head = pack_head(Kind.ANSWER, frame.call, data, sum(map(len, views)))
        if self._transport.is_closing():
            return
        free = self._writable.is_set() and not self._sending.locked()
        if free and not views:
            self._transport.write(head)
        else:
            rest = [memoryview(head), *views]
            if free and not self._is_tls:
                rest = self._send_some(rest)
            if rest:
                self._rest, self._on_sent = rest, on_sent
                self._arrived.set()
                return
        if on_sent is not None:
            on_sent()

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

    async def answer_with_files(
        self, frame: Frame, message: object, descriptors: Sequence[int]
    ) -> None:
        """``answer``, and the peer gets descriptors of these open files; over a Unix socket.

        The message must be small: nothing else may be on its way to the peer.
        """
        assert frame.call != 0, "nobody waits for an answer to this frame"
        data = self._codec.encode(message)
        packed = pack_head(Kind.ANSWER, frame.call, data)
        async with self._sending:
            await self._drained()
            try:
                sent = send_files(self._transport, packed, descriptors)
            except OSError as error:
                self._transport.abort()
                raise Disconnected(f"{self.peer} takes no files: {error.strerror}") from error
            if sent < len(packed):
                self._transport.write(packed[sent:])

    # ── for the postbox ──────────────────────────────────────────────────────────────────────────

    async def introduce(self, poster: int) -> None:
        """Say whose posts follow; before the first of them."""
        await self._write(pack_header(Header(Kind.POSTER, poster, 0, 0)))

    async def post(self, posts: Sequence[tuple[int, bytes]]) -> None:
        """Send encoded messages under their sequence numbers, in one write."""
        await self._write(b"".join(pack_head(Kind.POST, *post) for post in posts))

    # ── outbound ─────────────────────────────────────────────────────────────────────────────────

    async def _send(self, kind: Kind, call: int, message: object, body: Sequence[Buffer]) -> None:
        data = self._codec.encode(message)
        views = body_views(body)
        await self._write(pack_head(kind, call, data, sum(map(len, views))), views)

    async def _write(self, head: bytes, body: Sequence[memoryview] = ()) -> None:
        async with self._sending:
            await self._drained()
            try:
                if self._rest:
                    rest, self._rest = self._rest, []
                    await self._write_body(rest)
                    on_sent, self._on_sent = self._on_sent, None
                    if on_sent is not None:
                        on_sent()
                if body:
                    await self._write_body([memoryview(head), *body])
                elif head:
                    self._transport.write(head)
            except asyncio.CancelledError:
                # Half a frame is out; nothing sensible can follow it.
                self._transport.abort()
                raise

    async def _write_body(self, views: list[memoryview]) -> None:
        if self._is_tls:
            for view in views:
                for start in range(0, len(view), _PIECE_BYTES):
                    self._transport.write(view[start : start + _PIECE_BYTES])
                    await self._drained()
            return
        while views := self._send_some(views):
            assert self._direct is not None
            await self._direct.wait()
            await self._drained()

    def _send_some(self, views: list[memoryview]) -> list[memoryview]:
        """Those that the kernel does not take at once; without a copy, past the transport, which
        has nothing to send at this moment."""
        if self._direct is None:
            self._direct = DirectSender(self._transport)
        try:
            return self._direct.send_some(views)
        except OSError as error:
            self._end_with(Disconnected(f"{self.peer} is gone: {error.strerror or error}"))
            self._transport.abort()
            return []

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
            while not self._is_full() and (arrived := self._frames.take()) is not None:
                if arrived.header.kind in (Kind.MESSAGE, Kind.ANSWER, Kind.POST):
                    self._deliver(arrived)
                else:
                    self._note(arrived)
        except WireError as error:
            self._end_with(error)
            self._frames.forget()
            self._transport.abort()

    def _place(self, message: Any, body_bytes: int) -> Sequence[memoryview] | None:
        if self._attendant is None or not self._is_attended():
            return None
        return self._attendant.place(message, body_bytes)

    def _is_attended(self) -> bool:
        """Whether the attendant is next in line."""
        return self._is_awaited and not self._inbound and not self._rest

    def _note(self, arrived: Arrived) -> None:
        """What carries no message."""
        header = arrived.header
        if header.message_bytes or header.body_bytes:
            size = header.message_bytes + header.body_bytes
            raise FrameError(f"a {header.kind.name} carries {size} bytes, it must be bare")
        if header.kind is Kind.RECEIPT:
            if self._on_receipt is not None:
                self._on_receipt(header.call)
            return
        self._poster = header.call
        self._give_receipt()  # tells the poster what need not be repeated

    def _deliver(self, arrived: Arrived) -> None:
        header = arrived.header
        call = header.call
        if header.kind is Kind.POST:
            if self._poster is None:
                raise FrameError("a post without a poster before it")
            if call <= self._received.last(self._poster):
                return
            self._received.note(self._poster, call)
            self._give_receipt()
            call = 0
        message = arrived.message
        if message is None:
            check_message(arrived.header, arrived.data)
            message = self._codec.decode(arrived.data)
        frame = Frame(message, arrived.body, call, arrived.placed)
        if header.kind is Kind.ANSWER:
            future = self._calls.get(call)
            if future is not None and not future.done():
                future.set_result(frame)
            return
        attendant = self._attendant
        if attendant is not None and self._is_attended() and attendant.take(frame):
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
        if self._direct is not None:
            self._direct.wake()

    # ── called by the event loop ─────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is not one
        # "Writable" means that the kernel has everything, so buffers may be reused. For TLS, which
        # copies, asyncio takes the limit for the first size that is too much.
        self._is_tls = transport.get_extra_info("sslcontext") is not None
        transport.set_write_buffer_limits(high=1 if self._is_tls else 0)
        try:
            with duplicate_of(transport) as connected:
                self.peer = set_up(connected)
        except (WireError, OSError) as error:
            self._end_with(error if isinstance(error, WireError) else Disconnected(str(error)))
            transport.abort()
            return
        if self._on_open is not None:
            self._on_open(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  (asyncio's signature)
        return self._frames.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._frames.filled(nbytes)
        self._take_frames()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f": {exc}" if exc is not None else ""
        self._end_with(Disconnected(f"{self.peer} is gone{reason}"))
        if self._direct is not None:
            self._direct.close()
            self._direct = None
        self._gone.set()
        if self._on_end is not None:
            self._on_end()


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
    connection = Connection(codec)
    await dial(lambda: connection, address, host=host, timeout_s=timeout_s, ssl_context=ssl_context)
    connection.raise_if_ended()
    return connection
