"""A client of Redis for an event loop, made when somebody gives an address."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

from pdserve.errors import ConfigError, StoreUnavailable

CONNECTIONS_MAX = 32


class RedisClient:
    """Connects when it is first asked. Whatever fails there is ``StoreUnavailable``."""

    def __init__(self, url: str, *, timeout_s: float, keeps: str, setting: str) -> None:
        """
        Args:
            timeout_s: for one call.
            keeps: what is kept there, for errors.
            setting: that has the address, for errors; the address may have a password in it.

        Raises:
            ConfigError: the address is none, or the client library is not there.
        """
        self.commands, self._failures = _connected(url, timeout_s=timeout_s, setting=setting)
        self._keeps = keeps
        self._scripts: dict[str, Any] = {}

    async def asked(self, call: Awaitable[Any]) -> Any:
        """What one of ``commands`` answers.

        Who is cancelled meanwhile is cancelled. The library waits with Python 3.11's ``wait_for``,
        which forgets a cancellation that comes as what it waits for is done.

        Raises:
            StoreUnavailable
        """
        task = asyncio.current_task()
        assert task is not None
        cancels = task.cancelling()
        try:
            return await call
        except self._failures as error:
            raise StoreUnavailable(f"Redis, which keeps {self._keeps}, fails: {error}") from error
        finally:
            if task.cancelling() > cancels:
                raise asyncio.CancelledError

    async def run(self, script: str, keys: Sequence[str], arguments: Sequence[Any] = ()) -> Any:
        """What a script answers, in one round trip once Redis knows it.

        Raises:
            StoreUnavailable
        """
        if script not in self._scripts:
            self._scripts[script] = self.commands.register_script(script)
        return await self.asked(self._scripts[script](keys=keys, args=arguments))

    async def close(self) -> None:
        await self.commands.aclose()


def _connected(
    url: str, *, timeout_s: float, setting: str
) -> tuple[Any, tuple[type[Exception], ...]]:
    """The library's client, and the exceptions by which it fails."""
    try:
        import redis.asyncio
        import redis.exceptions
    except ImportError as error:
        raise ConfigError(f"{setting} is given, and redis is not installed") from error
    try:
        client = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            max_connections=CONNECTIONS_MAX,
        )
    except ValueError as error:
        raise ConfigError(f"{setting} is no Redis address: {error}") from error
    return client, (redis.exceptions.RedisError, OSError)
