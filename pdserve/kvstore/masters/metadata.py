"""Which store nodes there are, and who leads them: a small table that outlives processes.

A node enters itself at its start, under an *epoch*: a number that only grows, cluster-wide. Of two
nodes that claim one id the higher epoch wins, and the lower one can neither come back nor remove
its successor's entry.

One *seat* is there for whoever leads: it changes hands, and is renewed, by compare-and-set alone
(see ``election``).

Two places to keep it, with the same behaviour: a file on local disk, or Redis. Neither is asked
while blocks move: losing it stops nobody who knows a node already, and every call fails within
``TIMEOUT_S`` with ``StoreUnavailable``. A third one, ``client.MasterMetadata``, asks a
master for what it has, from hosts that reach neither.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pdserve.errors import ConfigError, StaleEpoch, StoreUnavailable
from pdserve.ids import HostId, StoreId
from pdserve.kvstore.masters.table_file import TableFile
from pdserve.messages import Address

TIMEOUT_S = 1.0
"""For one call to either; both answer in about a millisecond."""


@dataclass(frozen=True, slots=True)
class Member:
    """One store node."""

    store_id: StoreId
    address: Address
    epoch: int


@dataclass(frozen=True, slots=True)
class Seat:
    """Who leads: a master, under an epoch that is larger than those of all who led before."""

    master: str
    address: Address
    epoch: int
    beat: int = 0  # grows with each renewal; who watches it sees a leader that lives
    is_vacant: bool = False  # the leader has left; whoever comes first may have it


class Metadata(Protocol):
    """Every method raises ``StoreUnavailable`` when the table cannot be reached."""

    def next_epoch(self, *, above: int = 0) -> int:
        """A number larger than all that were given before, and than ``above``; from 1."""
        ...

    def register(self, member: Member) -> None:
        """Enter a node, or replace its entry of the same or an older epoch.

        Raises:
            StaleEpoch: the entry there is younger.
        """
        ...

    def members(self) -> tuple[Member, ...]:
        """All of them, by id."""
        ...

    def remove(self, store_id: StoreId, epoch: int) -> None:
        """Remove a node's entry, unless it is younger than ``epoch``. Idempotent."""
        ...

    def expel(self, store_id: StoreId, epoch: int, *, master_epoch: int) -> bool:
        """``remove`` by the master that leads under ``master_epoch``; False, and nothing happens,
        where another one has the seat."""
        ...

    def seat(self) -> Seat | None:
        """None: nobody has ever led."""
        ...

    def change_seat(self, seen: Seat | None, after: Seat) -> bool:
        """Put ``after`` in the place of ``seen``, if that is what is there. Whether it was."""
        ...


_SCHEMA = """
CREATE TABLE IF NOT EXISTS epoch (last INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS member
    (store_id TEXT PRIMARY KEY, epoch INTEGER NOT NULL, body TEXT NOT NULL);
INSERT INTO epoch SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM epoch);
CREATE TABLE IF NOT EXISTS seat (only INTEGER PRIMARY KEY CHECK (only = 1), body TEXT NOT NULL)
"""


class EmbeddedMetadata:
    """In a file on local disk, shared by the processes of one host (``table_file``)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._said():
            self._file = TableFile(path, _SCHEMA, timeout_s=TIMEOUT_S)

    def next_epoch(self, *, above: int = 0) -> int:
        with self._transaction() as table:
            table.execute("UPDATE epoch SET last = max(last, ?) + 1", (above,))
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
        with self._transaction(reads=True) as table:
            rows = table.execute("SELECT body FROM member ORDER BY store_id").fetchall()
        return tuple(_from_json(body) for (body,) in rows)

    def remove(self, store_id: StoreId, epoch: int) -> None:
        with self._transaction() as table:
            table.execute("DELETE FROM member WHERE store_id = ? AND epoch <= ?", (store_id, epoch))

    def expel(self, store_id: StoreId, epoch: int, *, master_epoch: int) -> bool:
        with self._transaction() as table:
            row = table.execute("SELECT body FROM seat").fetchone()
            if row is None or _seat_from_json(row[0]).epoch != master_epoch:
                return False
            table.execute("DELETE FROM member WHERE store_id = ? AND epoch <= ?", (store_id, epoch))
        return True

    def seat(self) -> Seat | None:
        with self._transaction(reads=True) as table:
            row = table.execute("SELECT body FROM seat").fetchone()
        return None if row is None else _seat_from_json(row[0])

    def change_seat(self, seen: Seat | None, after: Seat) -> bool:
        with self._transaction() as table:
            if seen is None:
                return _changed(
                    table.execute("INSERT OR IGNORE INTO seat VALUES (1, ?)", (_to_json(after),))
                )
            return _changed(
                table.execute(
                    "UPDATE seat SET body = ? WHERE body = ?", (_to_json(after), _to_json(seen))
                )
            )

    @contextlib.contextmanager
    def _transaction(self, *, reads: bool = False) -> Iterator[sqlite3.Connection]:
        with self._said(), self._file.transaction(reads=reads) as table:
            yield table

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreUnavailable(f"cannot use the metadata in {self._path}: {error}") from error


_KEY_EPOCH = "pdserve:store:epoch"
_KEY_MEMBERS = "pdserve:store:members"
_KEY_EPOCHS = "pdserve:store:member-epochs"
_KEY_SEAT = "pdserve:store:seat"

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
_EXPEL = """
local seat = redis.call('GET', KEYS[3])
if not seat or cjson.decode(seat).epoch ~= tonumber(ARGV[3]) then return 0 end
local known = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0')
if known <= tonumber(ARGV[2]) then
    redis.call('HDEL', KEYS[1], ARGV[1])
    redis.call('HDEL', KEYS[2], ARGV[1])
end
return 1
"""
_NEXT_EPOCH = """
local last = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[1])) + 1
redis.call('SET', KEYS[1], string.format('%d', last))
return last
"""
_CHANGE_SEAT = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
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

    def next_epoch(self, *, above: int = 0) -> int:
        with self._reachable():
            return int(self._answer(self._redis.eval(_NEXT_EPOCH, 1, _KEY_EPOCH, str(above))))

    def register(self, member: Member) -> None:
        if not self._run(_REGISTER, member.store_id, member.epoch, _to_json(member)):
            raise _too_old(member)

    def members(self) -> tuple[Member, ...]:
        with self._reachable():
            bodies = self._answer(self._redis.hgetall(_KEY_MEMBERS))
        return tuple(_from_json(bodies[store_id]) for store_id in sorted(bodies))

    def remove(self, store_id: StoreId, epoch: int) -> None:
        self._run(_REMOVE, store_id, epoch)

    def expel(self, store_id: StoreId, epoch: int, *, master_epoch: int) -> bool:
        return self._run(_EXPEL, store_id, epoch, str(master_epoch))

    def seat(self) -> Seat | None:
        with self._reachable():
            body = self._answer(self._redis.get(_KEY_SEAT))
        return None if body is None else _seat_from_json(body)

    def change_seat(self, seen: Seat | None, after: Seat) -> bool:
        before = "" if seen is None else _to_json(seen)
        with self._reachable():
            return bool(self._redis.eval(_CHANGE_SEAT, 1, _KEY_SEAT, before, _to_json(after)))

    def _run(self, script: str, store_id: StoreId, epoch: int, *more: str) -> bool:
        with self._reachable():
            return bool(
                self._redis.eval(
                    script,
                    3,
                    *(_KEY_MEMBERS, _KEY_EPOCHS, _KEY_SEAT),
                    *(store_id, str(epoch), *more),
                )
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


def _too_old(member: Member) -> StaleEpoch:
    return StaleEpoch(
        f"{member.store_id} is registered under a later epoch than {member.epoch}: a successor has "
        "taken over, this node must end"
    )


def _changed(cursor: sqlite3.Cursor) -> bool:
    return cursor.rowcount == 1


def _to_json(entry: Member | Seat) -> str:
    """Equal entries have equal texts: ``change_seat`` compares them."""
    return json.dumps(asdict(entry), sort_keys=True)


def _from_json(body: str) -> Member:
    fields = json.loads(body)
    return Member(StoreId(fields["store_id"]), _address(fields["address"]), fields["epoch"])


def _seat_from_json(body: str) -> Seat:
    fields = json.loads(body)
    return Seat(**{**fields, "address": _address(fields["address"])})


def _address(fields: dict[str, str]) -> Address:
    return Address(HostId(fields["host"]), fields["unix_path"], fields["tcp"])
