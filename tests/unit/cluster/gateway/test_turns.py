"""Who is handed what in which turn of the event loop."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.gateway.turns import DELTAS_PER_TURN, TURNS_MAX, Turns
from pdserve.ids import RequestId
from pdserve.messages import TokenDelta


def delta(name: str, offset: int) -> TokenDelta:
    return TokenDelta(RequestId(name), 0, offset, ())


def step(offset: int, streams: int = 64) -> list[TokenDelta]:
    return [delta(f"r{stream}", offset) for stream in range(streams)]


async def turn() -> None:
    await asyncio.sleep(0)


def test_few_are_handed_out_as_they_come() -> None:
    handed: list[TokenDelta] = []
    few = step(5, DELTAS_PER_TURN)
    Turns(handed.append).add(few)
    assert handed == few


def test_a_first_token_waits_for_none_of_a_step() -> None:
    async def run() -> None:
        handed: list[TokenDelta] = []
        turns = Turns(handed.append)
        turns.add(step(5))
        assert handed == step(5)[:DELTAS_PER_TURN]
        turns.add([delta("new", 0)])
        assert handed[-1] == delta("new", 0)
        for _ in range(TURNS_MAX):
            await turn()
        handed.remove(delta("new", 0))
        assert handed == step(5)

    asyncio.run(run())


@given(st.lists(st.integers(0, 300), max_size=8))
def test_everything_is_handed_out_in_the_order_in_which_it_came(sizes: list[int]) -> None:
    async def run() -> None:
        handed: list[TokenDelta] = []
        turns = Turns(handed.append)
        added = [
            delta(f"r{frame}", 1 + index) for frame, n in enumerate(sizes) for index in range(n)
        ]
        for frame in range(len(sizes)):
            turns.add([each for each in added if each.request == f"r{frame}"])
            await turn()
        for _ in range(20 * TURNS_MAX):
            await turn()
        assert handed == added

    asyncio.run(run())


def test_more_than_can_be_handed_out_does_not_pile_up() -> None:
    async def run() -> None:
        handed: list[TokenDelta] = []
        turns = Turns(handed.append)
        for offset in range(1, 100):
            turns.add(step(offset, 200))
            await turn()
        assert len(handed) >= 99 * 200 - 200 * (TURNS_MAX + 2)

    asyncio.run(run())


def test_one_that_cannot_be_handed_out_keeps_nobody_else() -> None:
    async def run() -> None:
        handed: list[TokenDelta] = []

        def hand(each: TokenDelta) -> None:
            if each.request == "r9":
                raise RuntimeError(each.request)
            handed.append(each)

        failures: list[object] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
        Turns(hand).add(step(5))
        for _ in range(TURNS_MAX):
            await turn()
        assert len(failures) == 1
        assert handed == [each for each in step(5) if each.request != "r9"]

    asyncio.run(run())
