"""A node that is killed, and the next one over its arena: blocks are back, and nothing is touched
that the dead node's clients still have."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pdserve.errors import ChecksumMismatch, OutOfBlocks, StoreUnavailable
from pdserve.ids import RequestId, SlotId
from pdserve.kvstore.arena import open_arena
from pdserve.kvstore.directory import root_of
from pdserve.kvstore.headers import HEADER_BYTES
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

ID = ("--store-id", "phoenix")
WAIT_MS = 60_000


@contextmanager
def killed(directory: Path, *arguments: str, slot_count: int = 16) -> Iterator[Node]:
    """A node that is killed at the end."""
    with running_node(directory, *ID, *arguments, slot_count=slot_count) as node:
        yield node
        os.kill(node.pid, signal.SIGKILL)
        node.process.wait(PATIENCE_S)


@contextmanager
def next_node(directory: Path, *arguments: str, slot_count: int = 16) -> Iterator[Node]:
    with running_node(directory, *ID, *arguments, slot_count=slot_count) as node:
        yield node


def arena_path(directory: Path) -> Path:
    return root_of(directory / "shared") / ID[1] / "arena"


def expected(name: str, count: int) -> list[bytes]:
    return [content(name, index) for index in range(count)]


@pytest.mark.parametrize("remote", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_committed_block_is_back(tmp_path: Path, remote: bool) -> None:
    chains = {f"chain {number}": number % 7 + 1 for number in range(50)}
    with killed(tmp_path, slot_count=256) as node:
        client = node.client("w")
        for name, count in chains.items():
            client.put(keys_of(name, count), 0, filler(name))
        client.close()
    with next_node(tmp_path, slot_count=256) as node:
        reader = node.client("r", remote=remote)
        stat = wait_for(reader, lambda stat: stat.slots_pinned == 0)
        assert stat.slots_committed == sum(chains.values())
        for name, count in chains.items():
            assert read(reader, keys_of(name, count + 1)) == expected(name, count)
        reader.close()


@pytest.mark.slow
def test_it_is_back_again_and_again(tmp_path: Path) -> None:
    for round_ in range(3):
        with killed(tmp_path) as node:
            client = node.client("w")
            for before in range(round_):
                assert read(client, keys_of(f"{before}", 2)) == expected(f"{before}", 2)
            client.put(keys_of(f"{round_}", 2), 0, filler(f"{round_}"))
            client.close()


def test_a_damaged_block_is_a_miss_and_what_builds_on_it_goes_too(tmp_path: Path) -> None:
    with killed(tmp_path) as node:
        client = node.client("w")
        client.put(keys_of("a", 4), 0, filler("a"))
        claim = client.claim(keys_of("a", 4))
        slot, store_id = claim.grant.slots[2], client.store_id
        client.release(claim)
        client.close()
    open_arena(arena_path(tmp_path), store_id, writable=True).payload(slot)[100] ^= 1
    with next_node(tmp_path) as node:
        client = node.client("r")
        claim = client.claim(keys_of("a", 4))
        assert claim.count == 4
        out = memoryview(bytearray(BLOCK_BYTES))
        client.read(claim, 1, out)
        with pytest.raises(ChecksumMismatch):
            client.read(claim, 2, out)
        client.release(claim)
        assert read(client, keys_of("a", 4)) == expected("a", 2)
        client.put(keys_of("a", 4), 2, filler("a"))
        assert read(client, keys_of("a", 4)) == expected("a", 4)
        client.close()


@pytest.mark.slow
def test_a_wrong_header_is_no_block(tmp_path: Path) -> None:
    with killed(tmp_path) as node:
        client = node.client("w")
        client.put(keys_of("a", 1), 0, filler("a"))
        client.put(keys_of("b", 1), 0, filler("b"))
        claim = client.claim(keys_of("a", 1))
        slot = claim.grant.slots[0]
        client.close()
    with arena_path(tmp_path).open("r+b") as file:
        # Another generation: whoever wrote it did not know the check.
        os.pwrite(file.fileno(), b"\x07", os.sysconf("SC_PAGESIZE") + slot * HEADER_BYTES)
    with next_node(tmp_path) as node:
        client = node.client("r")
        assert read(client, keys_of("a", 1)) == []
        assert read(client, keys_of("b", 1)) == expected("b", 1)
        client.close()


@pytest.mark.parametrize("asks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_a_reader_of_the_dead_node_looks_at_stays(tmp_path: Path, asks: bool) -> None:
    with killed(tmp_path, slot_count=4) as node:
        reader = node.client("r")
        if asks:  # for its pins, which nobody but the dead node knew of
            reader._local = None
        reader.put(keys_of("a", 2), 0, filler("a"))
        claim = reader.claim(keys_of("a", 2))
        views = [reader.view(claim, index) for index in range(2)]
    with next_node(tmp_path, slot_count=4) as node:
        writer = node.client("w")
        assert writer.stat().slots_pinned == 2
        assert read(writer, keys_of("a", 2)) == expected("a", 2)  # found meanwhile
        writer.put(keys_of("flood", 4), 0, filler("flood"))
        assert writer.stat().slots_committed == 4, "what was free can be written"
        assert [bytes(view) for view in views] == expected("a", 2)
        with pytest.raises(OutOfBlocks):
            writer.open_ticket(RequestId("q"), 0, reader="*", block_count=4, wait_ms=0)
        assert read(writer, keys_of("a", 2)) == expected("a", 2)
        with pytest.raises(StoreUnavailable):
            reader.claim(keys_of("a", 2))
        del views
        reader.release(claim)
        del claim
        reader.close()
        # Granted when the last of the mapping is gone: nobody asks the node to look.
        ticket = writer.open_ticket(RequestId("q"), 1, reader="*", block_count=4, wait_ms=WAIT_MS)
        writer.abort(ticket)
        assert read(writer, keys_of("a", 2)) == []
        writer.close()


def test_a_claim_that_outlives_its_client_holds_nothing_of_the_dead_node(tmp_path: Path) -> None:
    with killed(tmp_path, slot_count=4) as node:
        reader = node.client("r")
        reader.put(keys_of("a", 2), 0, filler("a"))
        claim = reader.claim(keys_of("a", 2))
        view = reader.view(claim, 0)
    with next_node(tmp_path, slot_count=4) as node:
        other = node.client("o")
        assert other.stat().slots_pinned == 2
        reader.close()
        with pytest.raises(ValueError, match="released"):
            view[0]
        wait_for(other, lambda stat: stat.slots_pinned == 0)
        reader.release(claim)  # holds nothing; no error
        other.close()


def test_a_slot_that_a_writer_of_the_dead_node_still_fills_is_nobody_elses(tmp_path: Path) -> None:
    with killed(tmp_path, slot_count=4) as node:
        client = node.client("w")
        client.put(keys_of("a", 1), 0, filler("a"))
        ticket = client.open_ticket(RequestId("q"), 0, reader="*", block_count=2, wait_ms=0)
        client.push(ticket, keys_of("b", 1), 0, filler("b"))  # it has the arena open for writing
    with next_node(tmp_path, slot_count=4) as node:
        other = node.client("o")
        stat = other.stat()
        # The pushed block was committed; the ticket's other slot may be written at any moment.
        assert (stat.slots_committed, stat.slots_draining, stat.slots_free) == (2, 1, 1)
        other.put(keys_of("flood", 4), 0, filler("flood"))
        assert other.stat().slots_draining == 1
        client.close()
        wait_for(other, lambda stat: stat.slots_draining == 0)
        assert read(other, keys_of("b", 1)) == expected("b", 1)
        other.close()


def test_a_grant_of_the_dead_node_is_not_written_into_its_successors_arena(tmp_path: Path) -> None:
    with killed(tmp_path) as node:
        client = node.client("w")  # it opens the arena for writing with its first write
        store_id = client.store_id
        epoch = client._transfer._readable.epoch  # type: ignore[attr-defined]
    with next_node(tmp_path):
        with pytest.raises(StoreUnavailable, match=f"under epoch {epoch + 1}, not {epoch}"):
            open_arena(arena_path(tmp_path), store_id, writable=True, epoch=epoch)
        client.close()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param(("--codec", "bfloat16"), "codec is", marks=pytest.mark.slow),
        pytest.param(("--arena-bytes", str(1 << 20)), "slot_count is 16", marks=pytest.mark.slow),
        pytest.param(("--block-bytes", "4000"), "block_bytes is", marks=pytest.mark.slow),
    ],
)
def test_what_does_not_fit_is_made_anew_and_said(
    tmp_path: Path, arguments: tuple[str, ...], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with killed(tmp_path) as node:
        client = node.client("w")
        client.put(keys_of("a", 1), 0, filler("a"))
        client.close()
    with next_node(tmp_path, *arguments) as node:
        client = node.client("r")
        assert client.stat().slots_committed == 0
        error = capfd.readouterr().err
        assert "is made anew" in error
        assert reason in error
    client.close()


@pytest.mark.slow
def test_an_arena_of_another_release_is_made_anew(tmp_path: Path) -> None:
    with killed(tmp_path) as node:
        client = node.client("w")
        client.put(keys_of("a", 1), 0, filler("a"))
        client.close()
    with arena_path(tmp_path).open("r+b") as file:
        os.pwrite(file.fileno(), b"\x01", 8)
    with next_node(tmp_path) as node:
        client = node.client("r")
        assert read(client, keys_of("a", 1)) == []
        client.close()


@pytest.mark.slow
def test_an_orderly_end_leaves_no_arena(tmp_path: Path) -> None:
    with next_node(tmp_path) as node:
        assert arena_path(tmp_path).exists()
        assert node.stop() == 0
        assert not arena_path(tmp_path).exists()


@pytest.mark.slow
def test_a_start_that_fails_leaves_the_arena_to_the_next(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with killed(tmp_path) as node:
        client = node.client("w")
        client.put(keys_of("a", 2), 0, filler("a"))
        client.close()
    nowhere = ("--redis-url", "redis://127.0.0.1:1")
    with pytest.raises(AssertionError, match="ended with 2"), next_node(tmp_path, *nowhere):
        pass
    assert "cannot use Redis" in capfd.readouterr().err
    with next_node(tmp_path) as node:
        client = node.client("r")
        assert read(client, keys_of("a", 2)) == expected("a", 2)
        client.close()


@pytest.mark.slow
def test_generations_go_on(tmp_path: Path) -> None:
    """(slot, generation) names bytes for ever; readers remember what they have verified by it."""
    seen: set[tuple[SlotId, int]] = set()
    for round_ in range(3):
        with killed(tmp_path, slot_count=1) as node:
            client = node.client("w")
            client.put(keys_of(f"{round_}", 1), 0, filler(f"{round_}"))
            claim = client.claim(keys_of(f"{round_}", 1))
            assert claim.count == 1
            named = claim.grant.slots[0], claim.grant.generations[0]
            assert named not in seen
            seen.add(named)
            client.release(claim)
            client.close()
