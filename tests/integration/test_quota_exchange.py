"""Gateways that add up a tenant's tokens in a real Redis, and go on without it."""

import asyncio

import pytest

from pdserve.clock import unix_ms
from pdserve.cluster.gateway.quota_exchange import exchange
from pdserve.cluster.gateway.quotas import Ledger, Quota
from pdserve.errors import ConfigError, RateLimited, StoreUnavailable
from pdserve.kvstore.shared_counts import SharedCounts
from tests.redis_server import RedisServer

QUOTAS = {"team": Quota(tokens_per_day=100)}


def test_gateways_add_up_what_a_tenant_has_spent(redis_server: RedisServer) -> None:
    """Goal: two gateways refuse a tenant that spent its day's budget over both, and one that comes
    new learns of it. Method: no time is measured; a day that ends in between ends the test early,
    with nothing to see."""
    one, two, three = Ledger(QUOTAS), Ledger(QUOTAS), Ledger(QUOTAS)
    now_ms = unix_ms()

    async def work() -> None:
        counts = SharedCounts(redis_server.url)
        one.spend("team", 60, now_ms)
        two.spend("team", 40, now_ms)
        three.spend("team", 0, now_ms)
        for ledger in (one, two, one, three):
            await exchange(ledger, counts)
        await counts.close()

    asyncio.run(work())
    if unix_ms() // 86_400_000 != now_ms // 86_400_000:
        pytest.skip("the day ended")
    for ledger in (one, two, three):
        with pytest.raises(RateLimited, match="100 tokens this day, of 100"):
            ledger.check("team", now_ms)


def test_without_redis_each_counts_for_itself_and_nothing_is_lost(
    redis_server: RedisServer,
) -> None:
    ledger = Ledger(QUOTAS)
    now_ms = unix_ms()
    ledger.spend("team", 100, now_ms)
    redis_server.kill()

    async def work() -> None:
        counts = SharedCounts(redis_server.url)
        with pytest.raises(StoreUnavailable, match="Redis, which keeps the counts"):
            await exchange(ledger, counts)
        await counts.close()

    asyncio.run(work())
    assert [entry.tokens for entry in ledger.entries(now_ms)] == [100]
    with pytest.raises(RateLimited):
        ledger.check("team", now_ms)


def test_an_address_that_is_none_is_a_mistake_in_the_settings() -> None:
    with pytest.raises(ConfigError, match=r"gateway\.access\.quota_redis"):
        SharedCounts("nowhere")
