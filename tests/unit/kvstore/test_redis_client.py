"""A client of Redis ends with whoever asks, whatever the library makes of it."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from pdserve.errors import ConfigError, StoreUnavailable
from pdserve.kvstore.redis_client import RedisClient


def client() -> RedisClient:
    """One that never asks."""
    return client_of("redis://127.0.0.1:1/0")


def client_of(url: str) -> RedisClient:
    return RedisClient(url, timeout_s=1.0, keeps="the files", setting="gateway.responses_redis")


async def asked_and_cancelled(call: Coroutine[Any, Any, Any]) -> None:
    asking = asyncio.create_task(client().asked(call))
    await asyncio.sleep(0)  # so that it waits
    asking.cancel()
    await asking


async def held_back(answer: Exception | None) -> str:
    """As the library does whose answer comes with the cancellation."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        if answer is not None:
            raise answer from None
    return "late"


@pytest.mark.parametrize("answer", [None, OSError("the connection is gone")])
def test_a_cancellation_is_not_lost(answer: Exception | None) -> None:
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(asked_and_cancelled(held_back(answer)))


def test_a_time_limit_is_not_lost() -> None:
    async def play() -> None:
        async with asyncio.timeout(0.001):
            await client().asked(held_back(None))

    with pytest.raises(TimeoutError):
        asyncio.run(play())


def test_what_fails_says_what_is_kept_there() -> None:
    async def gone() -> None:
        raise ConnectionResetError("gone")

    with pytest.raises(StoreUnavailable, match="keeps the files, fails: gone"):
        asyncio.run(client().asked(gone()))


def test_an_address_that_is_none_is_told_by_its_setting_alone() -> None:
    with pytest.raises(ConfigError, match=r"^gateway\.responses_redis is no Redis") as raised:
        client_of("http://:secret@here")
    assert "secret" not in str(raised.value)
