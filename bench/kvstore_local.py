"""Reading on the node's own host, without asking it: lookups, claims, views and copies.

Part of ``python -m bench.kvstore``; ``python -m bench.kvstore_local`` has these rows alone. What is
read *first* has not been verified by this process, and was written a third of an arena before. A
plain copy or checksum that it is compared with goes through as much memory as the arena has,
written as long before and of the same kind: a file in ``/dev/shm``, whose pages are small ones.
"""

import itertools
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.frame import Options, Row, at_least, at_most, interleave, row, run
from bench.kvstore_node import running_node
from pdserve.ids import BlockKey
from pdserve.kvstore.arena import block_checksum
from pdserve.kvstore.claims import Claim
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.keys import block_keys, namespace_digest
from pdserve.kvstore.lending import INDEX_NAME
from pdserve.kvstore.shared_index import IndexReader, map_index
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id

KIB, MIB = 1 << 10, 1 << 20
GETS = {16 * KIB: 1024, MIB: 120, 16 * MIB: 12}
"""Bytes of a block, and slots of the arena."""

COPIED_SLOTS = 120
LOOKUPS = (24, 128, 247)
LOOKUP_LIMITS_US = {24: 15, 128: 20, 247: 25}
CLAIMED = 128
BATCH = 10
INDEXED = 4096
"""Blocks beside those looked up, so that a lookup does not stay in the first-level cache."""

NAMESPACE = namespace_digest(model="bench local")

_HOLDER = """
import json, sys, threading
from bench.kvstore_local import connect, keys_of
from pdserve.messages import Address
client = connect(Address(**json.loads(sys.argv[1])), "holder")
claim = client.claim(keys_of(0, 128))
print(claim.count, client.counters["claims_local"], flush=True)
threading.Event().wait()
"""


def connect(address: Address, owner: str) -> StoreClient:
    return StoreClient(address, host=local_host_id(), owner=owner)


def keys_of(prompt: int, count: int) -> tuple[BlockKey, ...]:
    return block_keys(NAMESPACE, [prompt, *range(count * 4 - 1)], 4)


def leave(_: int, out: memoryview) -> None:
    """A block is what was in its slot."""


def measure_local(options: Options) -> Iterator[Row]:
    for block_bytes, slot_count in GETS.items():
        with running_node(slot_count=slot_count, block_bytes=block_bytes) as address:
            yield from _gets(options, address, block_bytes, slot_count)
    with running_node(slot_count=COPIED_SLOTS, block_bytes=MIB) as address:
        yield from _prefixes(options, address)
    with running_node(slot_count=2 * INDEXED, block_bytes=64) as address:
        yield from _lookups(options, address)
        yield from _deaths(options, address)


class _Fresh:
    """Blocks that were written some time ago, and memory of the same age to compare with."""

    def __init__(self, address: Address, block_bytes: int, slot_count: int) -> None:
        self.block_bytes = block_bytes
        self._writer = connect(address, "writer")
        self._prompts = itertools.count(1)
        self._pattern = np.ones(block_bytes, np.uint8)
        self._written, self._read = _shared_memory(slot_count, block_bytes)
        self._written[:] = 1
        self._rows = itertools.cycle(range(slot_count))
        self.out = memoryview(bytearray(block_bytes))
        self._target = np.frombuffer(self.out, np.uint8)

    def prompts(self, count: int, length: int = 1) -> list[tuple[BlockKey, ...]]:
        """Stored now, for the first time, all before the first of them is returned."""
        prompts = [keys_of(next(self._prompts), length) for _ in range(count)]
        for keys in prompts:
            assert self._writer.put(keys, 0, self.fill) == length
        return prompts

    def fill(self, _: int, out: memoryview) -> None:
        np.copyto(np.frombuffer(out, np.uint8), self._pattern)

    def checksums(self, count: int) -> Iterator[float]:
        """Of blocks of that memory, one by one: seconds."""
        for block in self._aged(count):
            began_s = time.perf_counter()
            block_checksum(BlockKey(b"k" * 16), block.data)
            yield time.perf_counter() - began_s

    def copies(self, count: int) -> Iterator[float]:
        """As ``checksums``, of plain copies."""
        for block in self._aged(count):
            began_s = time.perf_counter()
            np.copyto(self._target, block)
            yield time.perf_counter() - began_s

    def _aged(self, count: int) -> list[NDArray[np.uint8]]:
        """Written as ``prompts`` does it, all before the first is returned."""
        rows = [next(self._rows) for _ in range(count)]
        for each in rows:
            np.copyto(self._written[each], self._pattern)
        return [self._read[each] for each in rows]

    def gb_per_s(self, taken_s: Iterable[float], length: int = 1) -> float:
        """The median of things done to ``length`` blocks each."""
        return length * self.block_bytes / statistics.median(taken_s) / 1e9

    def close(self) -> None:
        self._writer.close()


def _gets(options: Options, address: Address, block_bytes: int, slot_count: int) -> Iterator[Row]:
    fresh, reader = _Fresh(address, block_bytes, slot_count), connect(address, "reader")
    count = slot_count // 3

    def get(keys: tuple[BlockKey, ...]) -> float:
        began_s = time.perf_counter()
        claim = reader.claim(keys)
        reader.view(claim, 0)
        elapsed_s = time.perf_counter() - began_s
        reader.release(claim)
        return elapsed_s

    measures = {
        "first": lambda: fresh.gb_per_s(get(keys) for keys in fresh.prompts(count)),
        "checksum": lambda: fresh.gb_per_s(fresh.checksums(count)),
    }
    interleave(5, **measures)  # every page touched by everybody
    samples = interleave(options.rounds(30), **measures)
    (known,) = fresh.prompts(1)
    get(known)
    again_us = [get(known) * 1e6 for _ in range(options.rounds(5000))]
    size = f"{block_bytes // KIB} KiB" if block_bytes < MIB else f"{block_bytes // MIB} MiB"
    yield row(f"get without a copy, {size}", again_us, "µs", bar=at_most(25))
    yield row(f"the same, 99th percentile, {size}", again_us, "µs", bar=at_most(150), at=0.99)
    yield row(
        f"first get, {size}",
        samples["first"],
        "GB/s",
        reference="its checksum alone",
        reference_samples=samples["checksum"],
        # A smaller block's checksum takes hardly longer than to find and pin it, with cold caches.
        bar=at_least(0.8, of="ratio") if block_bytes > MIB else None,
    )
    fresh.close()
    reader.close()


def _prefixes(options: Options, address: Address) -> Iterator[Row]:
    fresh, reader = _Fresh(address, MIB, COPIED_SLOTS), connect(address, "reader")
    count = COPIED_SLOTS // 3 // BATCH * BATCH

    def read(claim: Claim, index: int) -> None:
        reader.read(claim, index, fresh.out)

    def gets(get: Callable[[Claim, int], object], length: int) -> Iterator[float]:
        """Of each claim and what is done with its blocks, without the release: seconds."""
        for keys in fresh.prompts(count // length, length):
            began_s = time.perf_counter()
            claim = reader.claim(keys)
            for index in range(length):
                get(claim, index)
            yield time.perf_counter() - began_s
            reader.release(claim)

    measures = {
        "views": lambda: fresh.gb_per_s(gets(reader.view, BATCH), BATCH),
        "checksum": lambda: fresh.gb_per_s(fresh.checksums(count)),
        "one": lambda: fresh.gb_per_s(gets(read, 1)),
        "batch": lambda: fresh.gb_per_s(gets(read, BATCH), BATCH),
        "copy": lambda: fresh.gb_per_s(fresh.copies(count)),
    }
    interleave(5, **measures)  # every page touched by everybody
    samples = interleave(options.rounds(50), **measures)
    verified = reader.counters["blocks_verified"]
    assert verified == reader.counters["blocks_restored"], "each was read for the first time"
    yield row(
        f"first get, prefix of {BATCH} x 1 MiB",
        samples["views"],
        "GB/s",
        reference="their checksums alone",
        reference_samples=samples["checksum"],
    )
    yield row(
        "get of 1 MiB, copied and verified",
        samples["one"],
        "GB/s",
        reference="memcpy out of 126 MB shared",
        reference_samples=samples["copy"],
        bar=at_least(0.6, of="ratio"),
    )
    taken_us = [MIB / sample / 1e3 for sample in samples["one"]]
    yield row("the same", taken_us, "µs", bar=at_most(160))
    yield row(
        f"get of {BATCH} blocks of 1 MiB, verified",
        samples["batch"],
        "GB/s",
        reference="memcpy out of 126 MB shared",
        reference_samples=samples["copy"],
        bar=at_least(8),
    )
    fresh.close()
    reader.close()


def _lookups(options: Options, address: Address) -> Iterator[Row]:
    client = connect(address, "reader")
    keys = keys_of(0, max(LOOKUPS))
    client.put(keys, 0, leave)
    for prompt in range(1, INDEXED // 128):
        client.put(keys_of(prompt, 128), 0, leave)
    index = _index_of(address)

    def look_up(count: int) -> Callable[[], float]:
        asked = keys[:count]

        def lookup() -> float:
            began_s = time.perf_counter()
            found = len(index.lookup(b"".join(asked)))
            elapsed_s = time.perf_counter() - began_s
            assert found == count
            return elapsed_s * 1e6

        return lookup

    def claim() -> float:
        asked = keys[:CLAIMED]
        began_s = time.perf_counter()
        claim = client.claim(asked)
        elapsed_s = time.perf_counter() - began_s
        assert claim.count == CLAIMED
        client.release(claim)
        return elapsed_s * 1e6

    def many() -> float:
        asked = keys[:128]
        began_s = time.perf_counter()
        for _ in range(100):
            index.lookup(b"".join(asked))
        return 100 * 128 / (time.perf_counter() - began_s) / 1e6

    named = {f"lookup_{count}": look_up(count) for count in LOOKUPS}
    samples = interleave(options.rounds(1000), claim=claim, **named)
    many_samples = [many() for _ in range(options.rounds(50))]
    for count in LOOKUPS:
        yield row(
            f"lookup of {count} blocks",
            samples[f"lookup_{count}"],
            "µs",
            bar=at_most(LOOKUP_LIMITS_US[count]),
        )
    yield row("lookups, 128 blocks at once", many_samples, "M keys/s", bar=at_least(4))
    yield row(f"claim of {CLAIMED} blocks", samples["claim"], "µs", bar=at_most(80))
    client.close()


def _deaths(options: Options, address: Address) -> Iterator[Row]:
    """``kill -9`` of a process that holds 128 blocks, until the node has them back."""
    client = connect(address, "auditor")

    def death() -> float:
        command = (sys.executable, "-c", _HOLDER, json.dumps(asdict(address)))
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "128 1\n"
        assert client.stat().slots_pinned == 128
        began_s = time.perf_counter()
        holder.send_signal(signal.SIGKILL)
        while client.stat().slots_pinned:
            pass
        elapsed_s = time.perf_counter() - began_s
        holder.wait()
        holder.stdout.close()
        return elapsed_s * 1e3

    samples = [death() for _ in range(options.rounds(15))]
    yield row("a killed reader's pins are gone", samples, "ms", bar=at_most(250), at=1.0)
    client.close()


def _shared_memory(row_count: int, row_bytes: int) -> list[NDArray[np.uint8]]:
    """Mapped twice: a block's writer and its reader are two processes."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(row_count * row_bytes)
        mapped = [mmap.mmap(file.fileno(), row_count * row_bytes) for _ in range(2)]
    return [np.frombuffer(each, np.uint8).reshape(row_count, row_bytes) for each in mapped]


def _index_of(address: Address) -> IndexReader:
    """As a client maps it."""
    store_id = Path(address.unix_path).stem
    path = Path("/dev/shm") / f"pdserve-{os.getuid()}" / store_id / INDEX_NAME
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return map_index(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    run("kvstore_local", measure_local)
