"""Masters and nodes as real processes: death, suspension, replacement, in a file and in Redis."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pdserve.errors import StoreUnavailable
from pdserve.ids import StoreId
from pdserve.kvstore.admin_client import StoreAdmin
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.locations import RemotePrefixes
from pdserve.kvstore.masters.client import MasterClient
from pdserve.kvstore.masters.metadata import EmbeddedMetadata, Metadata, RedisMetadata
from pdserve.kvstore.masters.protocol import MasterReport, Vacated
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id
from tests.integration.store_masters import (
    DEADLINE_S,
    MasterProcess,
    leader_of,
    running_master,
    until,
)
from tests.integration.store_nodes import (
    BLOCK_BYTES,
    ELSEWHERE,
    Node,
    content,
    filler,
    keys_of,
    read,
    running_node,
)
from tests.redis_server import RedisServer, running_redis

BLOCKS = 8


@dataclass
class Cluster:
    masters: tuple[MasterProcess, MasterProcess]
    nodes: tuple[Node, Node]
    metadata: Metadata
    redis: RedisServer | None

    def split(self) -> tuple[MasterProcess, MasterProcess]:
        """Who leads, and who stands by."""
        leader = leader_of(*self.masters)
        (standby,) = (each for each in self.masters if each is not leader)
        return leader, standby

    def client(self) -> MasterClient:
        return MasterClient([each.tcp for each in self.masters], name="test")

    def whole(self, locations: int, *, led_by: str | None = None) -> MasterReport:
        """The leader's report, once it knows of so many locations."""
        client = self.client()

        def ask() -> MasterReport | None:
            try:
                report = client.report()
            except StoreUnavailable:
                return None
            as_expected = report.is_whole and report.locations == locations
            return report if as_expected and led_by in (None, report.master) else None

        try:
            return until(ask, f"{locations} locations")
        finally:
            client.close()


def _kept(*, first: str | None) -> pytest.MarkDecorator:
    """Where the metadata is kept; a test is run by default with ``first`` alone."""
    places = [
        pytest.param(place, marks=() if place == first else pytest.mark.slow)
        for place in ("file", "redis")
    ]
    return pytest.mark.parametrize("cluster", places, indirect=True)


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """Two masters and two nodes; "a" has ``BLOCKS`` blocks of "hot", "b" as many of "cold"."""
    with contextlib.ExitStack() as ending:
        redis = None
        if request.param == "redis":
            redis = ending.enter_context(running_redis(tmp_path))
            where = ("--redis-url", redis.url)
            metadata: Metadata = RedisMetadata(redis.url)
        else:
            where = ("--metadata", str(tmp_path / "members.sqlite"))
            metadata = EmbeddedMetadata(tmp_path / "members.sqlite")
        masters = tuple(
            ending.enter_context(running_master(tmp_path, name, *where)) for name in ("m1", "m2")
        )
        nodes = []
        for name, prompt in (("a", "hot"), ("b", "cold")):
            (tmp_path / name).mkdir()
            node = ending.enter_context(
                running_node(
                    tmp_path / name,
                    *("--store-id", f"store-{name}", "--masters", *(each.tcp for each in masters)),
                    slot_count=4 * BLOCKS,
                )
            )
            client = node.client("w")
            assert client.put(keys_of(prompt, BLOCKS), 0, filler(prompt)) == BLOCKS
            client.close()
            nodes.append(node)
        yield Cluster((masters[0], masters[1]), (nodes[0], nodes[1]), metadata, redis)


def suspend(master: MasterProcess, metadata: Metadata) -> None:
    """Stop it, but not while it has the metadata's file locked."""

    def try_it() -> bool:
        os.kill(master.process.pid, signal.SIGSTOP)
        try:
            metadata.next_epoch()
        except StoreUnavailable:
            os.kill(master.process.pid, signal.SIGCONT)
            return False
        return True

    until(try_it, "a moment without a lock")


def located(cluster: Cluster, prompt: str) -> list[tuple[str, int]]:
    client = cluster.client()
    try:
        found = client.locate(keys_of(prompt, BLOCKS))
    except StoreUnavailable:
        return []
    finally:
        client.close()
    return [(each.store_id, each.count) for each in found]


@_kept(first="file")
def test_a_killed_master_is_replaced_and_every_block_is_found_again(cluster: Cluster) -> None:
    leader, standby = cluster.split()
    before = cluster.whole(2 * BLOCKS, led_by=leader.name)
    assert located(cluster, "hot") == [("store-a", BLOCKS)]
    reader = cluster.nodes[0].client("r")
    leader.process.kill()
    assert read(reader, keys_of("hot", 2)) == [content("hot", 0), content("hot", 1)]
    after = cluster.whole(2 * BLOCKS, led_by=standby.name)
    assert after.epoch > before.epoch
    assert [each.epoch for each in after.members] == [each.epoch for each in before.members]
    assert located(cluster, "hot") == [("store-a", BLOCKS)]
    assert located(cluster, "cold") == [("store-b", BLOCKS)]
    reader.close()


@_kept(first="redis")
def test_a_suspended_leader_that_wakes_up_is_fenced(cluster: Cluster) -> None:
    leader, standby = cluster.split()
    before = cluster.whole(2 * BLOCKS, led_by=leader.name)
    suspend(leader, cluster.metadata)
    try:
        after = cluster.whole(2 * BLOCKS, led_by=standby.name)
    finally:
        os.kill(leader.process.pid, signal.SIGCONT)
    assert after.epoch > before.epoch
    until(lambda: (said := leader.report()) is not None and said.epoch == 0, "its stepping down")
    seat = cluster.metadata.seat()
    assert seat is not None
    assert (seat.master, seat.epoch) == (standby.name, after.epoch)


@_kept(first=None)
def test_what_comes_goes_and_dies_is_followed(cluster: Cluster) -> None:
    cluster.whole(2 * BLOCKS)
    client = cluster.nodes[1].client("w")
    client.put(keys_of("hot", 3), 0, filler("hot"))
    cluster.whole(2 * BLOCKS + 3)
    assert located(cluster, "hot") == [("store-a", BLOCKS), ("store-b", 3)]
    client.close()
    cluster.nodes[0].process.kill()
    cluster.whole(BLOCKS + 3)
    assert located(cluster, "hot") == [("store-b", 3)]
    assert [each.store_id for each in cluster.metadata.members()] == ["store-b"]


@_kept(first=None)
def test_a_suspended_node_is_taken_for_dead_and_joins_again(cluster: Cluster) -> None:
    before = {str(each.store_id): each.epoch for each in cluster.whole(2 * BLOCKS).members}
    node = cluster.nodes[0]
    os.kill(node.pid, signal.SIGSTOP)
    try:
        until(
            lambda: [each.store_id for each in cluster.metadata.members()] == ["store-b"],
            "its removal",
        )
    finally:
        os.kill(node.pid, signal.SIGCONT)
    after = {str(each.store_id): each.epoch for each in cluster.whole(2 * BLOCKS).members}
    assert after["store-a"] > before["store-a"]
    assert after["store-b"] == before["store-b"]
    cluster.metadata.remove(StoreId("store-a"), before["store-a"])
    assert len(cluster.metadata.members()) == 2, "its old epoch has no say any more"


def remote(cluster: Cluster) -> RemotePrefixes:
    def connect(address: Address, timeout_s: float) -> StoreClient:
        return StoreClient(address, host=ELSEWHERE, owner="r", connect_timeout_s=timeout_s)

    return RemotePrefixes(cluster.client(), connect, own=lambda: None)


def fetched(prefixes: RemotePrefixes, prompt: str) -> list[bytes]:
    found: list[bytes] = []
    count = prefixes.fetch(
        keys_of(prompt, BLOCKS),
        0,
        BLOCKS,
        lambda _, data: found.append(bytes(data)),
        block_bytes=BLOCK_BYTES,
        deadline_s=20.0,
    )
    assert count == len(found)
    return found


@_kept(first=None)
def test_a_prefix_is_read_from_whoever_has_it_with_or_without_its_first_holder(
    cluster: Cluster,
) -> None:
    expected = [content("hot", index) for index in range(BLOCKS)]
    client = cluster.nodes[1].client("w")
    client.put(keys_of("hot", BLOCKS), 0, filler("hot"))
    client.close()
    cluster.whole(3 * BLOCKS)
    prefixes = remote(cluster)
    assert fetched(prefixes, "hot") == expected
    cluster.nodes[0].process.kill()
    cluster.nodes[0].process.wait()
    assert fetched(prefixes, "hot") == expected, "within one call, from the other one"
    prefixes.close()


@_kept(first=None)
def test_without_a_master_there_is_a_miss_and_stores_go_on(cluster: Cluster) -> None:
    cluster.whole(2 * BLOCKS)
    prefixes = remote(cluster)
    for master in cluster.masters:
        master.process.kill()
    for master in cluster.masters:
        master.process.wait()
    assert fetched(prefixes, "hot") == []
    client = cluster.nodes[0].client("r")
    assert read(client, keys_of("hot", 2)) == [content("hot", 0), content("hot", 1)]
    assert client.put(keys_of("new", 2), 0, filler("new")) == 2
    client.close()
    prefixes.close()


@_kept(first="file")
def test_a_host_is_vacated_and_nothing_is_lost(cluster: Cluster) -> None:
    cluster.whole(2 * BLOCKS)
    admin = StoreAdmin(cluster.nodes[0].address, host=local_host_id())
    admin.set_draining(True)
    client = cluster.client()
    vacated = client.vacate(StoreId("store-a"), deadline_s=60.0)
    assert (vacated.moved, vacated.left) == (BLOCKS, 0)
    cluster.whole(3 * BLOCKS)
    cluster.nodes[0].process.kill()
    reader = cluster.nodes[1].client("r")
    assert read(reader, keys_of("hot", BLOCKS)) == [content("hot", i) for i in range(BLOCKS)]
    reader.close()
    client.close()
    admin.close()


@_kept(first="file")
def test_a_full_host_takes_what_is_worth_more_also_what_comes_late(cluster: Cluster) -> None:
    """Of "a", which is emptied: "hot" is younger than all but the last block of "b", which is full;
    "late" is written while the drain goes on; "first" is older than all."""
    source, target = cluster.nodes
    writer, other = source.client("w"), target.client("w")
    filled = 4 * BLOCKS - BLOCKS  # of "b", beside "cold"
    assert other.put(keys_of("own", filled - 1), 0, filler("own")) == filled - 1
    assert other.put(keys_of("last", 1), 0, filler("last")) == 1
    cluster.whole(BLOCKS + 4 * BLOCKS)
    assert writer.put(keys_of("young", 2), 0, filler("young")) == 2
    cluster.whole(2 + BLOCKS + 4 * BLOCKS)
    admin, client = StoreAdmin(source.address, host=local_host_id()), cluster.client()
    vacated: list[Vacated] = []
    drain = threading.Thread(
        target=lambda: vacated.append(client.vacate(StoreId("store-a"), deadline_s=DEADLINE_S))
    )

    def fill(index: int, out: memoryview) -> None:
        if index == 0:
            admin.set_draining(True)
            drain.start()
            until(lambda: ("store-b", 2) in located(cluster, "young"), "the first copies")
        filler("late")(index, out)

    assert writer.put(keys_of("late", 3), 0, fill) == 3
    drain.join(DEADLINE_S)
    (said,) = vacated
    assert (said.moved, said.left, said.outweighed) == (5, BLOCKS, BLOCKS), said
    for prompt, count in (("young", 2), ("late", 3), ("last", 1)):
        assert read(other, keys_of(prompt, count)) == [content(prompt, i) for i in range(count)]
    assert len(read(other, keys_of("cold", BLOCKS))) == BLOCKS - 5, "the oldest there went"
    for each in (writer, other, admin, client):
        each.close()


@_kept(first=None)
def test_a_prefix_that_is_read_often_gets_a_second_home(cluster: Cluster) -> None:
    cluster.whole(2 * BLOCKS)
    client = cluster.client()
    client.locate(keys_of("hot", BLOCKS), reads=100)
    assert cluster.whole(3 * BLOCKS).replicas == BLOCKS
    assert located(cluster, "hot") == [("store-a", BLOCKS), ("store-b", BLOCKS)]
    client.close()


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["redis"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_losing_redis_stops_neither_the_leader_nor_a_node(
    cluster: Cluster, number: signal.Signals
) -> None:
    leader, _ = cluster.split()
    cluster.whole(2 * BLOCKS, led_by=leader.name)
    assert cluster.redis is not None
    os.kill(cluster.redis.process.pid, number)
    client = cluster.nodes[1].client("w")
    assert client.put(keys_of("new", 3), 0, filler("new")) == 3
    client.close()
    cluster.whole(2 * BLOCKS + 3, led_by=leader.name)
    assert located(cluster, "new") == [("store-b", 3)]
    assert fetched(remote(cluster), "hot") == [content("hot", i) for i in range(BLOCKS)]


@pytest.mark.slow
def test_a_node_serves_before_there_is_a_master_and_joins_when_there_is_one(
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with running_node(tmp_path, "--masters", f"127.0.0.1:{port}") as node:
        client = node.client("w")
        assert client.put(keys_of("early", 2), 0, filler("early")) == 2
        where = ("--metadata", str(tmp_path / "members.sqlite"), "--tcp-port", str(port))
        with running_master(tmp_path, "m1", *where) as master:

            def heard() -> bool:
                report = master.report()
                return report is not None and report.is_whole and report.locations == 2

            until(heard, "the node's blocks")
        client.close()


@pytest.mark.slow
def test_what_a_killed_node_had_is_found_again_at_its_next(tmp_path: Path) -> None:
    where = ("--metadata", str(tmp_path / "members.sqlite"))
    with running_master(tmp_path, "m1", *where) as master:
        arguments = ("--store-id", "phoenix", "--masters", master.tcp)

        def heard(after: int, blocks: int) -> MasterReport:
            def ask() -> MasterReport | None:
                report = master.report()
                if report is None or not report.is_whole or report.locations != blocks:
                    return None
                return report if report.members[0].epoch > after else None

            return until(ask, f"{blocks} blocks under a later epoch than {after}")

        with running_node(tmp_path, *arguments) as node:
            client = node.client("w")
            assert client.put(keys_of("hot", BLOCKS), 0, filler("hot")) == BLOCKS
            client.close()
            before = heard(0, BLOCKS)
        with running_node(tmp_path, *arguments) as node:
            after = heard(before.members[0].epoch, BLOCKS)
            assert len(after.members) == 1
            (holder,) = master.client().locate(keys_of("hot", BLOCKS))
            assert (holder.store_id, holder.count) == ("phoenix", BLOCKS)
            reader = node.client("r", remote=True)
            assert read(reader, keys_of("hot", 2)) == [content("hot", 0), content("hot", 1)]
            reader.close()
