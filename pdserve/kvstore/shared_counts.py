"""Sums that several processes add to, in Redis, each forgotten after its time."""

from collections.abc import Mapping
from typing import Any

from pdserve.errors import ConfigError, StoreUnavailable

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
        try:
            import redis.asyncio
            import redis.exceptions
        except ImportError as error:
            raise ConfigError("a Redis address is given, and redis is not installed") from error
        try:
            self._redis: Any = redis.asyncio.Redis.from_url(
                address, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
            )
        except ValueError as error:
            raise ConfigError(f"gateway.access.quota_redis is no Redis address: {error}") from error
        self._failures = (redis.exceptions.RedisError, OSError)

    async def add(self, counts: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Adds to each sum, all or none of them.

        Args:
            counts: by name: what to add, and for how many milliseconds the sum is kept from now.

        Returns:
            The sums, by name.

        Raises:
            StoreUnavailable: no answer; whether they were added is not known.
        """
        try:
            async with self._redis.pipeline(transaction=True) as steps:
                for name, (count, kept_ms) in counts.items():
                    steps.incrby(_PREFIX + name, count)
                    steps.pexpire(_PREFIX + name, kept_ms)
                answers = await steps.execute()
        except self._failures as error:
            raise StoreUnavailable(f"Redis does not answer: {error}") from error
        return dict(zip(counts, answers[::2], strict=True))

    async def close(self) -> None:
        await self._redis.aclose()
