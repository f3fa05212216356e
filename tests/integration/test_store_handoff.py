"""A hand-off whose writer or reader goes, with real processes: what is kept, what comes back.

What prefill has committed is stored under its keys. So its death costs the chunk that it was at,
and who has no ticket reads the same blocks by key: push and pull end in the same.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.errors import FrameError, TicketGone
from pdserve.ids import RequestId
from pdserve.kvstore.pieces import PiecewiseWrite
from tests.integration.handoff_writer import BLOCKS, CHUNK_BLOCKS, CHUNKS_DONE, NAME
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

SLOTS = 16
REQUEST = RequestId("r")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path, slot_count=SLOTS) as node:
        yield node


def add_all(write: PiecewiseWrite, name: str, piece_bytes: int) -> None:
    for start in range(0, BLOCK_BYTES, piece_bytes):
        end = min(BLOCK_BYTES, start + piece_bytes)
        for index in write.indices:

            def fill(out: memoryview, part: bytes = content(name, index)[start:end]) -> None:
                out[:] = part

            write.add(index, end - start, fill)


def test_after_a_writer_s_death_another_goes_on_from_its_last_committed_chunk(node: Node) -> None:
    writer = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.integration.handoff_writer"),
            json.dumps(dataclasses.asdict(node.address)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    reader, second = node.client("d"), node.client("p2")
    keys, committed = keys_of(NAME, BLOCKS), CHUNKS_DONE * CHUNK_BLOCKS
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "held\n"
        stat = reader.stat()
        assert (stat.slots_reserved, stat.tickets) == (CHUNK_BLOCKS + 1, 1)
        # A pull: the reader has no ticket yet, and finds by key what is committed, no more.
        assert read(reader, keys) == [content(NAME, index) for index in range(committed)]
        writer.kill()
        writer.wait(PATIENCE_S)
    finally:
        writer.kill()
        writer.wait(PATIENCE_S)
        assert writer.stdout is not None
        writer.stdout.close()
    stat = wait_for(reader, lambda stat: stat.tickets == 0)
    assert (stat.slots_reserved, stat.slots_committed) == (0, committed)
    assert stat.slots_free + stat.slots_committed == SLOTS

    claim = second.claim(keys)
    assert claim.count == committed, "this much need not be computed again"
    ticket = second.open_ticket(REQUEST, 1, reader="d", block_count=BLOCKS, wait_ms=1000)
    computed = []

    def compute(index: int, out: memoryview) -> None:
        computed.append(index)
        filler(NAME)(index, out)

    second.push(ticket, keys, 0, compute)
    second.release(claim)
    second.seal(ticket)
    assert computed == list(range(committed, BLOCKS)), "the chunk it was at, and nothing before"
    adopted = reader.adopt(ticket)
    out = bytearray(BLOCK_BYTES)
    for index in range(BLOCKS):
        reader.read(adopted, index, memoryview(out))
        assert out == content(NAME, index)
    reader.close()
    second.close()


@pytest.mark.parametrize("piece_bytes", [BLOCK_BYTES, 1000, 64])
def test_pieces_arrive_as_whole_blocks_for_whoever_reads(node: Node, piece_bytes: int) -> None:
    writer, reader, elsewhere = node.client("p"), node.client("d"), node.client("e", remote=True)
    keys = keys_of("pieces", 3)
    ticket = writer.open_ticket(REQUEST, 0, reader="d", block_count=4, wait_ms=0)
    write, tail = writer.begin_push(ticket, keys, 0), writer.begin_tail(ticket)
    assert write is not None
    assert tail is not None
    add_all(write, "pieces", piece_bytes)
    assert read(elsewhere, keys) == [], "complete, and not yet committed"
    with pytest.raises(FrameError, match="neither committed nor over"):
        writer.seal(ticket)
    add_all(tail, "tail", piece_bytes)
    writer.finish(write)
    writer.finish(tail)
    writer.seal(ticket)
    assert read(elsewhere, keys) == [content("pieces", index) for index in range(3)]
    claim = reader.adopt(ticket)
    assert (claim.count, claim.has_tail) == (3, True)
    out = bytearray(BLOCK_BYTES)
    reader.read(claim, 3, memoryview(out))
    assert out == content("tail", 0)
    assert (writer.counters["blocks_pushed"], reader.counters["checksum_failures"]) == (4, 0)
    assert elsewhere.begin_push(ticket, keys, 0) is None, "over a socket blocks go whole"
    assert elsewhere.begin_tail(ticket) is None
    for client in (writer, reader, elsewhere):
        client.close()


def test_slots_of_an_aborted_hand_off_are_its_writer_s_until_it_lets_go(node: Node) -> None:
    writer, reader = node.client("p"), node.client("d")
    ticket = writer.open_ticket(REQUEST, 0, reader="d", block_count=3, wait_ms=0)
    write, tail = writer.begin_push(ticket, keys_of("cut", 2), 0), writer.begin_tail(ticket)
    assert write is not None
    assert tail is not None
    reader.abort(ticket)
    assert reader.put(keys_of("other", SLOTS), 0, filler("other")) == SLOTS - 3
    add_all(write, "cut", BLOCK_BYTES)  # it has not heard of it
    expected = [content("other", index) for index in range(SLOTS - 3)]
    assert read(reader, keys_of("other", SLOTS)) == expected, "whose bytes are not touched"
    with pytest.raises(TicketGone):
        writer.finish(write)
    writer.give_up(tail)
    stat = reader.stat()
    assert (stat.slots_reserved, stat.tickets) == (0, 0)
    assert stat.slots_free == 3
    assert read(reader, keys_of("cut", 2)) == []
    writer.close()
    reader.close()


def test_blocks_that_others_stored_meanwhile_need_no_pieces(node: Node) -> None:
    writer, other = node.client("p"), node.client("o")
    keys = keys_of("shared", 4)
    ticket = writer.open_ticket(REQUEST, 0, reader="*", block_count=4, wait_ms=0)
    other.put(keys[:3], 0, filler("shared"))
    write = writer.begin_push(ticket, keys[:2], 0)
    assert write is not None
    assert list(write.indices) == [], "both are there"
    writer.finish(write)
    write = writer.begin_push(ticket, keys, 2)
    assert write is not None
    assert list(write.indices) == [3]
    add_all(write, "shared", 1000)
    other.put(keys, 0, filler("shared"))  # the same block, committed first
    writer.finish(write)
    writer.seal(ticket)
    assert read(other, keys) == [content("shared", index) for index in range(4)]
    assert writer.counters["blocks_present"] == 3
    assert other.stat().slots_committed == 4
    writer.abort(ticket)
    writer.close()
    other.close()
