"""What ``pdserve keys`` does to the file of a gateway's API keys."""

import secrets
from pathlib import Path

from pdserve.cluster.access import NAME, Key, digest_of, read_keys, write_keys
from pdserve.errors import ConfigError

KEY_PREFIX = "pd-"


def new_key(
    path: Path, name: str, *, tenant: str, admin: bool = False, requests_per_min: int | None = None
) -> str:
    """Add a key. It is returned here and kept nowhere: the file has its digest.

    Raises:
        ConfigError: there is one of this name, or something about it cannot be used.
    """
    keys = _keys_in(path)
    if not NAME.fullmatch(name):
        raise ConfigError(f"name is {name!r}, must be 1 to 64 of a-z, A-Z, 0-9, _, . and -")
    if any(key.name == name for key in keys):
        raise ConfigError(f"{path} has a key called {name}; remove that first, or take another")
    secret = KEY_PREFIX + secrets.token_hex(32)
    write_keys(path, [*keys, Key(name, tenant, digest_of(secret), admin, requests_per_min)])
    try:
        read_keys(path)  # whatever the rules are, what was written keeps them
    except ConfigError:
        write_keys(path, keys)
        raise
    return secret


def remove_key(path: Path, name: str) -> None:
    """
    Raises:
        ConfigError: there is none of this name.
    """
    keys = _keys_in(path)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        known = ", ".join(key.name for key in keys) or "none"
        raise ConfigError(f"{path} has no key called {name}; it has: {known}")
    write_keys(path, left)


def _keys_in(path: Path) -> list[Key]:
    return read_keys(path) if path.exists() else []
