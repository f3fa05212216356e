"""Which store nodes there are: a small table that outlives processes.

A node enters itself at its start, under an *epoch*: a number that only grows, cluster-wide. Of two
nodes that claim one id the higher epoch wins, and the lower one can neither come back nor remove
its successor's entry.

Two places to keep it, with the same behaviour: a file on local disk, or Redis. Neither is asked
while blocks move: losing it stops nobody who knows a node already, and every call fails within
``TIMEOUT_S`` with ``StoreUnavailable``.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pdserve.errors import ConfigError, StoreError, StoreUnavailable
from pdserve.ids import HostId, StoreId
from pdserve.messages import Address

if TYPE_CHECKING:
    pass

TIMEOUT_S = 1.0
"""For one call to either; both answer in about a millisecond."""


@dataclass(frozen=True, slots=True)
class Member:
    """One store node."""

    store_id: StoreId
    address: Address
    epoch: int


class Metadata(Protocol):
    """Every method raises ``StoreUnavailable`` when the table cannot be reached."""

    def next_epoch(self) -> int:
        """A number larger than all that were given before, from 1."""
        ...

    def register(self, member: Member) -> None:
        """Enter a node, or replace its entry of the same or an older epoch.

        Raises:
            StoreError: the entry there is younger.
        """
        ...

    def members(self) -> tuple[Member, ...]:
        """All of them, by id."""
        ...

    def remove(self, store_id: StoreId, epoch: int) -> None:
        """Remove a node's entry, unless it is younger than ``epoch``. Idempotent."""
        ...


class EmbeddedMetadata:
    """In a file on local disk, shared by the processes of one host."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._transaction() as table:
            table.execute("CREATE TABLE IF NOT EXISTS epoch (last INTEGER NOT NULL)")
            table.execute(
                "CREATE TABLE IF NOT EXISTS member"
                " (store_id TEXT PRIMARY KEY, epoch INTEGER NOT NULL, body TEXT NOT NULL)"
            )
            table.execute("INSERT INTO epoch SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM epoch)")

    def next_epoch(self) -> int:
        with self._transaction() as table:
            table.execute("UPDATE epoch SET last = last + 1")
            (epoch,) = table.execute("SELECT last FROM epoch").fetchone()
            return int(epoch)

    def register(self, member: Member) -> None:
        with self._transaction() as table:
            changed = table.execute(
                "INSERT INTO member VALUES (?, ?, ?) ON CONFLICT (store_id) DO UPDATE"
                " SET epoch = excluded.epoch, body = excluded.body"
                " WHERE member.epoch <= excluded.epoch",
                (member.store_id, member.epoch, _to_json(member)),
            ).rowcount
        if changed == 0:
            raise _too_old(member)

    def members(self) -> tuple[Member, ...]:
        with self._transaction() as table:
            rows = table.execute("SELECT body FROM member ORDER BY store_id").fetchall()
        return tuple(_from_json(body) for (body,) in rows)

    def remove(self, store_id: StoreId, epoch: int) -> None:
        with self._transaction() as table:
            table.execute("DELETE FROM member WHERE store_id = ? AND epoch <= ?", (store_id, epoch))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(
                sqlite3.connect(self._path, timeout=TIMEOUT_S, isolation_level=None)
            ) as table:
                table.execute("BEGIN IMMEDIATE")
                yield table
                table.execute("COMMIT")
        except sqlite3.Error as error:
            raise StoreUnavailable(f"cannot use the metadata in {self._path}: {error}") from error


_KEY_EPOCH = "pdserve:store:epoch"
_KEY_MEMBERS = "pdserve:store:members"
_KEY_EPOCHS = "pdserve:store:member-epochs"

# Compare and set in one step: two nodes may register at once.
_REGISTER = """
local known = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0')
if known > tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
"""
_REMOVE = """
local known = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0')
if known > tonumber(ARGV[2]) then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
return 1
"""


class RedisMetadata:
    """In Redis, shared by all hosts."""

    def __init__(self, url: str) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._error = redis.RedisError
        # Without user name and password, which do not belong into an error message.
        self._where = url.rpartition("@")[2]
        try:
            self._redis: redis.Redis = redis.Redis.from_url(
                url,
                decode_responses=True,
                socket_connect_timeout=TIMEOUT_S,
                socket_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),  # the caller decides whether waiting is worth it
            )
        except ValueError as error:
            raise ConfigError(f"store.redis_url is {self._where!r}: {error}") from error

    def next_epoch(self) -> int:
        with self._reachable():
            return int(self._answer(self._redis.incr(_KEY_EPOCH)))

    def register(self, member: Member) -> None:
        if not self._run(_REGISTER, member.store_id, member.epoch, _to_json(member)):
            raise _too_old(member)

    def members(self) -> tuple[Member, ...]:
        with self._reachable():
            bodies = self._answer(self._redis.hgetall(_KEY_MEMBERS))
        return tuple(_from_json(bodies[store_id]) for store_id in sorted(bodies))

    def remove(self, store_id: StoreId, epoch: int) -> None:
        self._run(_REMOVE, store_id, epoch)

    def _run(self, script: str, store_id: StoreId, epoch: int, *more: str) -> bool:
        with self._reachable():
            return bool(
                self._redis.eval(script, 2, _KEY_MEMBERS, _KEY_EPOCHS, store_id, str(epoch), *more)
            )

    @staticmethod
    def _answer(answer: Any) -> Any:
        """The library types every answer as one that may have to be awaited."""
        return answer

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise StoreUnavailable(f"cannot use Redis at {self._where}: {error}") from error


def _too_old(member: Member) -> StoreError:
    return StoreError(
        f"{member.store_id} is registered under a later epoch than {member.epoch}: a successor has "
        "taken over, this node must end"
    )


def _to_json(member: Member) -> str:
    return json.dumps(asdict(member))


def _from_json(body: str) -> Member:
    fields = json.loads(body)
    address = fields["address"]
    return Member(
        StoreId(fields["store_id"]),
        Address(HostId(address["host"]), address["unix_path"], address["tcp"]),
        fields["epoch"],
    )
