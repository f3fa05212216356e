"""The disk below a node's arena: what goes down, comes up, and is there after ``kill -9``."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.errors import StoreUnavailable
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.node import main
from pdserve.kvstore.protocol import ClaimPrefix
from tests.integration.store_nodes import (
    PATIENCE_S,
    Node,
    content,
    filler,
    keys_of,
    read,
    running_node,
    wait_for,
)

SLOT_COUNT = 8
WHOLE = 6  # blocks of a chain


def ssd(directory: Path) -> tuple[str, ...]:
    return "--ssd-directory", str(directory / "ssd"), "--ssd-bytes", str(1 << 30)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path, *ssd(tmp_path), slot_count=SLOT_COUNT) as node:
        yield node


def put(client: StoreClient, name: str) -> None:
    assert client.put(keys_of(name, WHOLE), 0, filler(name)) == WHOLE


def whole(name: str) -> list[bytes]:
    return [content(name, index) for index in range(WHOLE)]


def find(client: StoreClient, name: str, *, below: int) -> None:
    """A second touch, and the way down: until the blocks are there, and held for it no more."""
    assert read(client, keys_of(name, WHOLE)) == whole(name)
    wait_for(client, lambda stat: stat.ssd["blocks"] == below and stat.slots_pinned == 0)


def test_what_is_used_again_outlives_the_arena_and_the_node(tmp_path: Path, node: Node) -> None:
    client = node.client("w")
    put(client, "a")
    find(client, "a", below=WHOLE)
    put(client, "b")  # used once: not worth the disk
    put(client, "c")
    assert client.stat().ssd["blocks"] == WHOLE
    assert read(client, keys_of("a", WHOLE)) == whole("a")
    assert client.stat().ssd["read"] == WHOLE
    client.close()
    node.process.send_signal(signal.SIGKILL)
    node.process.wait(PATIENCE_S)

    with running_node(tmp_path, *ssd(tmp_path), slot_count=SLOT_COUNT) as successor:
        client = successor.client("w")
        changes = client.changes(0)
        assert sorted(changes.added) == sorted(keys_of("a", WHOLE))
        assert changes.complete
        for remote in (False, True):
            reader = successor.client("r", remote=remote)
            assert read(reader, keys_of("a", WHOLE)) == whole("a")
            reader.close()
        assert client.stat().ssd["read"] == WHOLE, "the second reader found it in the arena"
        client.close()


def test_a_fetch_without_a_claim_comes_up_from_the_disk_too(node: Node) -> None:
    client, remote = node.client("w"), node.client("r", remote=True)
    put(client, "a")
    find(client, "a", below=WHOLE)
    put(client, "b")
    put(client, "c")
    assert client.stat().ssd["read"] == 0
    outs = [memoryview(bytearray(client.block_bytes)) for _ in range(WHOLE)]
    assert remote.fetch(keys_of("a", WHOLE), outs) == WHOLE
    assert [bytes(out) for out in outs] == whole("a")
    stat = wait_for(client, lambda stat: stat.slots_pinned == 0)
    assert stat.ssd["read"] > 0
    client.close()
    remote.close()


def test_what_leaves_the_arena_alone_is_still_stored(node: Node) -> None:
    client = node.client("w")
    put(client, "a")
    find(client, "a", below=WHOLE)
    before = client.changes(0)
    put(client, "b")
    put(client, "c")
    after = client.changes(before.sequence)
    assert not set(after.removed) & set(keys_of("a", WHOLE))
    assert not set(after.added) & set(keys_of("a", WHOLE))
    assert set(keys_of("c", WHOLE)) <= set(after.added)
    client.close()


def test_a_wrong_block_on_the_disk_ends_the_prefix_there(tmp_path: Path, node: Node) -> None:
    client = node.client("w")
    put(client, "a")
    find(client, "a", below=WHOLE)
    put(client, "b")
    put(client, "c")  # "a" is on the disk alone
    (segment,) = [path for path in (tmp_path / "ssd").glob("*.seg") if path.stat().st_size > 8192]
    padded_bytes = 8192
    with segment.open("r+b") as raw:
        raw.seek(2 * 4096 + 3 * padded_bytes + 1000)
        raw.write(b"\xff\x00\xff")
    before = client.changes(0)
    assert read(client, keys_of("a", WHOLE)) == whole("a")[:3]
    stat = client.stat()
    assert (stat.ssd["wrong"], stat.ssd["read"]) == (1, 3)
    assert keys_of("a", WHOLE)[3] in client.changes(before.sequence).removed
    put(client, "a")  # computed again
    assert read(client, keys_of("a", WHOLE)) == whole("a")
    client.close()


def test_a_reader_that_dies_while_blocks_come_up_leaves_nothing(node: Node) -> None:
    client, other = node.client("w"), node.client("o")
    put(client, "a")
    find(client, "a", below=WHOLE)
    for name in ("b", "c"):
        put(client, name)
    at_rest = other.stat().connections
    for _ in range(20):
        reader = node.client("r")
        with contextlib.suppress(StoreUnavailable):  # it does not wait for the answer
            reader._call(ClaimPrefix(tuple(keys_of("a", WHOLE))), timeout_s=1e-4)
        reader.close()
    wait_for(other, lambda stat: stat.connections == at_rest)
    assert read(other, keys_of("a", WHOLE)) == whole("a")
    wait_for(other, lambda stat: stat.slots_reserved == stat.slots_pinned == stat.claims == 0)
    client.close()
    other.close()


def test_two_nodes_do_not_share_a_log(
    tmp_path: Path, node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--directory", str(tmp_path / "sockets"), "--shared", str(tmp_path / "shared")]
    options += ["--arena-bytes", "100000", "--block-bytes", "4128", *ssd(tmp_path)]
    assert main(options) == 2
    assert "another store node has" in capsys.readouterr().err
