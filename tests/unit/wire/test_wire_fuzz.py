"""Whatever a peer sends: a message of a known type, or ``FrameError``; and memory in proportion."""

import asyncio
import tracemalloc
from collections.abc import Iterator
from typing import Any, cast

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pdserve.errors import FrameError, WireError
from pdserve.ids import BlockKey, TicketId
from pdserve.kvstore import protocol
from pdserve.kvstore.answers import ClaimGrant, StoreChanges, WriteGrant
from pdserve.wire.connection import Connection
from pdserve.wire.frame import (
    BODY_BYTES_MAX,
    HEADER_BYTES,
    MESSAGE_BYTES_MAX,
    Kind,
    pack_head,
    parse_header,
)

CODEC = protocol.PROTOCOL
KEYS = tuple(BlockKey(bytes([number]) * 16) for number in range(5))
MESSAGES: tuple[object, ...] = (
    protocol.Greet("w", shares_memory=True, pins=True),
    protocol.ClaimPrefix(KEYS),
    protocol.Reserve(KEYS, 2),
    protocol.Fill(7, 0, (1, 2**64 - 1), verify=True),
    protocol.Commit(7, None),
    protocol.AdoptTicket(TicketId("t-1")),
    ClaimGrant(3, (), (), has_tail=True),
    WriteGrant(3, 1, (), 0),
    StoreChanges(9, KEYS, (), complete=True),
)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary()
VALUES = st.recursive(
    PLAIN | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=10,
)
BYTES_PER_BYTE = 96
SPARE_BYTES = 1 << 16  # of the interpreter's own, whatever the message


def decode(data: bytes) -> object | None:
    """None for a refusal; anything but ``FrameError`` fails the test."""
    try:
        return CODEC.decode(data)
    except FrameError:
        return None


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_any_header_is_refused_or_within_its_limits(data: bytes) -> None:
    try:
        header = parse_header(data)
    except FrameError:
        return
    assert header.message_bytes <= MESSAGE_BYTES_MAX
    assert header.body_bytes <= BODY_BYTES_MAX


@given(st.binary(max_size=200))
@example(b"\xdd\xff\xff\xff\xff")  # an array of four thousand million, of which nothing is there
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\x91" * 2000)
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    decode(data)


@given(st.sampled_from(MESSAGES), st.lists(VALUES, max_size=6))
def test_any_values_under_a_known_name_are_its_fields_or_refused(
    message: object, values: list[Any]
) -> None:
    name = type(message).__name__
    decoded = decode(msgpack.packb([name, *values]))
    assert decoded is None or type(decoded) is type(message)


@given(st.sampled_from(MESSAGES), st.data())
def test_a_damaged_message_is_a_message_or_refused(message: object, data: st.DataObject) -> None:
    encoded = bytearray(CODEC.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(encoded) - 1))
        encoded[at] ^= data.draw(st.integers(1, 255))
    decode(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]))


@pytest.mark.parametrize("piece", [b"\x80", b"\x81\xa0\xc0", b"\x91\xc0", b"\xa0"])
def test_a_message_takes_memory_in_proportion_to_its_length(piece: bytes) -> None:
    count = 20_000 // len(piece)
    data = msgpack.packb(["ClaimPrefix"])[1:] + b"\xdc" + count.to_bytes(2, "big") + piece * count
    data = b"\x92" + data
    tracemalloc.start()
    try:
        decode(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes <= BYTES_PER_BYTE * len(data) + SPARE_BYTES


class Transport:
    """As much of one as a connection asks for while it reads."""

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        pass

    def write(self, data: bytes) -> None:
        pass


def stream_of(messages: list[object], body: bytes) -> bytes:
    frames = b""
    for call, message in enumerate(messages, start=1):
        frames += pack_head(Kind.MESSAGE, call, CODEC.encode(message), len(body)) + body
    return frames


def pieces(stream: bytes, sizes: list[int]) -> Iterator[bytes]:
    start = 0
    for size in sizes:
        yield stream[start : start + size]
        start += size
    yield stream[start:]


async def received(parts: Iterator[bytes]) -> list[object]:
    """What a connection makes of a stream, up to its end or its first mistake."""
    connection = Connection(CODEC)
    connection._transport = cast(Any, Transport())
    for part in parts:
        rest = memoryview(part)
        while rest and connection._ended is None:
            buffer = connection.get_buffer(len(rest))
            count = min(len(buffer), len(rest))
            buffer[:count] = rest[:count]
            connection.buffer_updated(count)
            rest = rest[count:]
    connection.connection_lost(None)
    messages = []
    try:
        while True:
            messages.append((await connection.receive()).message)
    except WireError:
        return messages


@given(
    st.lists(st.sampled_from(MESSAGES), min_size=1, max_size=5),
    st.binary(max_size=50),
    st.lists(st.integers(0, 80), max_size=8),
)
def test_a_stream_is_cut_into_its_frames_wherever_it_is_cut(
    messages: list[object], body: bytes, sizes: list[int]
) -> None:
    assert asyncio.run(received(pieces(stream_of(messages, body), sizes))) == messages


def test_a_bit_changed_in_a_message_is_found() -> None:
    """A message with another bit is often a message: for another block, of another claim."""
    message = protocol.ReadBlocks(7, (3,))
    stream = bytearray(stream_of([message], b""))
    for bit in range(8 * len(stream)):
        stream[bit // 8] ^= 1 << bit % 8
        assert asyncio.run(received(pieces(bytes(stream), []))) == [], f"bit {bit}"
        stream[bit // 8] ^= 1 << bit % 8


@given(
    st.lists(st.sampled_from(MESSAGES), min_size=1, max_size=4),
    st.binary(max_size=20),
    st.data(),
)
def test_a_damaged_stream_gives_what_was_sent_and_nothing_else(
    messages: list[object], body: bytes, data: st.DataObject
) -> None:
    """What a message says is what its sender said; its body has a checksum of its own."""
    stream = bytearray(stream_of(messages, body))
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    end = data.draw(st.integers(0, len(stream)))
    arrived = asyncio.run(received(pieces(bytes(stream[:end]), [])))
    assert arrived == messages[: len(arrived)]
