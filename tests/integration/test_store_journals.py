"""Journals in a real Redis: no host's clock counts, and one of Redis set back costs little.

What a clock that was set back by an hour leaves is an expiry that is an hour too far away: that is
how the tests make one.
"""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import redis

from pdserve.kvstore.journals import Found, RedisJournals
from tests.redis_server import RedisServer

HOUR_MS = 3_600_000
KEEP_S, ALIVE_S = 600.0, 120.0
"""Far longer than a test takes."""


def play(redis_server: RedisServer, steps: Callable[[RedisJournals], Awaitable[None]]) -> None:
    async def run() -> None:
        journals = RedisJournals(redis_server.url, bytes_max=100, keep_s=KEEP_S)
        await steps(journals)
        await journals.close()

    asyncio.run(run())


def test_the_clocks_of_writer_and_reader_do_not_count(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer's is an hour behind, which was as good as dead once; the reader's is ahead."""
    now_ns = 1_700_000_000_000_000_000
    monkeypatch.setattr("time.time_ns", lambda: now_ns)

    async def steps(journals: RedisJournals) -> None:
        nonlocal now_ns
        for word in ("make", "write", "append"):
            now_ns = 1_700_000_000_000_000_000
            if word == "make":
                await journals.make("j", b"state", alive_s=ALIVE_S)
            elif word == "write":
                await journals.write("j", b"state", alive_s=ALIVE_S)
            else:
                assert not await journals.append("j", [b"line"], alive_s=ALIVE_S)
            now_ns += HOUR_MS * 1_000_000
            assert await journals.find("j") == Found(b"state", True, False), word
        await journals.write("j", b"done")
        assert await journals.find("j") == Found(b"done", False, False)
        await journals.ask_end("j")
        assert await journals.append("j", [], alive_s=ALIVE_S), "its end was asked for"
        assert await journals.find("j") == Found(b"done", True, True)
        assert await journals.remove("j")
        assert not await journals.remove("j")
        assert await journals.find("j") is None
        assert await journals.append("j", [b"late"], alive_s=ALIVE_S)
        assert await journals.lines("j", 0, 9) == []

    play(redis_server, steps)


def test_after_a_clock_was_set_back_nothing_lives_longer_than_once_more_its_time(
    redis_server: RedisServer,
) -> None:
    client = redis.Redis.from_url(redis_server.url)

    async def steps(journals: RedisJournals) -> None:
        await journals.make("j", b"state", alive_s=ALIVE_S)
        await journals.append("j", [b"line"], alive_s=ALIVE_S)
        keys = [f"pdserve:journal:j{part}" for part in ("", ":lines", ":alive")]
        lives_ms = [client.pttl(key) for key in keys]
        for key, given_s in zip(keys, (KEEP_S, KEEP_S, ALIVE_S), strict=True):
            client.pexpire(key, HOUR_MS + round(given_s * 1000))
        assert await journals.find("j") == Found(b"state", True, False), "what is kept is there"
        for key, before_ms, given_s in zip(keys, lives_ms, (KEEP_S, KEEP_S, ALIVE_S), strict=True):
            assert 0 < client.pttl(key) <= given_s * 1000, key
            assert 0 < before_ms <= given_s * 1000, key

    play(redis_server, steps)


def test_a_writer_that_falls_silent_is_seen(redis_server: RedisServer) -> None:
    """As when its time has passed: Redis has dropped the sign of life."""
    client = redis.Redis.from_url(redis_server.url)

    async def steps(journals: RedisJournals) -> None:
        await journals.make("j", b"state", alive_s=ALIVE_S)
        client.pexpire("pdserve:journal:j:alive", 1)
        async with asyncio.timeout(60):
            while (found := await journals.find("j")) is not None and found.is_alive:
                pass
        assert found == Found(b"state", False, False)

    play(redis_server, steps)
