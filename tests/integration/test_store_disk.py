"""Disks and codecs of real nodes: write policies, a full disk, ``kill -9`` while it is written."""

import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdserve.errors import BlockMissing, CodecMismatch
from pdserve.kvstore.answers import StoreStat
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.transfer import Sockets
from tests.integration.store_nodes import (
    PATIENCE_S,
    content,
    filler,
    keys_of,
    read,
    running_node,
    wait_for,
)

SLOT_COUNT = 8
WHOLE = 6


def disk(directory: Path, policy: str = "second_touch") -> tuple[str, ...]:
    where = ("--ssd-directory", str(directory / "ssd"), "--ssd-bytes", str(1 << 30))
    return *where, "--ssd-write", policy


def whole(name: str) -> list[bytes]:
    return [content(name, index) for index in range(WHOLE)]


def has_more_than(block_count: int) -> Callable[[StoreStat], bool]:
    return lambda stat: stat.ssd["blocks"] > block_count


def test_on_evict_keeps_what_left_memory(tmp_path: Path) -> None:
    policy = disk(tmp_path, "on_evict")
    with running_node(tmp_path, *policy, slot_count=SLOT_COUNT) as node:
        client = node.client("w")
        for name in "abc":
            client.put(keys_of(name, WHOLE), 0, filler(name))
        wait_for(client, lambda stat: stat.ssd["blocks"] == 3 * WHOLE - SLOT_COUNT)
        assert read(client, keys_of("a", WHOLE)) == whole("a")
        # What went for it is on its way down, and a miss until it is there.
        wait_for(client, lambda stat: stat.ssd["blocks"] == 4 * WHOLE - SLOT_COUNT)
        assert read(client, keys_of("b", WHOLE)) == whole("b")
        client.close()


def test_who_does_not_wait_for_the_disk_gets_what_memory_has(tmp_path: Path) -> None:
    with running_node(tmp_path, *disk(tmp_path, "on_evict"), slot_count=SLOT_COUNT) as node:
        client = node.client("w")
        keys = keys_of("a", WHOLE)
        client.put(keys, 0, filler("a"))
        client.put(keys_of("b", 4), 0, filler("b"))  # over the end of the first
        wait_for(client, lambda stat: stat.ssd["blocks"] == 2)
        assert client.has_disk
        quote = client.quote(keys)
        assert (quote.in_arena, quote.stored) == (4, WHOLE)
        assert quote.fetch_bytes_per_s > 0
        claim = client.claim(keys, fetch=False)
        assert claim.count == 4
        client.release(claim)
        assert client.stat().ssd["read"] == 0
        claim = client.claim(keys)
        assert claim.count == WHOLE
        client.close()


def test_killed_in_the_middle_of_writes_it_has_whole_blocks_or_none(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    random_ = random.Random(seed)
    known: list[str] = []
    recovered = 0
    for life in range(3):
        with running_node(tmp_path, *disk(tmp_path, "write_through"), slot_count=64) as node:
            client = node.client("w")
            stored = set(client.changes(0).added)
            for name in known:
                blocks = read(client, keys_of(name, WHOLE))
                assert blocks == whole(name)[: len(blocks)], f"life {life}, seed {seed}"
                promised = [key in stored for key in keys_of(name, WHOLE)]
                first_gap = promised.index(False) if False in promised else WHOLE
                assert len(blocks) <= first_gap, f"life {life}, seed {seed}"
                recovered += len(blocks)
            for index in range(random_.randrange(5, 40)):
                name = f"{life}.{index}"
                client.put(keys_of(name, WHOLE), 0, filler(name))
                known.append(name)
            wait_for(client, has_more_than(len(stored)))
            node.process.send_signal(signal.SIGKILL)
            node.process.wait(PATIENCE_S)
            client.close()
    assert recovered > 0
    with running_node(tmp_path, *disk(tmp_path, "write_through"), "--codec", "int8") as node:
        client = node.client("w")
        assert client.stat().ssd["blocks"] == 0, "another codec's are discarded"
        client.close()


def _can_mount() -> bool:
    probe = ("unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt")
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def test_a_full_disk_costs_hits_and_nothing_else(tmp_path: Path) -> None:
    if not _can_mount():
        pytest.skip("needs a file system of its own: unshare -rm and mount are forbidden here")
    (tmp_path / "ssd").mkdir()
    mount = f'mount -t tmpfs -o size=256k none {tmp_path / "ssd"} && exec "$@"'
    by = ("unshare", "-rm", "sh", "-c", mount, "sh")
    with running_node(tmp_path, *disk(tmp_path, "write_through"), slot_count=256, by=by) as node:
        client = node.client("w")
        names = [str(index) for index in range(20)]
        for name in names:
            assert client.put(keys_of(name, WHOLE), 0, filler(name)) == WHOLE
        stat = wait_for(client, lambda stat: stat.ssd["pauses"] > 0 and stat.ssd["dropped"] > 0)
        assert 0 < stat.ssd["blocks"] < len(names) * WHOLE
        for name in names:
            assert read(client, keys_of(name, WHOLE)) == whole(name)
        client.close()


@pytest.mark.parametrize("remote", [False, True])
def test_blocks_of_another_codec_are_refused_and_never_read(tmp_path: Path, remote: bool) -> None:
    with running_node(tmp_path, "--codec", "int8") as node:
        writer = node.client("w", codec=PayloadCodec.INT8)
        writer.put(keys_of("a", 2), 0, filler("a"))
        with pytest.raises(CodecMismatch, match="written as int8, fp8 is expected"):
            node.client("r", remote=remote, codec=PayloadCodec.FP8)
        # Who got in all the same, by whatever mistake, finds nothing that it would misread.
        reader = node.client("r", remote=remote, codec=PayloadCodec.INT8)
        assert read(reader, keys_of("a", 2)) == [content("a", 0), content("a", 1)]
        way: Any = reader._transfer
        assert isinstance(way, Sockets) == remote
        checking = way._pipeline if remote else way
        checking._codec = PayloadCodec.FP8
        out = memoryview(bytearray(reader.block_bytes))
        claim = reader.claim(keys_of("a", 2))
        with pytest.raises(BlockMissing, match="another one"):
            reader.read(claim, 0, out)
        with pytest.raises(BlockMissing, match="another one"):
            reader.fetch(keys_of("a", 1), [out])
        reader.close()
        writer.close()
