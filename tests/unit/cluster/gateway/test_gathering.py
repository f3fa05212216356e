"""Several calls as one stream: order, bounds, and that every way out closes every iterator."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from pdserve.cluster.gateway.calls import Call, Piece
from pdserve.cluster.gateway.gathering import PENDING_PIECES_MAX, batches
from pdserve.errors import PdserveError, WorkerLost
from pdserve.messages import FinishReason, Sampling, ServiceClass, Stop
from tests.unit.cluster.fake_session import HANG, FakeSession, Step, piece, said, steps


def call(name: str) -> Call:
    return Call(name, (1,), 1, Sampling(), Stop(9), None, "t", ServiceClass.STANDARD, 0)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 10))


async def texts(session: FakeSession, *names: str) -> list[tuple[int, str]]:
    found = []
    async with aclosing(batches(session, [call(name) for name in names])) as gathered:
        async for batch in gathered:
            assert batch
            found += [(index, piece.text) for index, piece in batch]
    return found


def test_pieces_keep_their_order_within_a_call() -> None:
    async def scenario() -> None:
        found = await texts(FakeSession(said(*"abc")), "x", "y")
        for index in (0, 1):
            assert [text for at, text in found if at == index] == ["a", "b", "c"]

    run(scenario())


def test_what_was_ready_comes_before_the_error() -> None:
    session = FakeSession(steps(piece("a"), WorkerLost("gone")))

    async def scenario() -> None:
        gathered = batches(session, [call("x")])
        assert [p.text for _, p in await anext(gathered)] == ["a"]
        with pytest.raises(WorkerLost, match="gone"):
            await anext(gathered)

    run(scenario())


def test_closing_closes_every_iterator_before_it_returns() -> None:
    session = FakeSession(steps(piece("a"), HANG))

    async def scenario() -> None:
        async with aclosing(batches(session, [call("x"), call("y")])) as gathered:
            await anext(gathered)
            assert session.open == {"x", "y"}
        assert session.open == set()

    run(scenario())


@pytest.mark.parametrize("names", [["x"], ["x", "y"]])
def test_cancelling_the_consumer_closes_every_iterator(names: list[str]) -> None:
    session = FakeSession(steps(piece("a"), HANG))

    async def scenario() -> None:
        consumer = asyncio.create_task(texts(session, *names))
        while session.open != {*names}:
            await asyncio.sleep(0)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        assert session.open == set()

    run(scenario())


def test_a_consumer_that_does_not_read_stops_the_pump() -> None:
    taken = 0

    def endless(_: Call) -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield piece("a")

    async def scenario() -> None:
        async with aclosing(batches(FakeSession(endless), [call("x")])) as gathered:
            assert len(await anext(gathered)) <= PENDING_PIECES_MAX
            for _ in range(100):  # turns of the loop in which nobody reads
                await asyncio.sleep(0)
            assert taken <= 2 * PENDING_PIECES_MAX + 1

    run(scenario())


def test_a_bug_in_the_session_is_raised_and_not_waited_for() -> None:
    def broken(_: Call) -> list[Step]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(_discard(FakeSession(broken)))


@pytest.mark.parametrize("names", [["x"], ["x", "y"]])
def test_a_call_that_is_cancelled_from_inside_ends_with_an_error(names: list[str]) -> None:
    class Cancelling(FakeSession):
        async def bursts(self, call: Call) -> AsyncGenerator[Sequence[Piece]]:
            yield [piece("a", finish=FinishReason.STOP)]
            raise asyncio.CancelledError

    with pytest.raises(PdserveError, match="given up"):
        run(_discard(Cancelling(), *names))


async def _discard(session: FakeSession, *names: str) -> None:
    await texts(session, *(names or ("x",)))
