"""Work for a client that may go away: done here and now, and ended when nobody waits for it."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message

from pdserve.cluster.http.generation import until_gone
from pdserve.errors import RequestError


class Client:
    """Its side of ASGI."""

    def __init__(self) -> None:
        self._left = asyncio.Event()

    def leave(self) -> None:
        self._left.set()

    async def receive(self) -> Message:
        await self._left.wait()
        return {"type": "http.disconnect"}


Scenario = Callable[[Client], Awaitable[None]]


def play(scenario: Scenario) -> None:
    async def playing() -> None:
        await scenario(Client())
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling(), "what ended the work must not end what follows it"
        await asyncio.sleep(0)

    asyncio.run(playing())


def test_work_that_ends_while_the_client_stays() -> None:
    async def scenario(client: Client) -> None:
        async def work() -> None:
            await asyncio.sleep(0)

        assert await until_gone(client.receive, work())

    play(scenario)


def test_a_client_that_leaves_ends_the_work_before_this_returns() -> None:
    async def scenario(client: Client) -> None:
        said: list[str] = []

        async def work() -> None:
            try:
                client.leave()
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                said.append("cleaned up")

        assert not await until_gone(client.receive, work())
        assert said == ["cleaned up"]

    play(scenario)


def test_a_client_that_leaves_at_the_very_end_was_answered() -> None:
    async def scenario(client: Client) -> None:
        async def work() -> None:
            await asyncio.sleep(0)
            client.leave()

        assert await until_gone(client.receive, work())
        for _ in range(3):
            await asyncio.sleep(0)

    play(scenario)


def test_an_error_of_the_work_is_raised() -> None:
    async def scenario(client: Client) -> None:
        async def work() -> None:
            raise RequestError("no")

        with pytest.raises(RequestError, match="no"):
            await until_gone(client.receive, work())

    play(scenario)


def test_an_error_while_the_work_is_ended_is_nobodys() -> None:
    async def scenario(client: Client) -> None:
        async def work() -> None:
            try:
                client.leave()
                await asyncio.Event().wait()
            finally:
                raise RequestError("ended")

        assert not await until_gone(client.receive, work())

    play(scenario)


def test_work_that_does_not_let_itself_be_ended() -> None:
    async def scenario(client: Client) -> None:
        async def work() -> None:
            client.leave()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return

        assert not await until_gone(client.receive, work())

    play(scenario)


@pytest.mark.parametrize("leaves", [True, False])
def test_who_cancels_the_whole_of_it_is_obeyed(leaves: bool) -> None:
    async def scenario(client: Client) -> None:
        begun = asyncio.Event()

        async def work() -> None:
            begun.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(until_gone(client.receive, work()))
        await begun.wait()
        if leaves:
            client.leave()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    play(scenario)
