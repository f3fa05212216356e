"""Messages that are heard as they arrive: all, once, in order, up to the last one wanted."""

import asyncio
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import Disconnected
from pdserve.ids import RequestId
from pdserve.messages import Cancel
from pdserve.wire.codec import MESSAGES
from pdserve.wire.connection import Connection
from pdserve.wire.frame import Kind, pack_head
from pdserve.wire.hearing import hear_all
from tests.unit.wire.test_wire_fuzz import Transport


def numbered(index: int) -> Cancel:
    return Cancel(RequestId(f"r-{index}"))


def framed(indices: range) -> bytes:
    return b"".join(pack_head(Kind.MESSAGE, 0, MESSAGES.encode(numbered(i))) for i in indices)


def connection() -> Connection:
    made = Connection(MESSAGES)
    made._transport = cast(Any, Transport())
    return made


def feed(to: Connection, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        buffer = to.get_buffer(len(rest))
        count = min(len(buffer), len(rest))
        buffer[:count] = rest[:count]
        to.buffer_updated(count)
        rest = rest[count:]


async def settled() -> None:
    """A few turns of the event loop: whoever can go on has done so."""
    for _ in range(5):
        await asyncio.sleep(0)


@given(count=st.integers(1, 12), early=st.integers(0, 12), cuts=st.lists(st.integers(0, 400)))
def test_all_are_heard_once_and_in_order_wherever_the_stream_is_cut(
    count: int, early: int, cuts: list[int]
) -> None:
    """Those of the first ``early`` bytes in eighths arrive before anybody listens."""

    async def scenario() -> list[object]:
        peer, heard = connection(), list[object]()
        data = framed(range(count))
        begin = len(data) * min(early, 8) // 8
        feed(peer, data[:begin])
        hearing = asyncio.create_task(hear_all(peer, heard.append))
        for start, end in zip(
            [begin, *sorted(begin + cut for cut in cuts)],
            [*sorted(begin + cut for cut in cuts), len(data)],
            strict=True,
        ):
            feed(peer, data[start:end])
            if (start + end) % 3 == 0:  # sometimes the task has a turn in between, sometimes not
                await settled()
        peer.connection_lost(None)
        with pytest.raises(Disconnected):
            await hearing
        return heard

    assert asyncio.run(scenario()) == [numbered(index) for index in range(count)]


def test_a_message_is_heard_in_the_turn_in_which_it_arrives() -> None:
    async def scenario() -> None:
        peer, heard = connection(), list[object]()
        hearing = asyncio.create_task(hear_all(peer, heard.append))
        await settled()
        feed(peer, framed(range(3)))
        assert heard == [numbered(0), numbered(1), numbered(2)]
        hearing.cancel()

    asyncio.run(scenario())


@pytest.mark.parametrize("at_once", [True, False])
def test_after_the_last_one_wanted_nothing_is_heard(at_once: bool) -> None:
    async def scenario() -> None:
        peer, heard = connection(), list[object]()

        def hear(message: object) -> bool:
            heard.append(message)
            return message != numbered(1)

        if at_once:
            feed(peer, framed(range(4)))
        hearing = asyncio.create_task(hear_all(peer, hear))
        await settled()
        if not at_once:
            feed(peer, framed(range(4)))
        await hearing
        assert [(await peer.receive()).message for _ in range(2)] == [numbered(2), numbered(3)]
        receiving = asyncio.create_task(peer.receive())
        await settled()
        feed(peer, framed(range(4, 5)))
        await settled()
        assert receiving.done(), "others may receive what follows"
        assert receiving.result().message == numbered(4)
        assert heard == [numbered(0), numbered(1)]

    asyncio.run(scenario())


def test_what_hear_raises_is_raised_to_who_listens() -> None:
    async def scenario() -> None:
        peer, heard = connection(), list[object]()

        def hear(message: object) -> None:
            heard.append(message)
            raise ZeroDivisionError("a bug")

        hearing = asyncio.create_task(hear_all(peer, hear))
        await settled()
        feed(peer, framed(range(3)))
        with pytest.raises(ZeroDivisionError, match="a bug"):
            await hearing
        assert heard == [numbered(0)]

    asyncio.run(scenario())
