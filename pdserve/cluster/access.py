"""Who may use the gateway: API keys, whose they are, and how often each may ask.

Keys live in a file that ``pdserve keys`` writes; each is kept as its SHA-256 alone, which is enough
for keys of 256 random bits. The file is looked at again while the gateway runs, so that a key can
be added, changed or taken away without a restart. One that cannot be read leaves the last good keys
in force: a typing error must neither open the gateway nor shut everybody out.

A key says who its *tenant* is. What a request says of itself (``user``) counts only where there are
no keys.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.clock import MS, Clock, S, monotonic
from pdserve.cluster.parameters import TENANT_CHARACTERS_MAX, shown
from pdserve.errors import ConfigError, Forbidden, RateLimited, Unauthorized

KEYS_MAX = 100_000

LOOK_AGAIN_S = 1.0
"""How old what is known of the file may be."""

BURST_S = 10
"""So many seconds' worth of requests may come at once."""

SAY_AGAIN_S = 1.0
"""Refusals are logged so often at most; the next line says how many there were."""

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

_audit = logging.getLogger("pdserve.audit")


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of one."""

    name: str  # in logs
    tenant: str
    sha256: str  # of the key itself, in hexadecimal
    admin: bool = False  # may see and change the cluster
    requests_per_min: int | None = None  # at each gateway


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """
    Raises:
        ConfigError: naming the entry and the field that cannot be used.
    """
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"gateway.api_keys: {path} cannot be read as JSON: {error}") from error
    entries = tree.get("keys") if isinstance(tree, Mapping) else None
    if not isinstance(entries, list) or len(entries) > KEYS_MAX:
        raise ConfigError(
            f'gateway.api_keys: {path} must hold {{"keys": [...]}} with at most {KEYS_MAX} keys'
        )
    keys = [_key(f"gateway.api_keys: {path}: keys.{index}", e) for index, e in enumerate(entries)]
    for what in ("name", "sha256"):
        values = [getattr(key, what) for key in keys]
        if len(set(values)) != len(values):
            raise ConfigError(f"gateway.api_keys: {path}: two keys have the same {what}")
    return keys


def write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Whole or not at all; only the owner may read it."""
    entries = [
        {
            name: value
            for name in Key.__dataclass_fields__
            if (value := getattr(key, name)) is not None and value is not False
        }
        for key in keys
    ]
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({"keys": entries}, file, indent=1)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _key(where: str, entry: Any) -> Key:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} is {shown(entry)}, must be an object")
    for name in entry:
        if name not in Key.__dataclass_fields__:
            known = ", ".join(Key.__dataclass_fields__)
            raise ConfigError(f"{where} has {shown(name)}, which is none of {known}")
    name, tenant, digest = (entry.get(part) for part in ("name", "tenant", "sha256"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(f"{where}.name is {shown(name)}, must be 1 to 64 of a-z, A-Z, 0-9, _.-")
    if not isinstance(tenant, str) or not 1 <= len(tenant) <= TENANT_CHARACTERS_MAX:
        raise ConfigError(
            f"{where}.tenant is {shown(tenant)}, must be 1 to {TENANT_CHARACTERS_MAX} characters"
        )
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ConfigError(f"{where}.sha256 is {shown(digest)}, must be 64 hexadecimal digits")
    admin, rate = entry.get("admin", False), entry.get("requests_per_min")
    if not isinstance(admin, bool):
        raise ConfigError(f"{where}.admin is {shown(admin)}, must be true or false")
    if rate is not None and (not isinstance(rate, int) or isinstance(rate, bool) or rate < 1):
        raise ConfigError(f"{where}.requests_per_min is {shown(rate)}, must be 1 or more")
    return Key(name, tenant, digest, admin, rate)


class Doorkeeper:
    """Lets requests in. One per gateway, for one event loop."""

    def __init__(self, path: Path | None, *, clock: Clock = monotonic) -> None:
        """
        Args:
            path: of the keys; None: everybody is let in.

        Raises:
            ConfigError: the file cannot be used.
        """
        self._path = path
        self._clock = clock
        self._keys: dict[str, Key] = {}
        self._state: tuple[int, ...] = ()  # of the file, when it was read
        self._looked_ns = clock()
        self._next_ns: dict[str, int] = {}  # by name: when one more request is due
        self._refused_count = 0
        self._said_ns = self._looked_ns - round(SAY_AGAIN_S * S)
        if path is not None:
            self._state = _state(path)
            self._keys = {key.sha256: key for key in read_keys(path)}

    @property
    def asks_for_keys(self) -> bool:
        return self._path is not None

    def admit(self, secret: str | None, *, admin: bool = False, counts: bool = True) -> Key | None:
        """The key of who asks; None where no keys are needed.

        Args:
            admin: only for keys that say so.
            counts: against the key's rate.

        Raises:
            Unauthorized, Forbidden, RateLimited.
        """
        if self._path is None:
            return None
        self._look_again(self._path)
        # A dictionary's timing tells of the digest, from which nobody gets to the key.
        key = None if secret is None else self._keys.get(digest_of(secret))
        if key is None:
            self._log_refusal("no key" if secret is None else "an unknown key")
            raise Unauthorized(
                "No API key was sent; send one as 'Authorization: Bearer KEY'"
                if secret is None
                else "Incorrect API key provided; ask the operator of this cluster for one"
            )
        if admin and not key.admin:
            self._log_refusal(f"{key.name}, which is no admin's key")
            raise Forbidden("This needs a key with admin rights")
        if counts and key.requests_per_min is not None:
            self._count(key, key.requests_per_min)
        if admin:
            _audit.info("admin key %s was used", key.name)
        return key

    def _count(self, key: Key, per_min: int) -> None:
        """The generic cell rate algorithm (ITU-T I.371): bursts of ``BURST_S``, one at least."""
        now_ns, interval_ns = self._clock(), 60 * S // per_min
        due_ns = max(self._next_ns.get(key.name, 0), now_ns)
        early_ns = due_ns - now_ns - max(0, BURST_S * S - interval_ns)
        if early_ns > 0:
            raise RateLimited(
                f"The key {key.name} may ask {per_min} times a minute at each gateway",
                retry_after_ms=-(-early_ns // MS),
            )
        self._next_ns[key.name] = due_ns + interval_ns

    def _look_again(self, path: Path) -> None:
        now_ns = self._clock()
        if now_ns - self._looked_ns < LOOK_AGAIN_S * S:
            return
        self._looked_ns = now_ns
        state = _state(path)
        if state == self._state:
            return
        self._state = state
        try:
            keys = read_keys(path)
        except ConfigError as error:
            _audit.error("the keys stay as they were: %s", error)
            return
        self._keys = {key.sha256: key for key in keys}
        names = {key.name for key in keys}
        self._next_ns = {name: due for name, due in self._next_ns.items() if name in names}
        _audit.info("%d keys read from %s", len(keys), path)

    def _log_refusal(self, what: str) -> None:
        self._refused_count += 1
        now_ns = self._clock()
        if now_ns - self._said_ns >= SAY_AGAIN_S * S:
            _audit.warning("refused: %s (%d since the last line)", what, self._refused_count)
            self._said_ns, self._refused_count = now_ns, 0


def secret_of(headers: Mapping[str, str]) -> str | None:
    """The key in HTTP headers or gRPC metadata, whose names are in lower case."""
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and secret.strip():
        return secret.strip()
    return headers.get("x-api-key") or None


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_size, found.st_ino)
