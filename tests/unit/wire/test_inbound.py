"""From bytes to frames, and bodies to where somebody wants them."""

from collections.abc import Sequence
from typing import Any

import pytest

from pdserve.ids import RequestId
from pdserve.messages import Cancel
from pdserve.wire.codec import MESSAGES
from pdserve.wire.frame import Kind, pack_head
from pdserve.wire.inbound import Arrived, Inbound

MESSAGE = Cancel(RequestId("r"))


def frame(body: bytes, kind: Kind = Kind.MESSAGE) -> bytes:
    data = MESSAGES.encode(MESSAGE)
    return pack_head(kind, 7, data, len(body)) + body


def feed(inbound: Inbound, data: bytes, piece: int) -> list[Arrived]:
    arrived = []
    rest = memoryview(data)
    while rest:
        room = inbound.buffer()
        count = min(len(room), len(rest), piece)
        room[:count] = rest[:count]
        inbound.filled(count)
        rest = rest[count:]
        while (one := inbound.take()) is not None:
            arrived.append(one)
    return arrived


@pytest.mark.parametrize("piece", [1, 7, 1000, 1 << 20])
def test_a_body_lands_in_its_places_whatever_the_pieces(piece: int) -> None:
    places = [memoryview(bytearray(100)), memoryview(bytearray(1900))]
    asked: list[tuple[Any, int]] = []

    def place(message: Any, body_bytes: int) -> Sequence[memoryview] | None:
        asked.append((message, body_bytes))
        return places if body_bytes == 2000 else None

    inbound = Inbound(MESSAGES)
    inbound.place = place
    body = bytes(range(250)) * 8
    data = frame(body) + frame(b"short") + frame(b"", Kind.MESSAGE) + frame(body, Kind.ANSWER)
    first, second, third, fourth = feed(inbound, data, piece)
    assert first.placed
    assert len(first.body) == 0
    assert b"".join(places) == body
    assert (bytes(second.body), second.placed) == (b"short", False)
    assert (bytes(third.body), third.placed) == (b"", False)
    assert (bytes(fourth.body), fourth.placed) == (body, False), "answers are never placed"
    assert asked == [(MESSAGE, 2000), (MESSAGE, 5)]


def test_after_displace_not_a_byte_more_is_written_to_a_place() -> None:
    place = memoryview(bytearray(2000))
    inbound = Inbound(MESSAGES)
    inbound.place = lambda message, size: [place[:500], place[500:]]
    data = frame(b"x" * 2000)
    assert feed(inbound, data[:-1800], 64) == []
    assert bytes(place[:200]) == b"x" * 200
    inbound.displace()
    (arrived,) = feed(inbound, data[-1800:], 64)
    assert bytes(place[200:]) == bytes(1800)
    assert arrived.placed
    (following,) = feed(inbound, frame(b"y" * 2000), 64)
    assert bytes(following.body) == b"y" * 2000
