"""What ``pdserve keys`` does to the file of a gateway's API keys."""

import secrets
from dataclasses import replace
from pathlib import Path

from pdserve.cluster.gateway.access import NAME, Key, KeyFile, digest_of, read_keys, write_keys
from pdserve.cluster.gateway.quotas import NO_QUOTA, Quota
from pdserve.errors import ConfigError

KEY_PREFIX = "pd-"


def new_key(
    path: Path, name: str, *, tenant: str, admin: bool = False, requests_per_min: int | None = None
) -> str:
    """Add a key. It is returned here and kept nowhere: the file has its digest.

    Raises:
        ConfigError: there is one of this name, or something about it cannot be used.
    """
    file = _keys_in(path)
    if not NAME.fullmatch(name):
        raise ConfigError(f"name is {name!r}, must be 1 to 64 of a-z, A-Z, 0-9, _, . and -")
    if any(key.name == name for key in file.keys):
        raise ConfigError(f"{path} has a key called {name}; remove that first, or take another")
    secret = KEY_PREFIX + secrets.token_hex(32)
    key = Key(name, tenant, digest_of(secret), admin, requests_per_min)
    _write(path, file, replace(file, keys=(*file.keys, key)))
    return secret


def set_quota(path: Path, tenant: str, quota: Quota) -> None:
    """Of a tenant, whether it has keys yet or not; one without bounds is taken out of the file.

    Raises:
        ConfigError: a bound cannot be used.
    """
    file = _keys_in(path)
    quotas = {**file.quotas, tenant: quota}
    if quota == NO_QUOTA:
        del quotas[tenant]
    _write(path, file, replace(file, quotas=quotas))


def remove_key(path: Path, name: str) -> None:
    """
    Raises:
        ConfigError: there is none of this name.
    """
    file = _keys_in(path)
    left = tuple(key for key in file.keys if key.name != name)
    if len(left) == len(file.keys):
        known = ", ".join(key.name for key in file.keys) or "none"
        raise ConfigError(f"{path} has no key called {name}; it has: {known}")
    write_keys(path, replace(file, keys=left))


def _write(path: Path, before: KeyFile, after: KeyFile) -> None:
    write_keys(path, after)
    try:
        read_keys(path)  # whatever the rules are, what was written keeps them
    except ConfigError:
        write_keys(path, before)
        raise


def _keys_in(path: Path) -> KeyFile:
    return read_keys(path) if path.exists() else KeyFile()
