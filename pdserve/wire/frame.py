"""One frame: a fixed header, a message, and a body of raw bytes.

    magic 4 | version 1 | kind 1 | zero 2 | call 8 | message length 4 | body length 8
            | CRC-32 of the message 4 | CRC-32 of all before 4
    message: msgpack, as ``codec`` writes it
    body:    bytes that are not looked at; KV blocks, for instance

The header is little-endian and carries a checksum of itself, so that a peer that lost its place in
the stream is found at the next frame, before its lengths are believed. Both lengths are checked
against their limits before a byte is allocated for them. A message has a checksum too: with one bit
changed it may well ask for another block. The body relies on the transport: who sends KV blocks
takes a checksum of their own along.

``call`` ties an answer to its question. 0 is a message that expects none.
"""

import socket
import struct
import zlib
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from pdserve.errors import FrameError
from pdserve.values import value

Buffer = bytes | bytearray | memoryview

MESSAGE_BYTES_MAX = 8 << 20
"""A request with a context of a million tokens takes about 5 MB."""

BODY_BYTES_MAX = 256 << 20
"""128 blocks of 2 MiB: more than one chunk of the largest models we serve."""

MAGIC = b"pdsv"
VERSION = 3

_VECTOR_MAX = 512  # buffers in one sendmsg; the system's limit is 1024

_HEADER = struct.Struct("<4sBBHQIQI")
_CHECKSUM = struct.Struct("<I")
_HEADER_AND_CHECKSUM = struct.Struct("<4sBBHQIQII")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size


class Kind(IntEnum):
    MESSAGE = 1  # call is 0, or the number under which an answer is expected
    ANSWER = 2  # to the call of that number
    POST = 3  # a message that is kept until its receipt comes; call is its sequence number
    POSTER = 4  # whose posts follow on this connection; no message, no body
    RECEIPT = 5  # all posts up to this sequence number have arrived; no message, no body


_KINDS = {kind.value: kind for kind in Kind}


@value
class Header:
    kind: Kind
    call: int
    message_bytes: int
    body_bytes: int
    message_checksum: int = 0  # of no bytes


@value
class Frame:
    """What arrived."""

    message: Any  # of one of the types that the connection's codec knows
    body: memoryview
    call: int  # to be answered under this number; 0 expects no answer
    placed: bool = False  # the body is where the receiver's attendant wanted it, not in ``body``


def pack_head(kind: Kind, call: int, message: bytes, body_bytes: int = 0) -> bytes:
    """A frame up to its body. Raises FrameError when a length is over its limit."""
    return _packed(kind, call, len(message), body_bytes, zlib.crc32(message)) + message


def pack_header(header: Header) -> bytes:
    """The header's bytes. Raises FrameError when a length is over its limit."""
    return _packed(
        header.kind, header.call, header.message_bytes, header.body_bytes, header.message_checksum
    )


def _packed(kind: Kind, call: int, message_bytes: int, body_bytes: int, of_message: int) -> bytes:
    _check_lengths(message_bytes, body_bytes)
    data = _HEADER.pack(MAGIC, VERSION, kind, 0, call, message_bytes, body_bytes, of_message)
    return data + _CHECKSUM.pack(zlib.crc32(data))


def parse_header(data: Buffer) -> Header:
    """The header in ``HEADER_BYTES`` bytes. Raises FrameError when it is none of ours."""
    assert len(data) == HEADER_BYTES
    magic, version, number, zero, call, message_bytes, body_bytes, of_message, checksum = (
        _HEADER_AND_CHECKSUM.unpack(data)
    )
    if magic != MAGIC:
        raise FrameError(f"a frame begins with {magic!r}, not {MAGIC!r}: not a pdserve peer")
    if version != VERSION:
        raise FrameError(
            f"the peer speaks version {version}, this process {VERSION}; run one release everywhere"
        )
    if checksum != zlib.crc32(memoryview(data)[: _HEADER.size]):
        raise FrameError("a frame's header fails its checksum")
    kind = _KINDS.get(number)
    if zero != 0 or kind is None:
        raise FrameError(f"a frame of the unknown kind {number}, {zero}")
    _check_lengths(message_bytes, body_bytes)
    return Header(kind, call, message_bytes, body_bytes, of_message)


def check_message(header: Header, message: Buffer) -> None:
    """Raises FrameError when the bytes are not those that the header was made for."""
    if zlib.crc32(message) != header.message_checksum:
        raise FrameError("a message fails its checksum")


def body_views(body: Sequence[Buffer]) -> list[memoryview]:
    """The parts of a body as flat bytes, empty ones left out."""
    return [view for view in (memoryview(part).cast("B") for part in body) if len(view)]


def sent_off(views: list[memoryview], connected: socket.socket) -> list[memoryview]:
    """Send once, from several buffers; those that are not sent yet, the first of them cut."""
    sent = connected.sendmsg(views[:_VECTOR_MAX])
    for index, view in enumerate(views):
        if sent < len(view):
            return [view[sent:], *views[index + 1 :]]
        sent -= len(view)
    return []


def _check_lengths(message_bytes: int, body_bytes: int) -> None:
    if message_bytes > MESSAGE_BYTES_MAX:
        raise FrameError(f"a message of {message_bytes} bytes, the limit is {MESSAGE_BYTES_MAX}")
    if body_bytes > BODY_BYTES_MAX:
        raise FrameError(
            f"a body of {body_bytes} bytes, the limit is {BODY_BYTES_MAX}; send it in parts"
        )
