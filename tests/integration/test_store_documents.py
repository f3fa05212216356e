"""Documents in a real Redis do what those in memory do."""

import asyncio
import os
import random
from typing import Any

import pytest

from pdserve.errors import CapacityError, StoreUnavailable
from pdserve.kvstore.documents import Documents, MemoryDocuments, New, RedisDocuments
from tests.integration.harness import WAIT_S
from tests.redis_server import RedisServer

SEED = int(os.environ.get("SEED", "5"))
STEPS = 400
KEEP_S = 3600.0
"""Far longer than the test takes: time does not pass in it."""


def new(name: str, content: bytes = b"", **said: Any) -> New:
    return New(
        **{
            "name": name,
            "state": b"",
            "groups": ["g"],
            "keep_s": KEEP_S,
            **said,
            "content": content,
        }
    )


async def made(documents: Documents, name: str, data: bytes, group: str) -> str:
    if await documents.state(name) is not None:
        return "there"
    try:
        groups = ["some", group]
        await documents.make(new(name, data * 3, state=data, groups=groups, count_max=2))
    except CapacityError as error:
        return str(error)
    return "made"


async def everything(documents: Documents) -> Any:
    return [await documents.names(group) for group in ("some", "even", "odd")] + [
        (await documents.state(each), await documents.content(each), await documents.answers(each))
        for each in "abc"
    ]


async def step(documents: Documents, chance: random.Random) -> Any:
    name, who, group = chance.choice("abc"), chance.choice("12"), chance.choice(["even", "odd"])
    data, number, rarely = bytes(chance.choices(b"xyz", k=2)), chance.randrange(3), chance.random()
    said: Any = None
    match chance.randrange(8):
        case 0:
            said = await made(documents, name, data, group)
        case 1 if rarely < 0.3:
            said = await documents.remove(name)
        case 2:
            said = await documents.swap(name, await documents.state(name) or b"", data)
        case 3:
            said = await documents.swap(name, data, b"new")
        case 4:
            said = await documents.answer(name, number, data)
        case 5:
            said = await documents.claim(name, who, 600.0)
        case 6:
            await documents.release(name, who)
        case 7 if rarely < 0.3:
            await documents.leave(name, group)
    return said, await everything(documents)


def test_both_do_the_same(redis_server: RedisServer) -> None:
    print(f"seed {SEED}")

    async def play(documents: Documents) -> list[Any]:
        chance = random.Random(SEED)
        said = [await step(documents, chance) for _ in range(STEPS)]
        await documents.close()
        return said

    kept = asyncio.run(play(RedisDocuments(redis_server.url, bytes_max=100)))
    assert kept == asyncio.run(play(MemoryDocuments(bytes_max=1000)))


def test_a_lease_lapses_and_what_expires_leaves_its_group(redis_server: RedisServer) -> None:
    async def play() -> None:
        documents = RedisDocuments(redis_server.url, bytes_max=100)
        await documents.make(new("a", keep_s=1.0))
        await documents.make(new("b"))
        assert await documents.claim("b", "one", 1.0)
        async with asyncio.timeout(120):
            while not await documents.claim("b", "two", KEEP_S):
                await asyncio.sleep(0.05)
            while await documents.names("g") != ["b"]:
                await asyncio.sleep(0.05)
        assert not await documents.claim("b", "one", 1.0)
        assert not await documents.answer("a", 0, b"late")
        with pytest.raises(CapacityError):
            await documents.make(new("c", b"x" * 101))
        await documents.close()

    asyncio.run(play())


def test_a_redis_that_is_not_there_says_so() -> None:
    async def play() -> None:
        documents = RedisDocuments("redis://127.0.0.1:1/0", bytes_max=100)
        with pytest.raises(StoreUnavailable):
            await documents.names("g")
        await documents.close()

    asyncio.run(play())


def test_who_is_cancelled_while_redis_answers_is_cancelled(redis_server: RedisServer) -> None:
    """Else a loop that is told to end goes on, and so does whoever waits for it."""
    print(f"seed {SEED}")
    chance = random.Random(SEED)

    async def ask_on(documents: Documents) -> None:
        while True:
            await documents.swap("a", await documents.state("a") or b"", b"s")

    async def play() -> None:
        documents = RedisDocuments(redis_server.url, bytes_max=100)
        await documents.make(new("a"))
        for _ in range(100):
            asking = asyncio.create_task(ask_on(documents))
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            asking.cancel()
            _, goes_on = await asyncio.wait([asking], timeout=WAIT_S)
            assert not goes_on
        await documents.close()

    asyncio.run(play())
