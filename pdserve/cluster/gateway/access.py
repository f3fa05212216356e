"""Who may use the gateway: API keys, whose they are, and how often each may ask.

Keys live in a file that ``pdserve keys`` writes; each is kept as its SHA-256 alone, which is enough
for keys of 256 random bits. The file is looked at again while the gateway runs, so that a key can
be added, changed or taken away without a restart. One that cannot be read leaves the last good keys
in force: a typing error must neither open the gateway nor shut everybody out.

The same file may bound what each tenant has (``quotas``): the ``ledger`` counts, and this door is
where a call is refused.

A key says who its *tenant* is. What a request says of itself (``user``) counts only where there are
no keys.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pdserve.clock import MS, Clock, S, monotonic, unix_ms
from pdserve.cluster.gateway.audit import Audit
from pdserve.cluster.gateway.parameters import TENANT_CHARACTERS_MAX, shown
from pdserve.cluster.gateway.quotas import TOKENS_MAX, Ledger, Quota
from pdserve.errors import ConfigError, Forbidden, RateLimited, Unauthorized

KEYS_MAX = 100_000

LOOK_AGAIN_S = 1.0
"""How old what is known of the file may be."""

BURST_S = 10
"""So many seconds' worth of requests may come at once."""

TOLD_MAX = 100
"""Names that the audit log says of one change of the file."""

NOTHING: Mapping[str, str] = MappingProxyType({})

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


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


@dataclass(frozen=True, slots=True)
class KeyFile:
    """What a file of keys holds."""

    keys: tuple[Key, ...] = ()
    quotas: Mapping[str, Quota] = field(default_factory=dict)  # by tenant


def read_keys(path: Path) -> KeyFile:
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
    quotas = tree.get("quotas", {})
    if not isinstance(quotas, Mapping) or len(quotas) > KEYS_MAX:
        raise ConfigError(
            f"gateway.api_keys: {path}: quotas must be an object with at most {KEYS_MAX} tenants"
        )
    where = f"gateway.api_keys: {path}: quotas"
    return KeyFile(
        tuple(keys),
        {tenant: _quota(f"{where}.{shown(tenant)}", e) for tenant, e in quotas.items()},
    )


def write_keys(path: Path, file: KeyFile) -> None:
    """Whole or not at all; only the owner may read it."""
    tree: dict[str, Any] = {"keys": [_said(key) for key in file.keys]}
    if file.quotas:
        tree["quotas"] = {tenant: _said(quota) for tenant, quota in file.quotas.items()}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            json.dump(tree, out, indent=1)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _said(entry: Key | Quota) -> dict[str, Any]:
    """Its fields that are set."""
    values = {name: getattr(entry, name) for name in entry.__dataclass_fields__}
    return {
        name: value for name, value in values.items() if value is not None and value is not False
    }


def _quota(where: str, entry: Any) -> Quota:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} is {shown(entry)}, must be an object")
    for name, value in entry.items():
        if name not in Quota.__dataclass_fields__:
            known = ", ".join(Quota.__dataclass_fields__)
            raise ConfigError(f"{where} has {shown(name)}, which is none of {known}")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and 1 <= value <= TOKENS_MAX):
            raise ConfigError(f"{where}.{name} is {shown(value)}, must be 1 to {TOKENS_MAX}")
    return Quota(**entry)


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

    def __init__(
        self,
        path: Path | None,
        *,
        audit: Audit | None = None,
        clock: Clock = monotonic,
        wall_ms: Callable[[], int] = unix_ms,
    ) -> None:
        """
        Args:
            path: of the keys; None: everybody is let in.
            audit: is told of refusals and of changed keys; None: the log is.

        Raises:
            ConfigError: the file cannot be used.
        """
        self._path = path
        self._clock = clock
        self._keys: dict[str, Key] = {}
        self._state: tuple[int, ...] = ()  # of the file, when it was read
        self._looked_ns = clock()
        self._next_ns: dict[str, int] = {}  # by name: when one more request is due
        self.audit = audit or Audit(clock=clock)
        self.ledger = Ledger()
        self._wall_ms = wall_ms
        if path is not None:
            self._state = _state(path)
            file = read_keys(path)
            self._keys = {key.sha256: key for key in file.keys}
            self.ledger.set_quotas(file.quotas)

    @property
    def asks_for_keys(self) -> bool:
        return self._path is not None

    def admit(
        self,
        secret: str | None,
        *,
        admin: bool = False,
        counts: bool = True,
        asked: Mapping[str, str] = NOTHING,
    ) -> Key | None:
        """The key of who asks; None where no keys are needed.

        Args:
            admin: only for keys that say so.
            counts: against the key's rate.
            asked: what the audit log says of it, where it is refused.

        Raises:
            Unauthorized, Forbidden, RateLimited.
        """
        if self._path is None:
            return None
        self._look_again(self._path)
        # A dictionary's timing tells of the digest, from which nobody gets to the key.
        key = None if secret is None else self._keys.get(digest_of(secret))
        if key is None:
            self.audit.refusal(why="no key" if secret is None else "an unknown key", **asked)
            raise Unauthorized(
                "No API key was sent; send one as 'Authorization: Bearer KEY'"
                if secret is None
                else "Incorrect API key provided; ask the operator of this cluster for one"
            )
        if admin and not key.admin:
            self.audit.refusal(why="not an admin's key", key=key.name, **asked)
            raise Forbidden("This needs a key with admin rights")
        if counts and key.requests_per_min is not None:
            self._count(key, key.requests_per_min)
        if counts and not admin:
            self.ledger.check(key.tenant, self._wall_ms())
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
            file = read_keys(path)
        except ConfigError as error:
            self.audit.keys(problem=str(error))
            return
        before, now = ({key.name: key for key in some} for some in (self._keys.values(), file.keys))
        self.audit.keys(
            count=len(file.keys),
            added=sorted(now.keys() - before.keys())[:TOLD_MAX],
            removed=sorted(before.keys() - now.keys())[:TOLD_MAX],
            changed=sorted(n for n in now.keys() & before.keys() if now[n] != before[n])[:TOLD_MAX],
        )
        self._keys = {key.sha256: key for key in file.keys}
        self.ledger.set_quotas(file.quotas)
        names = now.keys()
        self._next_ns = {name: due for name, due in self._next_ns.items() if name in names}


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
