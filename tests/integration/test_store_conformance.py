"""One suite for every transport: shared memory, a Unix socket, TCP, TLS, Mooncake's engine."""

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdserve.errors import (
    Cancelled,
    ChecksumMismatch,
    StoreUnavailable,
    TicketGone,
)
from pdserve.ids import RequestId
from pdserve.kvstore.client import StoreClient
from pdserve.wire.tls import member_context
from tests.integration.certificates import make_certificates
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
SLOT_COUNT = 32
TRANSPORTS = ("shared memory", "unix", "tcp", "tls", "mooncake")
Connect = Callable[..., StoreClient]


@pytest.fixture(scope="module", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    if request.param == "mooncake":
        reason = "mooncake-transfer-engine, or a library of the system that it wants, is missing"
        pytest.importorskip("mooncake.engine", reason=reason, exc_type=ImportError)
    return str(request.param)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    make_certificates(directory)
    return directory


@pytest.fixture(scope="module")
def node(
    transport: str, certificates: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Node]:
    arguments: tuple[str, ...] = ()
    if transport == "tls":
        arguments = (
            *("--tls-authority", str(certificates / "authority.pem")),
            *("--tls-certificate", str(certificates / "member.pem")),
            *("--tls-key", str(certificates / "member.key")),
        )
    if transport == "mooncake":
        arguments = ("--mooncake",)
    directory = tmp_path_factory.mktemp("node")
    with running_node(directory, *arguments, slot_count=SLOT_COUNT) as node:
        yield node


@pytest.fixture
def connect(node: Node, transport: str, certificates: Path) -> Iterator[Connect]:
    """Makes clients; afterwards nothing may be held at the node by anybody."""
    options: dict[str, object] = {}
    if transport == "unix":
        options = {"shared_memory": False}
    elif transport != "shared memory":
        options = {"remote": True}
    if transport == "mooncake":
        options["mooncake"] = True
    if transport == "tls":
        options["ssl_context"] = member_context(
            certificate=certificates / "member.pem",
            key=certificates / "member.key",
            authority=certificates / "authority.pem",
            server_side=False,
        )
    clients = []

    def make(owner: str, **more: object) -> StoreClient:
        clients.append(node.client(owner, **{**options, **more}))  # type: ignore[arg-type]
        return clients[-1]

    yield make
    for client in clients:
        client.close()
    auditor = node.client("auditor")
    stat = wait_for(auditor, lambda stat: stat.connections == 1)
    assert stat.slots_pinned == 0
    assert stat.slots_free + stat.slots_committed == stat.slots_total
    auditor.close()


def buffers(count: int) -> list[memoryview]:
    return [memoryview(bytearray(BLOCK_BYTES)) for _ in range(count)]


def test_many_blocks_are_read_in_any_order(connect: Connect, transport: str) -> None:
    writer, reader = connect("w"), connect("r")
    assert writer.put(keys_of("many", 20), 0, filler("many")) == 20
    claim = reader.claim(keys_of("many", 25))
    indices = list(range(20))
    random.Random(7).shuffle(indices)
    outs = buffers(20)
    reader.read_many(claim, indices, outs)
    assert [bytes(out) for out in outs] == [content("many", index) for index in indices]
    assert reader.counters["blocks_restored"] == reader.counters["blocks_verified"] == 20
    taken: list[tuple[int, bytes]] = []
    reader.read_each(claim, [3, 4], lambda position, data: taken.append((position, bytes(data))))
    assert taken == [(0, content("many", 3)), (1, content("many", 4))]
    reader.release(claim)
    over_a_socket = 22 * BLOCK_BYTES if transport != "shared memory" else 0
    assert reader.counters["remote_bytes"] == over_a_socket


def test_a_fetch_needs_no_claim(connect: Connect) -> None:
    client = connect("c")
    client.put(keys_of("fetched", 5), 0, filler("fetched"))
    outs = buffers(6)
    assert client.fetch(keys_of("fetched", 8), outs, first=2) == 3
    assert [bytes(out) for out in outs[:3]] == [content("fetched", index) for index in (2, 3, 4)]
    assert client.fetch(keys_of("nobody's", 1), outs[:1]) == 0
    assert client.stat().claims == 0


def test_a_hand_off_of_blocks_and_a_tail(connect: Connect) -> None:
    writer, reader = connect("p"), connect("d")
    ticket = writer.open_ticket(REQUEST, 0, reader="d", block_count=9, wait_ms=1000)
    writer.push(ticket, keys_of("handed", 5), 0, filler("handed"))
    writer.push(ticket, keys_of("handed", 8), 5, filler("handed"))
    writer.push_tail(ticket, lambda out: filler("handed")(8, out))
    writer.seal(ticket)
    writer.close()
    claim = reader.adopt(ticket)
    assert (claim.count, claim.has_tail) == (8, True)
    outs = buffers(9)
    reader.read_many(claim, range(9), outs)
    assert [bytes(out) for out in outs] == [content("handed", index) for index in range(9)]
    with pytest.raises(TicketGone):
        reader.adopt(ticket)


def test_a_flip_on_the_way_is_never_delivered(connect: Connect, transport: str) -> None:
    keys = keys_of("flipped", 4)
    connect("w").put(keys, 0, filler("flipped"))
    always = connect("r", corrupt=flip)
    claim = always.claim(keys)
    outs = buffers(4)
    with pytest.raises(ChecksumMismatch):
        always.read_many(claim, range(4), outs)
    always.release(claim)
    assert read(connect("o"), keys)[3] == content("flipped", 3), "the block itself was right"
    if transport == "shared memory":
        return  # there is no way that could have been at fault
    left = [flip]
    once = connect("s", corrupt=lambda view: left.pop()(view) if left else None)
    again = keys_of("flipped once", 4)
    assert once.put(again, 0, filler("again")) == 4
    assert once.counters["checksum_failures"] == 1
    assert read(connect("t"), again) == [content("again", index) for index in range(4)]


def test_a_write_that_always_breaks_leaves_nothing(connect: Connect, transport: str) -> None:
    if transport == "shared memory":
        pytest.skip("what breaks in shared memory is found by the reader (test_store)")
    client = connect("w", corrupt=flip)
    with pytest.raises(ChecksumMismatch, match="changed on its way"):
        client.put(keys_of("broken", 3), 0, filler("broken"))
    stat = client.stat()
    assert (stat.slots_reserved, stat.writes) == (0, 0)
    assert client.claim(keys_of("broken", 3)).count == 0


def test_a_cancelled_read_leaves_the_connection_usable(connect: Connect) -> None:
    client, cancelled = connect("c"), threading.Event()
    client.put(keys_of("cancelled", 12), 0, filler("cancelled"))
    outs, seen = buffers(12), []

    def done(position: int) -> None:
        seen.append(position)
        if position == 3:
            cancelled.set()

    with pytest.raises(Cancelled):
        client.fetch(keys_of("cancelled", 12), outs, cancelled=cancelled, done=done)
    assert seen == [0, 1, 2, 3]
    for out in outs:
        out[:] = bytes(BLOCK_BYTES)
    assert read(client, keys_of("cancelled", 12))[11] == content("cancelled", 11)
    assert all(bytes(out) == bytes(BLOCK_BYTES) for out in outs), "a late byte was written"


def test_two_writers_and_two_readers_at_once(connect: Connect) -> None:
    """Goal: exactly the committed bytes or a miss, while an evictor runs hot.

    Method: each thread writes chains of its own and reads the other's, in an arena that holds a
    third of them; each byte that is read is compared.
    """
    wrong: list[str] = []
    found: list[int] = []
    together = threading.Barrier(2)

    def work(name: str, other: str) -> None:
        client = connect(name)
        outs = buffers(6)
        for turn in range(12):
            together.wait(60)
            client.put(keys_of(f"{name}{turn}", 6), 0, filler(f"{name}{turn}"))
            for back in range(4):
                chain = f"{other}{turn - back}"
                count = client.fetch(keys_of(chain, 6), outs)
                found.append(count)
                for index in range(count):
                    if bytes(outs[index]) != content(chain, index):
                        wrong.append(f"{chain}/{index}")

    threads = [
        threading.Thread(target=work, args=pair) for pair in (("one", "two"), ("two", "one"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert sum(found) > 0


def test_a_closed_client_says_so(connect: Connect) -> None:
    client = connect("c")
    client.put(keys_of("closed", 1), 0, filler("closed"))
    claim = client.claim(keys_of("closed", 1))
    client.close()
    with pytest.raises(StoreUnavailable):
        client.claim(keys_of("closed", 1))
    assert claim.count == 1
