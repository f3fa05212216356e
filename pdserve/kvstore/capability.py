"""Who may do what at a store node over TCP: signed tokens, and what a connection with one may ask.

    python -m pdserve.kvstore.capability --key-file FILE --operations read --valid-s 3600

prints a token. Whoever has the cluster's key makes tokens; whoever has a token can neither widen
nor prolong it. A token names operations, a tenant, and for how long it is good. The node turns that
into remaining time when it is greeted, never more than the token says, and from then on its own
monotonic clock counts: a wall clock that jumps neither ends a connection nor prolongs it.

*Tenants*: a tenant's keys all begin with the tenant's own bytes. In every message of its
connections the node writes those bytes over the beginning of each key, which changes nothing for
the tenant's keys and makes any other a key that nobody stored. So a foreign tenant's block is a
miss like any other, by the same path and in the same time.

Peers on a Unix socket need no token: the kernel says that they run as this user.
"""

import argparse
import base64
import binascii
import dataclasses
import hashlib
import hmac
import json
import os
import stat
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

from pdserve.clock import Clock, S
from pdserve.errors import AccessDenied, ConfigError
from pdserve.ids import BlockKey
from pdserve.kvstore import admin, protocol
from pdserve.kvstore.masters import mastering
from pdserve.wire.endpoint import is_local
from pdserve.wire.frame import Frame

KEY_BYTES_MIN = 16
TOKEN_CHARS_MAX = 4096
TENANT_BYTES = 5
"""Of each key of a tenant. That two of a thousand tenants have the same ones is a chance of one in
two million; the 88 bits that are left tell a tenant's own blocks apart."""

_VERSION = "pdkv1"


class Operation(StrEnum):
    READ = "read"
    WRITE = "write"
    LIST = "list"  # everybody's keys
    ADMIN = "admin"  # all the rest


ALL_OPERATIONS = frozenset(Operation)

OPERATION_OF: Mapping[type, Operation] = MappingProxyType(
    {
        protocol.ClaimPrefix: Operation.READ,
        protocol.QuotePrefix: Operation.READ,
        protocol.ReadBlocks: Operation.READ,
        protocol.FetchBlocks: Operation.READ,
        protocol.DescribeBlocks: Operation.READ,
        protocol.ReleaseClaim: Operation.READ,
        protocol.CondemnBlock: Operation.READ,
        protocol.CondemnSlot: Operation.READ,
        protocol.Released: Operation.READ,
        protocol.AdoptTicket: Operation.READ,
        protocol.AskStat: Operation.READ,
        admin.NotePhases: Operation.READ,
        admin.Prefetch: Operation.READ,
        protocol.Reserve: Operation.WRITE,
        protocol.ReservePush: Operation.WRITE,
        protocol.ReserveTail: Operation.WRITE,
        protocol.Fill: Operation.WRITE,
        protocol.PullBlocks: Operation.WRITE,
        protocol.Commit: Operation.WRITE,
        protocol.Abandon: Operation.WRITE,
        protocol.OpenTicket: Operation.WRITE,
        protocol.SealTicket: Operation.WRITE,
        protocol.AbortTicket: Operation.WRITE,
        protocol.AbortAttempts: Operation.WRITE,
        protocol.ListChanges: Operation.LIST,
        mastering.AskDeltas: Operation.LIST,
        mastering.AskParents: Operation.LIST,
        # What is not here is ADMIN.
    }
)


@dataclass(frozen=True, slots=True)
class Capability:
    """What one connection may do, until ``until_ns`` of the node's clock."""

    holder: str  # as it greeted
    operations: frozenset[Operation] = ALL_OPERATIONS
    key_prefix: bytes = b""  # of all its keys; empty: any key
    until_ns: int | None = None

    def admit(self, frame: Frame, now_ns: int) -> Frame:
        """The frame as the node is to see it.

        Raises:
            AccessDenied: its message must not be sent on this connection.
        """
        message = frame.message
        if self.until_ns is not None and now_ns >= self.until_ns:
            raise AccessDenied("the token has expired; connect again with a new one")
        operation = operation_of(message)
        if operation not in self.operations:
            allowed = ", ".join(sorted(self.operations)) or "nothing"
            raise AccessDenied(
                f"{type(message).__name__} needs a token for {operation}, this one allows {allowed}"
            )
        if self.key_prefix and hasattr(message, "keys"):
            own = dataclasses.replace(message, keys=own_keys(self.key_prefix, message.keys))
            return dataclasses.replace(frame, message=own)
        return frame


def operation_of(message: object) -> Operation:
    return OPERATION_OF.get(type(message), Operation.ADMIN)


def is_audited(message: object) -> bool:
    """Whether it changes the store for everybody, or reads what belongs to others; who only looks
    at figures, as every scrape of ``/metrics`` does, leaves no line."""
    return operation_of(message) is Operation.ADMIN and not isinstance(message, admin.AskReport)


def own_keys(prefix: bytes, keys: Iterable[BlockKey]) -> tuple[BlockKey, ...]:
    """The keys with a tenant's bytes at their beginning."""
    return tuple(BlockKey(prefix + key[len(prefix) :]) for key in keys)


def key_prefix(key: bytes, tenant: str) -> bytes:
    """The bytes with which a tenant's keys begin; none for the empty tenant, which is all."""
    return _mac(key, "tenant " + tenant)[:TENANT_BYTES] if tenant else b""


def mint(
    key: bytes, *, operations: Iterable[Operation], tenant: str, valid_s: float, now_s: float
) -> str:
    """A token.

    Args:
        tenant: whose blocks; "" for everybody's, as the cluster's own workers have it.
        now_s: by the wall clock.
    """
    claims = {
        "operations": sorted(set(operations)),
        "tenant": tenant,
        "issued_s": now_s,
        "valid_s": valid_s,
    }
    payload = _encoded(json.dumps(claims, separators=(",", ":")).encode())
    return f"{_VERSION}.{payload}.{_encoded(_mac(key, payload))}"


def verified(key: bytes, token: str, holder: str, *, wall_s: float, now_ns: int) -> Capability:
    """What a token allows, from now on.

    Raises:
        AccessDenied: it is none of this cluster's, or has expired.
    """
    if not token:
        raise AccessDenied("a peer over TCP needs a token; give the client the cluster's key file")
    if len(token) > TOKEN_CHARS_MAX:
        raise AccessDenied(f"a token of {len(token)} characters, the limit is {TOKEN_CHARS_MAX}")
    version, _, rest = token.partition(".")
    payload, _, signature = rest.partition(".")
    # The signature is compared before a byte of the payload is believed.
    signed = hmac.compare_digest(signature.encode(), _encoded(_mac(key, payload)).encode())
    if version != _VERSION or not signed:
        raise AccessDenied("the token was not signed with this cluster's key")
    try:
        claims = json.loads(base64.urlsafe_b64decode(payload))
        operations = frozenset(Operation(name) for name in claims["operations"])
        tenant = str(claims["tenant"])
        valid_s, issued_s = float(claims["valid_s"]), float(claims["issued_s"])
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise AccessDenied(f"the token cannot be read: {error!r}") from error
    remaining_s = min(valid_s, issued_s + valid_s - wall_s)
    if remaining_s <= 0:
        raise AccessDenied(f"the token expired {-remaining_s:.0f} s ago; get a new one")
    return Capability(holder, operations, key_prefix(key, tenant), now_ns + int(remaining_s * S))


class Gate:
    """What a peer may do, decided when it greets."""

    def __init__(self, key: bytes | None, clock: Clock) -> None:
        """Without a key everybody who can connect may do everything."""
        self._key = key
        self._clock = clock

    def open(self, peer: str, greeting: protocol.Greet) -> Capability:
        """Raises AccessDenied. ``peer`` is a connection's, which says how it came."""
        if self._key is None or is_local(peer):
            return Capability(greeting.owner)
        wall_s, now_ns = time.time(), self._clock()
        return verified(self._key, greeting.token, greeting.owner, wall_s=wall_s, now_ns=now_ns)


def read_key(path: Path) -> bytes:
    """The cluster's key.

    Raises:
        ConfigError: it cannot be read, others can read it, or it is short.
    """
    try:
        status = path.stat()
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"store.key_file is {path}: {error.strerror}") from error
    if stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid not in (os.getuid(), 0):
        raise ConfigError(
            f"store.key_file {path} has mode {stat.S_IMODE(status.st_mode):o} and owner "
            f"{status.st_uid}; nobody else may read it: chmod 600"
        )
    if len(key) < KEY_BYTES_MIN:
        raise ConfigError(
            f"store.key_file {path} holds {len(key)} bytes, at least {KEY_BYTES_MIN} are needed: "
            "openssl rand -hex 32"
        )
    return key


def _mac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pdserve.kvstore.capability")
    parser.add_argument("--key-file", type=Path, required=True)
    parser.add_argument("--operations", nargs="+", type=Operation, default=[Operation.READ])
    parser.add_argument("--tenant", default="", help="whose blocks; all of them without")
    parser.add_argument("--valid-s", type=float, default=3600.0)
    given = parser.parse_args(arguments)
    try:
        key = read_key(given.key_file)
    except ConfigError as error:
        print(f"capability: {error}", file=sys.stderr)
        return 2
    print(
        mint(
            key,
            operations=given.operations,
            tenant=given.tenant,
            valid_s=given.valid_s,
            now_s=time.time(),
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
