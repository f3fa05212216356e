"""Where membership is kept: the same behaviour in a file and in a real Redis."""

import dataclasses
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pdserve.errors import ConfigError, StaleEpoch, StoreError, StoreUnavailable
from pdserve.ids import HostId, StoreId
from pdserve.kvstore.masters.membership import Membership
from pdserve.kvstore.masters.metadata import (
    TIMEOUT_S,
    EmbeddedMetadata,
    Member,
    Metadata,
    RedisMetadata,
    Seat,
)
from pdserve.kvstore.masters.table_file import TableFile
from pdserve.messages import Address
from tests.integration.store_nodes import content, filler, keys_of, read, running_node
from tests.redis_server import RedisServer

ADDRESS = Address(HostId("h"), "/tmp/s.sock", "10.0.0.1:7")


def member(name: str, epoch: int) -> Member:
    return Member(StoreId(name), ADDRESS, epoch)


@pytest.fixture(params=["file", "redis"])
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Metadata]:
    """Each call is another process's view of the same table."""
    if request.param == "file":
        return lambda: EmbeddedMetadata(tmp_path / "metadata.sqlite")
    server: RedisServer = request.getfixturevalue("redis_server")
    return lambda: RedisMetadata(server.url)


def test_epochs_only_grow_whoever_asks(connect: Callable[[], Metadata]) -> None:
    one, two = connect(), connect()
    assert [one.next_epoch(), two.next_epoch(), one.next_epoch()] == [1, 2, 3]


def test_members_come_and_go(connect: Callable[[], Metadata]) -> None:
    one, two = connect(), connect()
    assert one.members() == ()
    one.register(member("b", 1))
    two.register(member("a", 2))
    assert two.members() == (member("a", 2), member("b", 1))
    two.remove(StoreId("b"), 1)
    two.remove(StoreId("b"), 1)
    assert one.members() == (member("a", 2),)


def test_an_older_epoch_neither_replaces_nor_removes_a_younger_one(
    connect: Callable[[], Metadata],
) -> None:
    table = connect()
    table.register(member("a", 5))
    with pytest.raises(StoreError, match="later epoch than 4"):
        table.register(member("a", 4))
    table.remove(StoreId("a"), 4)
    assert table.members() == (member("a", 5),)
    table.register(member("a", 6))
    assert table.members() == (member("a", 6),)


def test_the_seat_changes_hands_by_compare_and_set(connect: Callable[[], Metadata]) -> None:
    one, two = connect(), connect()
    assert one.seat() is None
    first = Seat("m1", ADDRESS, one.next_epoch())
    assert one.change_seat(None, first)
    assert not two.change_seat(None, Seat("m2", ADDRESS, two.next_epoch()))
    assert two.seat() == first
    renewed = dataclasses.replace(first, beat=1)
    assert one.change_seat(first, renewed)
    assert not two.change_seat(first, Seat("m2", ADDRESS, two.next_epoch())), "it was renewed"
    second = Seat("m2", ADDRESS, two.next_epoch())
    assert two.change_seat(renewed, second)
    assert not one.change_seat(renewed, dataclasses.replace(renewed, beat=2))
    assert one.seat() == second


def test_epochs_can_be_told_to_go_on_above_one(connect: Callable[[], Metadata]) -> None:
    table = connect()
    assert table.next_epoch(above=41) == 42
    assert table.next_epoch(above=7) == 43


def test_who_has_not_the_seat_expels_nobody(connect: Callable[[], Metadata]) -> None:
    table = connect()
    table.register(member("a", 1))
    assert not table.expel(StoreId("a"), 1, master_epoch=2), "nobody leads"
    old = Seat("m1", ADDRESS, 2)
    assert table.change_seat(None, old)
    assert table.change_seat(old, Seat("m2", ADDRESS, 3))
    assert not table.expel(StoreId("a"), 1, master_epoch=2)
    assert table.members() == (member("a", 1),)
    table.register(member("a", 4))
    assert table.expel(StoreId("a"), 1, master_epoch=3)
    assert table.members() == (member("a", 4),), "it has joined again meanwhile"
    assert table.expel(StoreId("a"), 4, master_epoch=3)
    assert table.members() == ()


def test_who_was_removed_joins_again_and_who_was_replaced_does_not(
    connect: Callable[[], Metadata],
) -> None:
    one, two = Membership(connect()), Membership(connect())
    first = one.join(StoreId("a"), ADDRESS)
    assert one.keep(first) == first
    two.leave(first)
    again = one.keep(first)
    assert again.epoch > first.epoch
    assert two.members() == (again,)
    later = dataclasses.replace(again, epoch=again.epoch + 7)  # of a table that was then lost
    restored = one.keep(later)
    assert restored.epoch > later.epoch
    after = two.join(StoreId("a"), ADDRESS)
    with pytest.raises(StaleEpoch, match="a successor has taken over"):
        one.keep(restored)
    assert two.members() == (after,)


def test_the_master_fences_predecessors(connect: Callable[[], Metadata]) -> None:
    one, two = Membership(connect()), Membership(connect())
    before = one.join(StoreId("a"), ADDRESS)
    after = two.join(StoreId("a"), ADDRESS)
    assert after.epoch > before.epoch
    assert one.check(StoreId("a"), after.epoch) == after
    with pytest.raises(StoreError, match=f"under epoch {after.epoch}, not under {before.epoch}"):
        one.check(StoreId("a"), before.epoch)
    one.leave(before)
    assert two.members() == (after,)
    two.leave(after)
    with pytest.raises(StoreError, match="is no member"):
        one.check(StoreId("a"), after.epoch)


def test_a_lost_redis_is_said_quickly_and_without_its_password(redis_server: RedisServer) -> None:
    table = RedisMetadata(f"redis://:secret@127.0.0.1:{redis_server.port}/0")
    redis_server.kill()
    calls: list[Callable[[], object]] = [
        table.next_epoch,
        table.members,
        lambda: table.register(member("a", 1)),
        lambda: table.remove(StoreId("a"), 1),
    ]
    began_s = time.monotonic()
    for call in calls:
        with pytest.raises(StoreUnavailable, match="cannot use Redis at 127") as caught:
            call()
        assert "secret" not in str(caught.value)
    assert time.monotonic() - began_s < len(calls) * TIMEOUT_S


def test_a_redis_that_hangs_is_given_up(redis_server: RedisServer) -> None:
    table = RedisMetadata(redis_server.url)
    table.members()
    os.kill(redis_server.process.pid, signal.SIGSTOP)
    with pytest.raises(StoreUnavailable):
        table.members()


def test_losing_redis_does_not_stop_a_live_node(redis_server: RedisServer, tmp_path: Path) -> None:
    with running_node(tmp_path, "--redis-url", redis_server.url) as node:
        (registered,) = RedisMetadata(redis_server.url).members()
        assert registered.address == node.address
        client = node.client("w")
        redis_server.kill()
        assert client.put(keys_of("a", 2), 0, filler("a")) == 2
        assert read(client, keys_of("a", 2)) == [content("a", 0), content("a", 1)]
        late = node.client("late", remote=True)
        assert read(late, keys_of("a", 1)) == [content("a", 0)]
        client.close()
        late.close()
        assert node.stop() == 0, "it could not take its entry back, and ends all the same"


def test_a_redis_address_that_is_none_is_a_mistake_in_the_settings() -> None:
    with pytest.raises(ConfigError, match="redis_url"):
        RedisMetadata("http://127.0.0.1:1")


def test_a_metadata_file_that_is_none_is_said(tmp_path: Path) -> None:
    path = tmp_path / "metadata.sqlite"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(StoreUnavailable, match="cannot use the metadata in"):
        EmbeddedMetadata(path)
    with pytest.raises(StoreUnavailable, match="cannot use the metadata in"):
        EmbeddedMetadata(tmp_path / "missing" / "metadata.sqlite")


def test_who_is_suspended_while_it_reads_stops_nobody(tmp_path: Path) -> None:
    path = tmp_path / "table.sqlite"
    suspended, other = (TableFile(path, "CREATE TABLE t (n)", timeout_s=0.1) for _ in range(2))
    with suspended.transaction(reads=True) as table:
        assert table.execute("SELECT count(*) FROM t").fetchone() == (0,)
        with other.transaction() as writing:
            writing.execute("INSERT INTO t VALUES (1)")
        TableFile(path, "CREATE TABLE t (n)", timeout_s=0.1)  # nor who opens it only now
        assert table.execute("SELECT count(*) FROM t").fetchone() == (0,), "one moment's view"
    with suspended.transaction(reads=True) as table:
        assert table.execute("SELECT count(*) FROM t").fetchone() == (1,)


def test_who_writes_too_long_is_not_waited_for_and_what_fails_leaves_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "table.sqlite"
    one, other = (TableFile(path, "CREATE TABLE t (n)", timeout_s=0.1) for _ in range(2))

    def both() -> None:
        with one.transaction() as table:
            table.execute("INSERT INTO t VALUES (1)")
            with other.transaction():
                pass

    with pytest.raises(sqlite3.OperationalError, match="locked"):
        both()
    for each in (one, other):
        with each.transaction() as table:
            assert table.execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_a_file_that_was_lost_is_begun_anew_by_all(tmp_path: Path) -> None:
    path = tmp_path / "metadata.sqlite"
    one, two = EmbeddedMetadata(path), EmbeddedMetadata(path)
    one.register(member("a", 1))
    path.unlink()
    assert two.members() == ()
    two.register(member("b", 1))
    assert one.members() == (member("b", 1),)
