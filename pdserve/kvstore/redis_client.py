"""A client of Redis for an event loop, made when somebody gives an address."""

from typing import Any

from pdserve.errors import ConfigError

CONNECTIONS_MAX = 32


def connected(url: str, *, timeout_s: float) -> tuple[Any, tuple[type[Exception], ...]]:
    """A client, which connects when it is first asked, and the exceptions by which it fails.

    Raises:
        ConfigError: the address is none, or the client library is not there.
    """
    try:
        import redis.asyncio
        import redis.exceptions
    except ImportError as error:
        raise ConfigError("a Redis address is given, and redis is not installed") from error
    try:
        client = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            max_connections=CONNECTIONS_MAX,
        )
    except ValueError as error:
        raise ConfigError(f"{url!r} is no Redis address: {error}") from error
    return client, (redis.exceptions.RedisError, OSError)
