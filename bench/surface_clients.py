"""Clients that cost little: they share two cores with what they measure.

An HTTP client here speaks just enough to ask for a stream: it counts the events in what arrives and
notes when they came, and parses nothing. A gRPC client has its library's cost, which is why rates
over gRPC are stated as processor time of the gateway. The *bare* client has no gateway at all: it
submits to the router and listens for tokens itself, as a gateway does.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import grpc

from bench.surface_fleet import BLOCK_TOKENS, Pace
from bench.surface_places import HOST
from pdserve.ids import BlockKey, RequestId
from pdserve.messages import (
    Address,
    Cancel,
    GatewayHello,
    Request,
    Sampling,
    ServiceClass,
    Stop,
    Submit,
    TokenBatch,
)
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import InferenceStub
from pdserve.wire.connection import Connection, connect
from pdserve.wire.listener import Listener

ANSWER_S = 60.0
"""For a first token, and for an answer's end. Nothing here takes that long."""

PROMPT = " ".join(f"word{index} and so on," for index in range(40))
PROMPT_TOKENS = 256
"""About what ``PROMPT`` is under the default model's chat template; of a bare request, exactly."""

_EVENT = b"data: {"
_DONE = b"data: [DONE]"
_TAIL_BYTES = len(_DONE) - 1


@dataclass(slots=True)
class Stream:
    """One answer as it comes. Times are ``time.monotonic``."""

    sent_s: float
    token_s: list[float] = field(default_factory=list)  # when each token came
    first: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: str = ""

    def came(self, count: int) -> None:
        self.token_s.extend([time.monotonic()] * count)
        if self.token_s:
            self.first.set()

    def end(self, error: str = "") -> None:
        self.error = self.error or error
        self.first.set()
        self.ended.set()

    async def until_first(self) -> float:
        """Seconds to the first token."""
        async with asyncio.timeout(ANSWER_S):
            await self.first.wait()
        self._check()
        return self.token_s[0] - self.sent_s

    async def until_ended(self) -> None:
        async with asyncio.timeout(ANSWER_S):
            await self.ended.wait()
        self._check()

    def _check(self) -> None:
        if self.error or not self.token_s:
            raise RuntimeError(f"an answer failed: {self.error or 'it ended without a token'}")


class EventCounter:
    """Counts events in a stream of bytes that is cut anywhere. Pure."""

    def __init__(self) -> None:
        self._tail = b""
        self.is_done = False

    def push(self, data: bytes) -> int:
        """How many more events have begun."""
        text = self._tail + data
        self._tail = text[-_TAIL_BYTES:]
        self.is_done = self.is_done or _DONE in text
        # What the tail held whole was counted before.
        return text.count(_EVENT) - text.count(_EVENT, 0, len(text) - len(data))


class _HttpStream(asyncio.Protocol):
    def __init__(self, stream: Stream, request: bytes) -> None:
        self._stream = stream
        self._request = request
        self._events = EventCounter()
        self._is_accepted = False
        self._said_role = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stream.sent_s = time.monotonic()
        cast(asyncio.Transport, transport).write(self._request)  # uvloop's is not one

    def data_received(self, data: bytes) -> None:
        if not self._is_accepted:
            self._is_accepted = data.startswith(b"HTTP/1.1 200")
            if not self._is_accepted:
                self._stream.end(data[:300].decode(errors="replace"))
                return
        count = self._events.push(data)
        if not self._said_role and count:
            self._said_role = True
            count -= 1  # a chat's first event says who speaks, and nothing else
        self._stream.came(count)
        if self._events.is_done:
            self._stream.end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stream.end("" if self._events.is_done else f"the connection ended: {exc}")


def chat_request(port: int, pace: Pace, max_tokens: int) -> bytes:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": max_tokens,
            "seed": pace.as_seed(),
            "stream": True,
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class HttpClient:
    """Streams over HTTP, each on a connection of its own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transports: list[asyncio.BaseTransport] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for transport in self._transports:
            transport.close()
        self._transports.clear()

    async def ask(self, pace: Pace, max_tokens: int) -> Stream:
        """The clock begins when the connection is open."""
        stream = Stream(time.monotonic())
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: _HttpStream(stream, chat_request(self._port, pace, max_tokens)),
            "127.0.0.1",
            self._port,
        )
        self._transports.append(transport)
        return stream


class GrpcClient:
    """Streams over gRPC, all on one channel."""

    def __init__(self, port: int) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._stub: Any = InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._channel.channel_ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    async def ask(self, pace: Pace, max_tokens: int) -> Stream:
        request = pb.ChatRequest(
            messages=[pb.ChatMessage(role="user", content=PROMPT)],
            parameters=pb.Parameters(max_tokens=max_tokens, seed=pace.as_seed()),
        )
        stream = Stream(time.monotonic())
        self._tasks.append(asyncio.create_task(self._read(stream, self._stub.Chat(request))))
        return stream

    async def _read(self, stream: Stream, chunks: Any) -> None:
        error = ""
        try:
            async for chunk in chunks:
                stream.came(len(chunk.token_ids))
        except grpc.RpcError as failure:
            error = str(failure)
        finally:
            stream.end(error)


class BareClient:
    """No gateway: what a request takes between router and workers."""

    def __init__(self, router: Address, directory: Path) -> None:
        self._router = router
        self._directory = directory
        self._streams: dict[RequestId, Stream] = {}
        self._begun = 0

    async def __aenter__(self) -> Self:
        self._name = f"bare-{time.monotonic_ns()}"
        self._listener = await Listener.open(
            self._directory, self._name, host=HOST, serve=self._listen
        )
        self._connection = await connect(self._router, host=HOST)
        await self._connection.send(GatewayHello(self._listener.address))
        return self

    async def __aexit__(self, *_: object) -> None:
        for request, stream in self._streams.items():
            if not stream.ended.is_set():
                await self._connection.send(Cancel(request))
        await self._connection.close()
        await self._listener.close()

    async def ask(self, pace: Pace, max_tokens: int) -> Stream:
        """Its tokens and keys are made before the clock begins: a gateway's work."""
        self._begun += 1
        request = bare_request(
            f"{self._name}-{self._begun}", pace, max_tokens, self._listener.address
        )
        stream = self._streams[request.request] = Stream(time.monotonic())
        await self._connection.send(Submit(request))
        return stream

    def forget(self) -> None:
        """The answers that have ended."""
        self._streams = {r: s for r, s in self._streams.items() if not s.ended.is_set()}

    async def _listen(self, connection: Connection) -> None:
        while True:
            match (await connection.receive()).message:
                case TokenBatch(_, deltas):
                    for delta in deltas:
                        stream = self._streams[delta.request]
                        stream.came(len(delta.tokens))
                        if delta.finish is not None:
                            stream.end()


def bare_request(
    name: str, pace: Pace, max_tokens: int, reply_to: Address, tokens: int = PROMPT_TOKENS
) -> Request:
    """One whose prompt nobody has cached."""
    keys = tuple(
        BlockKey(f"{name:>24}{block:08}".encode()[-32:]) for block in range(tokens // BLOCK_TOKENS)
    )
    return Request(
        request=RequestId(name),
        attempt=0,
        choice=0,
        model="mock",
        tokens=tuple(range(100, 100 + tokens)),
        prompt_tokens=tokens,
        block_keys=keys,
        tenant="",
        service_class=ServiceClass.STANDARD,
        sampling=Sampling(),
        stop=Stop(max_tokens=max_tokens),
        seed=pace.as_seed(),
        deadline_unix_ms=time.time_ns() // 1_000_000 + 600_000,
        reply_to=reply_to,
    )
