"""The disk below the arena beside the same file system, written and read directly, in one run.

    python -m bench.kvstore_ssd [--json FILE] [--quick] [--directory DIR]

A prompt's blocks go down by way of the tier as in a node (books, checksums, threads and all), and
come up again. The bare disk is a file, written and read with ``O_DIRECT`` in pieces of the same
sizes, one after the other; nothing is synced on either side. What is compared is the speed that the
better tenth of the rounds reached: the tier needs a core now and then, and where others have it
the bare disk is ahead by what they take. ``bench.kvstore`` runs this too.
"""

import argparse
import asyncio
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bench.frame import Options, Row, at_least, at_most, interleave, row, run, skipped
from pdserve.ids import BlockKey, new_store_id
from pdserve.kvstore.arena import Geometry, block_checksum, create_arena
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.keys import block_keys, namespace_digest
from pdserve.kvstore.ssd.disk_file import aligned_buffer, files_of
from pdserve.kvstore.ssd.format import Kind, batch_bytes
from pdserve.kvstore.ssd.log import open_log
from pdserve.kvstore.ssd.tier import SsdTier

RAW_BYTES = 30 * 2 * 3 * 16 * 64 * 2  # of a block: 16 tokens of SmolLM2 in bfloat16
CODED_BYTES = 30 * 2 * 3 * 16 * 66  # and in 8 bits: not whole pages
BLOCK_COUNT = 88
BLOCK_TOKENS = 16
AT_ONCE = 3
"""Prompts that are found at about the same time, and go down one after the other."""

LOG_BYTES = 2 << 30
NAMESPACE = namespace_digest(model="bench")


def keys_of(prompt: int) -> tuple[BlockKey, ...]:
    tokens = [prompt, *range(BLOCK_COUNT * BLOCK_TOKENS - 1)]
    return block_keys(NAMESPACE, tokens, BLOCK_TOKENS)


class Tier:
    """A tier over an arena of a few prompts, in an event loop of its own, as in a node."""

    def __init__(self, directory: Path, shared: Path, block_bytes: int) -> None:
        self._bytes = BLOCK_COUNT * block_bytes
        geometry = Geometry(AT_ONCE * BLOCK_COUNT, block_bytes)
        store_id = new_store_id()
        self._arena = create_arena(shared / store_id, geometry, store_id)
        self._log = open_log(directory, block_bytes, LOG_BYTES)
        self._core = StoreCore(geometry.slot_count, lower=self._log)
        self._owner = self._core.connect("bench")
        self._prompts = itertools.count()
        self._payload = memoryview(np.random.default_rng(0).bytes(block_bytes))
        self._below: list[tuple[BlockKey, ...]] = []
        self._runner = asyncio.Runner()
        self._tier = SsdTier(self._core, self._arena, self._log)
        self.write()

    def _put(self) -> tuple[BlockKey, ...]:
        """A new prompt in the arena; what was there leaves it."""
        core, keys = self._core, keys_of(next(self._prompts))
        grant = core.reserve(self._owner, keys, 0)
        for position, slot in enumerate(grant.slots):
            self._arena.write(slot, self._payload)
            checksum = block_checksum(keys[position], self._arena.payload(slot))
            core.filled(self._owner, grant.write, position, checksum)
        assert core.commit(self._owner, grant.write) == BLOCK_COUNT
        return keys

    def write(self) -> float:
        """GB/s of prompts that go down."""

        async def down() -> float:
            writing = asyncio.create_task(self._tier.run())
            began_s = time.perf_counter()
            for keys in self._below:
                self._tier.found(keys)
            await self._tier.finish()
            elapsed_s = time.perf_counter() - began_s
            writing.cancel()
            return elapsed_s

        self._below = [self._put() for _ in range(AT_ONCE)]
        elapsed_s = self._runner.run(down())
        assert all(key in self._log for keys in self._below for key in keys)
        return AT_ONCE * self._bytes / elapsed_s / 1e9

    def read(self) -> float:
        """GB/s of a prompt that went down last, when it comes up."""
        for _ in range(AT_ONCE):
            self._put()
        below = self._below[0]
        began_s = time.perf_counter()
        self._runner.run(self._tier.fetch(below))
        elapsed_s = time.perf_counter() - began_s
        assert self._core.prefix_count(below) == BLOCK_COUNT
        return self._bytes / elapsed_s / 1e9

    def close(self) -> None:
        self._runner.close()
        self._tier.close()


class BareDisk:
    """One file, in the pieces that a tier writes and reads."""

    def __init__(self, path: Path, block_bytes: int) -> None:
        kind = Kind(block_bytes, PayloadCodec.UNSTATED)
        self._path = path
        self._piece = aligned_buffer(batch_bytes(kind, kind.batch_blocks))
        self._piece[:] = np.random.default_rng(1).bytes(len(self._piece))
        self._bytes = BLOCK_COUNT * kind.padded_bytes
        self._descriptor = self._open()
        self._end = 0
        self.write()

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)

    def write(self) -> float:
        """Behind what is there, as a log is; a new file when it is as long as a segment."""
        if self._end >= 256 << 20:
            os.close(self._descriptor)
            self._path.unlink()
            self._descriptor, self._end = self._open(), 0
        size, at = AT_ONCE * self._bytes, self._end
        self._end += size
        return self._through(lambda part, to: os.pwrite(self._descriptor, part, at + to), size)

    def read(self) -> float:
        at = self._end - self._bytes
        return self._through(
            lambda part, to: os.preadv(self._descriptor, [part], at + to), self._bytes
        )

    def _through(self, move: Callable[[memoryview, int], int], size: int) -> float:
        began_s = time.perf_counter()
        for to in range(0, size, len(self._piece)):
            part = self._piece[: size - to]
            assert move(part, to) == len(part)
        return size / (time.perf_counter() - began_s) / 1e9

    def close(self) -> None:
        os.close(self._descriptor)


def measure_ssd(options: Options, directory: Path | None = None) -> Iterator[Row]:
    with (
        tempfile.TemporaryDirectory(dir=directory) as disk,
        tempfile.TemporaryDirectory(dir="/dev/shm") as shared,
    ):
        if not files_of(Path(disk)).direct:
            yield skipped("blocks to a disk", "GB/s", f"{disk} has no O_DIRECT")
            return
        for name, block_bytes in (("", RAW_BYTES), (", 8-bit", CODED_BYTES)):
            bare = BareDisk(Path(disk) / f"bare{block_bytes}", block_bytes)
            tier = Tier(Path(disk) / f"log{block_bytes}", Path(shared), block_bytes)
            samples = interleave(
                options.rounds(20),
                bare_write=bare.write,
                write=tier.write,
                bare_read=bare.read,
                read=tier.read,
            )
            bare.close()
            tier.close()
            for what, limit in (("write", 0.8), ("read", 0.85)):
                yield row(
                    f"{what} a prompt{name}, disk",
                    samples[what],
                    "GB/s",
                    reference=f"bare O_DIRECT {what}",
                    reference_samples=samples[f"bare_{what}"],
                    bar=at_least(limit, of="ratio"),
                    at=0.9,
                )
        yield from _opening(options, Path(disk))


def _opening(options: Options, disk: Path) -> Iterator[Row]:
    """A log is opened by its indexes: in the time of a fraction of its bytes."""
    directory = disk / f"log{RAW_BYTES}"

    def opening() -> float:
        began_s = time.perf_counter()
        log = open_log(directory, RAW_BYTES, LOG_BYTES)
        elapsed_s = time.perf_counter() - began_s
        assert len(log) > BLOCK_COUNT
        log.close()
        return elapsed_s * 1e3

    samples = interleave(options.rounds(20), opening=opening)
    held_gb = sum(path.stat().st_size for path in directory.glob("*.seg")) / 1e9
    yield row(f"open a log of {held_gb:.1f} GB", samples["opening"], "ms", bar=at_most(100))


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directory", type=Path, help="on the disk to measure")


if __name__ == "__main__":
    run(
        "kvstore_ssd",
        lambda options: measure_ssd(options, options.arguments.directory),
        add_arguments=_arguments,
    )
