"""Sums that several processes add to, in Redis, each forgotten after its time."""

from collections.abc import Mapping

from pdserve.kvstore.redis_client import RedisClient

TIMEOUT_S = 1.0
"""For one call to Redis, which takes about a millisecond."""

_PREFIX = "pdserve:count:"


class SharedCounts:
    def __init__(self, address: str) -> None:
        """
        Args:
            address: as ``redis://host:6379/0``. It is not connected to before it is used.

        Raises:
            ConfigError: the address cannot be used, or Redis' client is not installed.
        """
        self._redis = RedisClient(
            address,
            timeout_s=TIMEOUT_S,
            keeps="the counts of tenants",
            setting="gateway.access.quota_redis",
        )

    async def add(self, counts: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Adds to each sum, all or none of them.

        Args:
            counts: by name: what to add, and for how many milliseconds the sum is kept from now.

        Returns:
            The sums, by name.

        Raises:
            StoreUnavailable: no answer; whether they were added is not known.
        """
        async with self._redis.commands.pipeline(transaction=True) as steps:
            for name, (count, kept_ms) in counts.items():
                steps.incrby(_PREFIX + name, count)
                steps.pexpire(_PREFIX + name, kept_ms)
            answers = await self._redis.asked(steps.execute())
        return dict(zip(counts, answers[::2], strict=True))

    async def close(self) -> None:
        await self._redis.close()
