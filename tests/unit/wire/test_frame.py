"""Headers: lengths are believed only after magic, version, checksum and limits."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import FrameError
from pdserve.wire.frame import (
    BODY_BYTES_MAX,
    HEADER_BYTES,
    MESSAGE_BYTES_MAX,
    VERSION,
    Header,
    Kind,
    body_views,
    pack_header,
    parse_header,
)

HEADERS = st.builds(
    Header,
    st.sampled_from(Kind),
    st.integers(0, 2**64 - 1),
    st.integers(0, MESSAGE_BYTES_MAX),
    st.integers(0, BODY_BYTES_MAX),
    st.integers(0, 2**32 - 1),
)


def forged(
    magic: bytes = b"pdsv", version: int = VERSION, kind: int = 1, message: int = 0, body: int = 0
) -> bytes:
    data = struct.pack("<4sBBHQIQI", magic, version, kind, 0, 0, message, body, 0)
    return data + struct.pack("<I", zlib.crc32(data))


@given(HEADERS)
def test_a_header_comes_back_as_it_was(header: Header) -> None:
    data = pack_header(header)
    assert len(data) == HEADER_BYTES
    assert parse_header(data) == header


@given(HEADERS, st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_is_found(header: Header, bit: int) -> None:
    data = bytearray(pack_header(header))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        parse_header(data)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (forged(magic=b"HTTP"), "not a pdserve peer"),
        (forged(version=1), f"speaks version 1, this process {VERSION}"),
        (forged(kind=0), "unknown kind 0"),
        (forged(kind=6), "unknown kind 6"),
        (forged(message=MESSAGE_BYTES_MAX + 1), f"the limit is {MESSAGE_BYTES_MAX}"),
        (forged(body=BODY_BYTES_MAX + 1), f"the limit is {BODY_BYTES_MAX}"),
        (bytes(HEADER_BYTES), "not a pdserve peer"),
    ],
)
def test_a_header_that_is_none_of_ours_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(FrameError, match=problem):
        parse_header(data)


def test_lengths_at_their_limits_pass_and_one_more_is_not_sent() -> None:
    assert parse_header(forged(message=MESSAGE_BYTES_MAX, body=BODY_BYTES_MAX))
    with pytest.raises(FrameError, match="limit"):
        pack_header(Header(Kind.MESSAGE, 0, 0, BODY_BYTES_MAX + 1))


def test_a_body_of_several_parts_is_flat_bytes_without_empty_parts() -> None:
    matrix = memoryview(bytearray(range(12))).cast("B", (3, 4))
    assert [bytes(view) for view in body_views([b"", matrix, b"x"])] == [bytes(range(12)), b"x"]
