"""Claims and views without a round trip: on the node's host, and what they fall back on."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pdserve.errors import BlockMissing, ChecksumMismatch, StoreUnavailable
from pdserve.ids import RequestId
from pdserve.kvstore import hazards
from pdserve.kvstore.client import StoreClient
from tests.integration.store_nodes import (
    BLOCK_BYTES,
    PATIENCE_S,
    Node,
    content,
    filler,
    flip,
    keys_of,
    read,
    running_node,
    wait_for,
)

Connect = Callable[..., StoreClient]
SLOT_COUNT = 16


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running_node(tmp_path_factory.mktemp("node"), slot_count=SLOT_COUNT) as node:
        yield node


@pytest.fixture
def connect(node: Node) -> Iterator[Connect]:
    """Makes clients; afterwards nothing may be held at the node by anybody."""
    with contextlib.ExitStack() as ending:

        def make(owner: str, **options: object) -> StoreClient:
            client = node.client(owner, **options)  # type: ignore[arg-type]
            ending.callback(client.close)
            return client

        yield make
    auditor = node.client("auditor")
    stat = wait_for(auditor, lambda stat: stat.connections == 1)
    assert (stat.slots_pinned, stat.slots_draining) == (0, 0)
    auditor.close()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


def test_a_node_that_is_stopped_is_not_needed_to_claim_and_read(tmp_path: Path) -> None:
    with running_node(tmp_path) as node:
        client = node.client("w")
        client.put(keys_of("a", 3), 0, filler("a"))
        os.kill(node.pid, signal.SIGSTOP)
        try:
            for _ in range(3):
                assert read(client, keys_of("a", 4)) == [content("a", index) for index in range(3)]
            claim = client.claim(keys_of("a", 3))
            assert [bytes(client.view(claim, 2))] == [content("a", 2)]
            client.release(claim)
            assert client.claim(keys_of("b", 3)).count == 0
        finally:
            os.kill(node.pid, signal.SIGCONT)
        assert client.counters["claims_local"] == 5
        assert wait_for(client, lambda stat: stat.slots_pinned == 0).claims == 0
        client.close()


def test_a_view_is_the_slot_itself_and_verified_once(connect: Connect, name: str) -> None:
    client = connect("w")
    client.put(keys_of(name, 2), 0, filler(name))
    claim = client.claim(keys_of(name, 2))
    first, second = client.view(claim, 1), client.view(claim, 1)
    assert first == second == content(name, 1)
    assert first.readonly
    at = [np.frombuffer(view, np.uint8).ctypes.data for view in (first, second)]
    assert at[0] == at[1], "nothing was copied"
    assert client.counters["blocks_verified"] == 1
    assert client.counters["bytes_restored"] == 2 * BLOCK_BYTES
    client.release(claim)
    client.release(claim)
    with pytest.raises(ValueError, match="released"):
        first[0]


def test_a_view_over_a_socket_is_a_copy(connect: Connect, name: str) -> None:
    client = connect("w", remote=True)
    client.put(keys_of(name, 1), 0, filler(name))
    claim = client.claim(keys_of(name, 1))
    assert client.view(claim, 0) == content(name, 0)
    assert client.view(claim, 0).readonly
    assert client.counters["claims_local"] == 0
    client.release(claim)


@pytest.mark.parametrize("kind", ["an array", "a slice"])
def test_a_claim_stays_while_something_uses_its_view(
    connect: Connect, name: str, kind: str
) -> None:
    client, writer = connect("r"), connect("w")
    writer.put(keys_of(name, 2), 0, filler(name))
    claim = client.claim(keys_of(name, 2))
    view = client.view(claim, 0)
    array = np.frombuffer(view, np.uint8) if kind == "an array" else view[:]
    for _ in range(2):
        with pytest.raises(BufferError, match="drop that first"):
            client.release(claim)
    writer.put(keys_of(f"{name} other", SLOT_COUNT), 0, filler("other"))
    assert array.tobytes() == content(name, 0)
    assert writer.stat().slots_pinned == 2
    del array
    client.release(claim)
    assert wait_for(writer, lambda stat: stat.slots_pinned == 0)


def test_a_claim_of_more_than_its_share_is_held_by_the_node(connect: Connect, name: str) -> None:
    client = connect("w")
    share = hazards.pins_max(SLOT_COUNT)
    client.put(keys_of(name, share + 1), 0, filler(name))
    large = client.claim(keys_of(name, share + 1))
    assert client.counters["claims_local"] == 0
    small = client.claim(keys_of(name, share))
    assert client.counters["claims_local"] == 1
    again = client.claim(keys_of(name, 1))
    assert client.counters["claims_local"] == 1, "its board is full"
    for claim in (large, small, again):
        assert client.view(claim, 0) == content(name, 0)
        client.release(claim)
    assert client.stat().slots_pinned == 0


def test_without_membarrier_claims_are_asked_for(
    connect: Connect, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hazards, "_membarrier", lambda command: -1)
    client = connect("w")
    client.put(keys_of(name, 2), 0, filler(name))
    claim = client.claim(keys_of(name, 2))
    assert client.view(claim, 1) == content(name, 1)
    assert client.stat().claims == 1
    client.release(claim)
    assert client.counters["claims_local"] == 0


def test_a_wrong_block_is_found_by_nobody_again(connect: Connect, name: str) -> None:
    connect("w", corrupt=flip).put(keys_of(name, 2), 0, filler(name))
    reader, other = connect("r"), connect("o")
    claim, others = reader.claim(keys_of(name, 2)), other.claim(keys_of(name, 2))
    with pytest.raises(ChecksumMismatch):
        reader.view(claim, 0)
    assert reader.counters["checksum_failures"] == 1
    assert reader.claim(keys_of(name, 2)).count == 0
    with pytest.raises(BlockMissing):
        other.view(others, 0)
    for client, held in ((reader, claim), (other, others)):
        client.release(held)
    assert wait_for(reader, lambda stat: stat.slots_quarantined == stat.slots_draining == 0)
    assert connect("w2").put(keys_of(name, 2), 0, filler(name)) == 2
    assert read(reader, keys_of(name, 2)) == [content(name, 0), content(name, 1)]


def test_a_block_that_is_right_stays_whatever_a_reader_says_of_it(
    connect: Connect, name: str
) -> None:
    """The reader's own memory may be to blame."""
    connect("w").put(keys_of(name, 2), 0, filler(name))
    reader = connect("r", corrupt=flip)
    claim = reader.claim(keys_of(name, 2))
    with pytest.raises(ChecksumMismatch):
        reader.read(claim, 0, memoryview(bytearray(reader.block_bytes)))
    reader.release(claim)
    assert reader.counters["claims_local"] == 1
    assert read(connect("o"), keys_of(name, 2)) == [content(name, 0), content(name, 1)]


def test_a_fetch_is_a_claim_of_ones_own_a_read_and_a_release(connect: Connect, name: str) -> None:
    connect("w").put(keys_of(name, 3), 0, filler(name))
    reader = connect("r")
    outs = [memoryview(bytearray(reader.block_bytes)) for _ in range(3)]
    delivered: list[int] = []
    assert reader.fetch(keys_of(name, 4), outs, first=1, done=delivered.append) == 2
    assert [bytes(out) for out in outs[:2]] == [content(name, 1), content(name, 2)]
    assert delivered == [0, 1]
    assert (reader.counters["claims_local"], reader.counters["blocks_restored"]) == (1, 2)
    assert reader.stat().slots_pinned == 0


def test_a_ticket_that_waits_is_granted_when_a_reader_lets_go(connect: Connect, name: str) -> None:
    reader, writer = connect("r"), connect("w")
    reader.put(keys_of(name, 2), 0, filler(name))
    claim = reader.claim(keys_of(name, 2))
    granted = []

    def wait() -> None:
        granted.append(
            writer.open_ticket(
                RequestId("r"), 0, reader="*", block_count=SLOT_COUNT, wait_ms=15_000
            )
        )

    waiting = threading.Thread(target=wait)
    waiting.start()
    auditor = connect("a")
    wait_for(auditor, lambda stat: stat.tickets_queued == 1)
    reader.release(claim)  # tells the node, and waits for nothing
    waiting.join(PATIENCE_S)
    assert len(granted) == 1
    writer.abort(granted[0])


def test_the_node_learns_what_prompts_ask_for(tmp_path: Path) -> None:
    """Goal: what is claimed without asking counts as used: it goes down to the disk as a second
    touch, and is evicted after what was not asked for."""
    ssd = ("--ssd-directory", str(tmp_path / "ssd"), "--ssd-bytes", str(1 << 30))
    with running_node(tmp_path, *ssd, "--eviction", "lru", slot_count=4) as node:
        client = node.client("w")
        for name in ("used", "idle"):
            client.put(keys_of(name, 2), 0, filler(name))
        client.release(client.claim(keys_of("used", 2)))
        assert client.counters["claims_local"] == 1
        wait_for(client, lambda stat: stat.ssd["blocks"] == 2)
        client.put(keys_of("new", 2), 0, filler("new"))
        assert client.claim(keys_of("used", 2)).count == 2
        assert client.counters["claims_local"] == 2
        assert client.claim(keys_of("idle", 2)).count == 0
        assert client.counters["claims_local"] == 2, "what the disk may have is asked for"
        client.close()


def test_a_claim_after_the_nodes_death_is_refused(tmp_path: Path) -> None:
    with running_node(tmp_path) as node:
        client = node.client("w")
        client.put(keys_of("a", 1), 0, filler("a"))
        os.kill(node.pid, signal.SIGKILL)
        node.process.wait(PATIENCE_S)
        with pytest.raises(StoreUnavailable):
            client.claim(keys_of("a", 1))
        client.close()
