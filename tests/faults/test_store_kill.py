"""``kill -9`` of a store's clients, whatever they hold: the node has it back at once.

Memory comes back by the death of the connection and never by a timer; what was not committed was
never visible; what was committed stays.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.errors import TicketGone
from pdserve.ids import RequestId, TicketId
from tests.integration.store_nodes import (
    BLOCK_BYTES,
    PATIENCE_S,
    Node,
    content,
    filler,
    keys_of,
    read,
    running_node,
    wait_for,
)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path) as node:
        yield node


@dataclasses.dataclass
class Peer:
    process: subprocess.Popen[str]
    words: list[str]

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def peer(node: Node, role: str, *, remote: bool = False) -> Iterator[Peer]:
    address = json.dumps(dataclasses.asdict(node.address))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.store_peer", role, address, str(int(remote))],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        words = process.stdout.readline().split()
        assert words[:1] == ["held"], f"{role} ended early"
        yield Peer(process, words[1:])
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        process.stdout.close()


LOCAL, TCP = False, True
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("role", "committed_count", "remote"),
    [
        ("claims", 3, LOCAL),
        pytest.param("claims", 3, TCP, marks=slow),
        pytest.param("puts", 0, LOCAL, marks=slow),
        ("puts", 0, TCP),
        pytest.param("pushes", 0, LOCAL, marks=slow),
        ("pushes", 0, TCP),
        ("has a ticket", 2, LOCAL),
        pytest.param("has a ticket", 2, TCP, marks=slow),
    ],
)
def test_what_a_killed_client_held_is_free_at_once(
    node: Node, role: str, committed_count: int, remote: bool
) -> None:
    auditor = node.client("auditor")
    with peer(node, role, remote=remote) as held:
        before = auditor.stat()
        assert before.slots_pinned + before.slots_reserved > 0
        held.kill()
        stat = wait_for(auditor, lambda stat: stat.connections == 1)
    assert (stat.claims, stat.writes, stat.tickets) == (0, 0, 0)
    assert (stat.slots_pinned, stat.slots_reserved) == (0, 0)
    assert read(auditor, keys_of("peer", 3)) == [content("peer", i) for i in range(committed_count)]
    assert auditor.put(keys_of("new", 16), 0, filler("new")) == 16, "every slot can be used again"
    auditor.close()


def test_a_stopped_client_keeps_what_it_holds(node: Node) -> None:
    """No timer takes memory from a process that may still look at it."""
    auditor = node.client("auditor")
    with peer(node, "claims") as held:
        os.kill(held.process.pid, signal.SIGSTOP)
        assert auditor.put(keys_of("new", 16), 0, filler("new")) == 13
        assert read(auditor, keys_of("peer", 3)) == [content("peer", i) for i in range(3)]
    auditor.close()


def test_a_sealed_ticket_outlives_its_writer(node: Node) -> None:
    reader = node.client("reader")
    with peer(node, "has sealed") as writer:
        writer.kill()
        wait_for(reader, lambda stat: stat.connections == 1)
        claim = reader.adopt(TicketId(writer.words[0]))
    out = memoryview(bytearray(BLOCK_BYTES))
    for index in range(3):
        reader.read(claim, index, out)
        assert bytes(out) == content("peer", index)
    assert (claim.count, claim.has_tail) == (2, True)
    reader.close()


def test_a_ticket_that_was_not_sealed_dies_with_its_writer(node: Node) -> None:
    reader = node.client("reader")
    with peer(node, "has a ticket") as writer:
        writer.kill()
        wait_for(reader, lambda stat: stat.connections == 1)
        with pytest.raises(TicketGone):
            reader.adopt(TicketId(writer.words[0]))
    assert len(read(reader, keys_of("peer", 3))) == 2, "but its blocks are a cached prefix now"
    reader.close()


def test_a_sealed_ticket_dies_with_its_reader(node: Node) -> None:
    writer = node.client("writer")
    with peer(node, "reads tickets") as reader:
        ticket = writer.open_ticket(RequestId("r"), 0, reader="peer", block_count=2, wait_ms=0)
        writer.push(ticket, keys_of("a", 1), 0, filler("a"))
        writer.push_tail(ticket, lambda out: filler("a")(1, out))
        writer.seal(ticket)
        reader.kill()
        stat = wait_for(writer, lambda stat: stat.connections == 1)
    assert (stat.tickets, stat.slots_pinned, stat.slots_private) == (0, 0, 0)
    second = writer.open_ticket(RequestId("r"), 0, reader="peer", block_count=1, wait_ms=0)
    with pytest.raises(TicketGone, match="reader peer"):
        writer.seal(second)
    writer.close()


def test_a_killed_client_in_the_queue_lets_the_next_one_through(node: Node) -> None:
    holder, next_one = node.client("holder"), node.client("next")
    held = holder.open_ticket(RequestId("r"), 0, reader="*", block_count=16, wait_ms=0)
    with peer(node, "waits") as waiting:
        wait_for(holder, lambda stat: stat.tickets_queued == 1)
        waiting.kill()
        wait_for(holder, lambda stat: stat.tickets_queued == 0)
    holder.abort(held)
    ticket = next_one.open_ticket(RequestId("r"), 1, reader="*", block_count=16, wait_ms=0)
    next_one.abort(ticket)
    holder.close()
    next_one.close()


def test_readers_never_see_wrong_bytes_while_writers_die(node: Node) -> None:
    """Goal: under eviction and ``kill -9`` a read is the right bytes or a miss.

    Method: writers die in the middle of a put or with a ticket; a survivor puts and reads random
    chains in an arena that holds a third of them. Seeded.
    """
    chance = random.Random(5)
    survivor = node.client("survivor")
    read_count = 0
    for round_index in range(4):
        role = ("puts", "pushes", "has a ticket", "claims")[round_index]
        with peer(node, role, remote=round_index % 2 == 1) as victim:
            for step in range(60):
                if step == 30:
                    victim.kill()
                name = chance.choice("abcdefgh")
                survivor.put(keys_of(name, 6), 0, filler(name))
                blocks = read(survivor, keys_of(name, 6))
                assert blocks == [content(name, index) for index in range(len(blocks))]
                read_count += len(blocks)
    stat = wait_for(survivor, lambda stat: stat.connections == 1)
    assert stat.slots_pinned == stat.slots_reserved == 0
    assert read_count > 4 * 60 * 2
    assert survivor.counters["checksum_failures"] == 0
    survivor.close()
