"""A real store node and its clients: the same promises through shared memory and over TCP."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdserve.errors import (
    BlockMissing,
    ChecksumMismatch,
    FrameError,
    OutOfBlocks,
    StoreUnavailable,
    TicketGone,
)
from pdserve.ids import RequestId, StoreId
from pdserve.kvstore.client import StoreClient
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id
from tests.integration.store_nodes import (
    BLOCK_BYTES,
    Node,
    content,
    filler,
    flip,
    keys_of,
    read,
    running_node,
    wait_for,
)

REQUEST = RequestId("r-1")
OTHER = RequestId("s")
Connect = Callable[..., StoreClient]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running_node(tmp_path_factory.mktemp("node")) as node:
        yield node


@pytest.fixture
def connect(node: Node) -> Iterator[Connect]:
    """Makes clients; afterwards nothing may be held at the node by anybody."""
    clients = []

    def make(owner: str, **options: object) -> StoreClient:
        clients.append(node.client(owner, **options))  # type: ignore[arg-type]
        return clients[-1]

    yield make
    for client in clients:
        client.close()
    with_nothing = node.client("auditor")
    stat = wait_for(with_nothing, lambda stat: stat.connections == 1)
    assert stat.slots_pinned == 0
    assert stat.slots_free + stat.slots_committed == stat.slots_total
    with_nothing.close()


@pytest.fixture(params=[False, True], ids=["shared memory", "TCP"])
def remote(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_what_was_put_is_read_whoever_reads(
    connect: Connect, remote: bool, request: pytest.FixtureRequest
) -> None:
    name = request.node.name
    writer = connect("w", remote=remote)
    assert writer.put(keys_of(name, 3), 0, filler(name)) == 3
    expected = [content(name, index) for index in range(3)]
    assert read(connect("a"), keys_of(name, 4)) == expected
    assert read(connect("b", remote=True), keys_of(name, 4)) == expected
    assert read(writer, keys_of(name, 2)) == expected[:2]


def test_counters_are_blocks_times_block_bytes(
    connect: Connect, remote: bool, request: pytest.FixtureRequest
) -> None:
    name = request.node.name
    client = connect("w", remote=remote)
    client.put(keys_of(name, 2), 0, filler(name))
    client.put(keys_of(name, 3), 0, filler(name))
    for _ in range(2):
        read(client, keys_of(name, 3))
    ticket = client.open_ticket(REQUEST, 0, reader="w", block_count=5, wait_ms=0)
    client.push(ticket, keys_of(name, 4), 0, filler(name))
    client.push_tail(ticket, lambda out: filler(name)(9, out))
    client.abort(ticket)
    assert dict(client.counters) == {
        "claims_local": 0 if remote else 2,
        "blocks_put": 3,
        "blocks_pushed": 2,
        "bytes_pushed": 2 * BLOCK_BYTES,
        "blocks_present": 2 + 3,
        "blocks_restored": 6,
        "bytes_restored": 6 * BLOCK_BYTES,
        "blocks_verified": 6 if remote else 3,
        "checksum_failures": 0,
        "remote_bytes": (3 + 6 + 2) * BLOCK_BYTES if remote else 0,
    }


@pytest.mark.parametrize("reader_remote", [False, True], ids=["reader here", "reader elsewhere"])
def test_a_hand_off_from_writer_to_reader(
    connect: Connect, remote: bool, reader_remote: bool, request: pytest.FixtureRequest
) -> None:
    name = request.node.name
    writer, reader = connect("p", remote=remote), connect("d", remote=reader_remote)
    keys = keys_of(name, 4)
    ticket = writer.open_ticket(REQUEST, 0, reader="d", block_count=5, wait_ms=1000)
    writer.push(ticket, keys[:2], 0, filler(name))
    assert len(read(reader, keys)) == 2, "a chunk can be found when it is committed"
    writer.push(ticket, keys, 2, filler(name))
    writer.push_tail(ticket, lambda out: filler(name)(4, out))
    writer.seal(ticket)
    writer.close()
    claim = reader.adopt(ticket)
    assert (claim.count, claim.has_tail) == (4, True)
    out = memoryview(bytearray(BLOCK_BYTES))
    for index in range(5):
        reader.read(claim, index, out)
        assert bytes(out) == content(name, index)
    with pytest.raises(TicketGone):
        reader.adopt(ticket)
    reader.release(claim)
    reader.release(claim)


def test_a_ticket_for_anybody_is_resumed_by_somebody_else(
    connect: Connect, request: pytest.FixtureRequest
) -> None:
    name = request.node.name
    parker = connect("d1")
    ticket = parker.open_ticket(REQUEST, 0, reader="*", block_count=1, wait_ms=0)
    parker.push_tail(ticket, lambda out: filler(name)(0, out))
    parker.seal(ticket)
    resumer = connect("d2", remote=True)
    claim = resumer.adopt(ticket)
    assert (claim.count, claim.has_tail) == (0, True)
    out = memoryview(bytearray(BLOCK_BYTES))
    resumer.read(claim, 0, out)
    assert bytes(out) == content(name, 0)


def test_a_waiting_ticket_is_granted_when_another_one_ends(connect: Connect) -> None:
    holder, waiter = connect("p1"), connect("p2", remote=True)
    held = holder.open_ticket(REQUEST, 0, reader="*", block_count=16, wait_ms=0)
    granted = []

    def wait() -> None:
        granted.append(waiter.open_ticket(OTHER, 0, reader="*", block_count=16, wait_ms=15_000))

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_for(holder, lambda stat: stat.tickets_queued == 1)
    holder.abort(held)
    waiting.join(20)
    assert len(granted) == 1
    assert holder.stat().slots_reserved == 16


def test_a_wait_for_slots_ends(connect: Connect) -> None:
    holder, waiter = connect("p1"), connect("p2")
    holder.open_ticket(REQUEST, 0, reader="*", block_count=16, wait_ms=0)
    with pytest.raises(OutOfBlocks, match="2 blocks wanted, 0 free") as caught:
        waiter.open_ticket(OTHER, 0, reader="*", block_count=2, wait_ms=20)
    assert caught.value.retry_after_ms == 50
    with pytest.raises(OutOfBlocks, match="17 blocks wanted, 16 free"):
        waiter.open_ticket(OTHER, 0, reader="*", block_count=17, wait_ms=20)
    assert waiter.stat().tickets_queued == 0


def test_a_fill_that_fails_leaves_nothing_reserved(
    connect: Connect, remote: bool, request: pytest.FixtureRequest
) -> None:
    client = connect("w", remote=remote)

    def fail(index: int, out: memoryview) -> None:
        raise ZeroDivisionError

    keys = keys_of(request.node.name, 2)
    with pytest.raises(ZeroDivisionError):
        client.put(keys, 0, fail)
    assert client.stat().slots_reserved == 0
    ticket = client.open_ticket(REQUEST, 0, reader="*", block_count=2, wait_ms=0)
    with pytest.raises(ZeroDivisionError):
        client.push(ticket, keys, 0, fail)
    assert client.claim(keys).count == 0
    client.push(ticket, keys, 0, filler("x"))
    client.abort(ticket)
    assert client.claim(keys).count == 2


# ── broken bytes ─────────────────────────────────────────────────────────────────────────────────


def test_a_flip_in_shared_memory_is_found_by_the_reader(
    connect: Connect, request: pytest.FixtureRequest
) -> None:
    name = request.node.name
    keys = keys_of(name, 2)
    connect("w", corrupt=flip).put(keys, 0, filler(name))
    reader = connect("r")
    claim = reader.claim(keys)
    out = memoryview(bytearray(BLOCK_BYTES))
    with pytest.raises(ChecksumMismatch):
        reader.read(claim, 0, out)
    assert reader.counters["checksum_failures"] == 1
    assert reader.claim(keys).count == 0, "nobody finds it again, nor what builds on it"
    with pytest.raises(BlockMissing):
        reader.read(claim, 0, out)
    assert reader.stat().condemned_count >= 1
    reader.release(claim)
    assert connect("w2").put(keys, 0, filler(name)) == 2
    assert read(reader, keys) == [content(name, 0), content(name, 1)]


def test_without_verification_the_flip_arrives(
    connect: Connect, remote: bool, request: pytest.FixtureRequest
) -> None:
    name = request.node.name
    connect("w", remote=remote, verify=False, corrupt=flip).put(keys_of(name, 1), 0, filler(name))
    (block,) = read(connect("r", remote=remote, verify=False), keys_of(name, 1))
    assert block != content(name, 0)
    assert bytes([block[11] ^ 4]) == content(name, 0)[11:12]


def test_a_flip_on_the_way_to_another_host_never_gets_into_the_store(
    connect: Connect, request: pytest.FixtureRequest
) -> None:
    name = request.node.name
    keys = keys_of(name, 2)
    always = connect("w1", remote=True, corrupt=flip)
    with pytest.raises(ChecksumMismatch, match="changed on its way"):
        always.put(keys, 0, filler(name))
    assert always.counters["checksum_failures"] == 3
    assert always.claim(keys).count == 0
    assert always.stat().slots_reserved == 0
    left = [flip]

    def flip_once(view: memoryview) -> None:
        if left:
            left.pop()(view)

    client = connect("w2", remote=True, corrupt=flip_once)
    assert client.put(keys, 0, filler(name)) == 2
    assert client.counters["checksum_failures"] == 1
    assert read(connect("r"), keys) == [content(name, 0), content(name, 1)]


# ── changes, stat, ends ──────────────────────────────────────────────────────────────────────────


def test_changes_can_be_followed(connect: Connect, request: pytest.FixtureRequest) -> None:
    name = request.node.name
    client = connect("w")
    before = client.changes(0).sequence
    client.put(keys_of(name, 2), 0, filler(name))
    changes = client.changes(before)
    assert changes.complete
    assert list(changes.added) == keys_of(name, 2)
    assert client.changes(changes.sequence).added == ()


def test_eviction_under_pressure_keeps_prefixes_whole(
    connect: Connect, request: pytest.FixtureRequest
) -> None:
    client = connect("w")
    evicted_before = client.stat().evicted_count
    for round_index in range(5):
        name = f"{request.node.name}{round_index}"
        assert client.put(keys_of(name, 6), 0, filler(name)) == 6
    assert client.stat().evicted_count - evicted_before >= 5 * 6 - 16
    name = f"{request.node.name}4"
    assert read(client, keys_of(name, 6)) == [content(name, index) for index in range(6)]


def test_what_a_correct_client_never_says_is_answered_with_an_error(connect: Connect) -> None:
    client = connect("w")
    with pytest.raises(FrameError, match="from 3 on, of 2"):
        client.put(keys_of("x", 2), 3, filler("x"))
    assert client.claim([]).count == 0


def test_a_closed_client_says_so_at_once(connect: Connect) -> None:
    client = connect("w")
    claim = client.claim(keys_of("x", 1))
    client.close()
    client.close()
    with pytest.raises(StoreUnavailable):
        client.stat()
    client.release(claim)


def test_nobody_there_is_unavailable(tmp_path: Path) -> None:
    here = local_host_id()
    for address in (
        Address(here, str(tmp_path / "none.sock"), ""),
        Address(here, "", "127.0.0.1:1"),
    ):
        with pytest.raises(StoreUnavailable, match="cannot be reached"):
            StoreClient(address, host=here, owner="w")


def test_the_node_is_who_it_said(node: Node, connect: Connect) -> None:
    client = connect("w", remote=True)
    assert client.address == node.address
    assert client.block_bytes == BLOCK_BYTES
    assert StoreId(Path(node.address.unix_path).stem) == client.store_id
