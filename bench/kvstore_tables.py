"""What a resident block costs in memory, and what a node gets back from one that was killed.

Part of ``python -m bench.kvstore``; ``python -m bench.kvstore_tables`` has these rows alone.
Memory is that of a process of its own, which builds a core with so many blocks and looks at its
resident set before and after; the arena's headers and the shared index, which have a fixed size per
slot, are added to it. The peer is the obvious table: a dictionary of keys to small objects.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.frame import Options, Row, at_least, at_most, row, run
from pdserve.ids import BlockKey
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.headers import HEADER_BYTES
from pdserve.kvstore.shared_index import index_bytes
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id

BLOCKS, BLOCKS_QUICK = 1_000_000, 200_000
CHAIN = 250
LOOKED_UP = 247
LOOKUPS = 400
ADOPTED = 100_000
SMALL_BLOCK_BYTES = 4096
KEY_BYTES = 16
LANE_BYTES = 4
"""Per slot, of the node's own beside the shared index: where it has listed a block."""


def measure_tables(options: Options) -> Iterator[Row]:
    count = BLOCKS_QUICK if options.quick else BLOCKS
    ours, plain = _in_a_process("core", count), _in_a_process("plain", count)
    shared = HEADER_BYTES + LANE_BYTES + index_bytes(count) / count
    yield row(
        f"metadata per block, {count:,} blocks, all processes",
        [ours.bytes / count + shared],
        "B",
        reference="a dictionary of objects, headers and index added",
        reference_samples=[plain.bytes / count + shared],
        # With fewer blocks, what has a fixed size (the feed's last changes) shows in each.
        bar=None if options.quick else at_most(200),
    )
    megabytes = (ours.resident + shared * count) / 1e6
    bar = None if options.quick else at_most(256)
    yield row(f"a core with {count:,} blocks, whole process", [megabytes], "MB", bar=bar)
    yield row(f"building it, {count:,} blocks", [ours.seconds], "s")
    yield row(
        f"lookup of {LOOKED_UP} blocks in it, p99", ours.lookup_us, "µs", bar=at_most(100), at=0.99
    )
    yield from _adoption()


def _adoption() -> Iterator[Row]:
    chains = list(_chains(ADOPTED))
    with tempfile.TemporaryDirectory() as directory:
        node, address, _ = _start(directory)
        client = StoreClient(address, host=local_host_id(), owner="w")
        for keys in chains:
            client.put(keys, 0, _fill)
        committed = client.stat().slots_committed
        client.close()
        os.kill(node.pid, signal.SIGKILL)
        node.wait()
        node, address, started_s = _start(directory)
        client = StoreClient(address, host=local_host_id(), owner="r")
        back = 0
        for keys in chains:
            claim = client.claim(keys)
            back += claim.count
            client.release(claim)
        client.close()
        assert node.stdin is not None
        node.stdin.close()
        node.wait()
    yield row(
        f"of {committed:,} blocks back after kill -9", [back / committed], "", bar=at_least(0.999)
    )
    yield row(f"start over an arena of {committed:,} blocks", [started_s], "s", bar=at_most(2.0))


def _start(directory: str) -> tuple[subprocess.Popen[bytes], Address, float]:
    began_s = time.monotonic()
    node = subprocess.Popen(
        [
            *(sys.executable, "-m", "pdserve.kvstore.node", "--directory", directory),
            *("--arena-bytes", str(ADOPTED * SMALL_BLOCK_BYTES)),
            *("--block-bytes", str(SMALL_BLOCK_BYTES), "--store-id", Path(directory).name),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert node.stdout is not None
    address = Address(**json.loads(node.stdout.readline())["address"])
    return node, address, time.monotonic() - began_s


def _fill(index: int, out: memoryview) -> None:
    out[:8] = index.to_bytes(8, "little")


def _chains(count: int) -> Iterator[list[BlockKey]]:
    chance = random.Random(1)
    for _ in range(count // CHAIN):
        yield [BlockKey(chance.randbytes(KEY_BYTES)) for _ in range(CHAIN)]


# ── in a process of its own ──────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Built:
    bytes: int  # of its resident set, more than before
    resident: int
    seconds: float
    lookup_us: list[float]


def _in_a_process(what: str, count: int) -> _Built:
    command = [sys.executable, "-m", "bench.kvstore_tables", "build", what, str(count)]
    return _Built(**json.loads(subprocess.check_output(command)))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _build(what: str, count: int) -> None:
    """Prints what it took."""
    before, began_s = _resident(), time.perf_counter()
    lookups: list[float] = []
    if what == "core":
        core = StoreCore(count)
        owner = core.connect("w")
        for keys in _chains(count):
            write = core.reserve(owner, keys, 0)
            for position in range(len(write.slots)):
                core.filled(owner, write.write, position, position)
            core.commit(owner, write.write)
            core.take_changed_slots()
        seconds = time.perf_counter() - began_s
        for keys, _ in zip(_chains(count), range(LOOKUPS), strict=False):
            asked = keys[:LOOKED_UP]
            began_s = time.perf_counter()
            core.prefix_count(asked)
            lookups.append((time.perf_counter() - began_s) * 1e6)
    else:
        table = {key: _Plain() for keys in _chains(count) for key in keys}
        seconds = time.perf_counter() - began_s
        assert len(table) == count
    resident = _resident()
    print(json.dumps(asdict(_Built(resident - before, resident, seconds, lookups))))


class _Plain:
    __slots__ = ("checksum", "children", "generation", "last_use", "parent", "pins", "state")

    def __init__(self) -> None:
        self.state, self.generation, self.checksum = "committed", 1, 1 << 60
        self.parent, self.children, self.pins, self.last_use = None, 0, 0, 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"]:
        _build(sys.argv[2], int(sys.argv[3]))
    else:
        run("kvstore_tables", measure_tables)
