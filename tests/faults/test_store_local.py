"""Readers who pin by themselves, stopped and killed: what they hold, and for how long."""

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

SLOT_COUNT = 16
HELD = 3  # blocks that the peer claims, and looks at where they lie


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path, slot_count=SLOT_COUNT) as node:
        yield node


@contextlib.contextmanager
def peer(node: Node, role: str) -> Iterator[subprocess.Popen[str]]:
    address = json.dumps(dataclasses.asdict(node.address))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.store_peer", role, address, "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        process.stdin.close()
        process.stdout.close()


def test_what_a_killed_reader_had_pinned_can_be_evicted_at_once(node: Node) -> None:
    auditor = node.client("auditor")
    with peer(node, "views") as reader:
        assert auditor.stat().slots_pinned == HELD
        assert auditor.put(keys_of("a", SLOT_COUNT), 0, filler("a")) == SLOT_COUNT - HELD
        reader.kill()
        stat = wait_for(auditor, lambda stat: stat.connections == 1)
    assert (stat.slots_pinned, stat.slots_draining, stat.claims) == (0, 0, 0)
    assert auditor.put(keys_of("b", SLOT_COUNT), 0, filler("b")) == SLOT_COUNT
    auditor.close()


def test_a_stopped_readers_blocks_stay_byte_exact_while_the_arena_is_cycled(node: Node) -> None:
    writer = node.client("writer")
    with peer(node, "views") as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        os.kill(reader.pid, signal.SIGSTOP)
        for round_index in range(3 * SLOT_COUNT):
            name = f"round {round_index}"
            assert writer.put(keys_of(name, 4), 0, filler(name)) == 4
        assert writer.stat().evicted_count > 10 * SLOT_COUNT
        assert read(writer, keys_of("peer", HELD)) == [content("peer", i) for i in range(HELD)]
        os.kill(reader.pid, signal.SIGCONT)
        reader.stdin.write("look\n")
        reader.stdin.flush()
        assert reader.stdout.readline().split() == ["True"] * HELD
        reader.wait(PATIENCE_S)
        wait_for(writer, lambda stat: stat.connections == 1)
    assert writer.put(keys_of("all", SLOT_COUNT), 0, filler("all")) == SLOT_COUNT
    writer.close()


def test_readers_by_themselves_see_right_bytes_or_nothing_under_eviction(tmp_path: Path) -> None:
    """Goal: however often slots change hands, what is claimed and looked at is its own block.

    Method: another process claims random chains and compares every view, while this one puts
    chains that do not fit together. Seeded; the reader counts.
    """
    with running_node(tmp_path, slot_count=SLOT_COUNT) as node, peer(node, "compares") as reader:
        writer, chance = node.client("writer"), random.Random(3)
        for _ in range(150):
            name = chance.choice("abcdefgh")
            writer.put(keys_of(name, 4), 0, filler(name))
        assert writer.stat().evicted_count > 100
        said, _ = reader.communicate("enough\n", PATIENCE_S)
        right_count, wrong_count, local_count = map(int, said.split())
        assert wrong_count == 0
        assert right_count > 50
        assert local_count > 50
        writer.close()
