"""The KV store beside Mooncake's, Redis and Ray's object store: whole calls, in one run.

    python -m bench.kvstore_peers [--json FILE] [--quick]

Each peer runs as its makers advise for one machine (``bench/peers/kv_*.py``); all are asked turn
and turn about. What ours does in a call: a put computes a checksum, commits and is visible to every
process; a get finds the key, pins it, verifies it, hands over or copies the bytes and lets go. No
peer verifies anything. ``peers/setup.sh mooncake redis`` sets them up; who is missing is skipped.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from bench.frame import Bar, Options, Row, at_least, at_most, interleave, row, run, skipped
from bench.kvstore_node import running_node
from bench.peer_places import peers_home
from pdserve.ids import BlockKey, HostId
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.keys import block_keys, namespace_digest
from pdserve.wire.hosts import local_host_id

SCRIPTS = Path(__file__).parent / "peers"
NAMESPACE = namespace_digest(model="bench")
KIB, MIB = 1 << 10, 1 << 20
RING = 48  # values that are read in turn, as the peers do
MANY = 10
LINES_SHOWN = 10  # of what a peer said before it ended
LOOKED_UP = 128
CALLS = 5  # in one turn
SLOTS = 384
"""Of a node: what is read by both ways, what is put meanwhile, and what is to be found."""


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    python: Path
    script: str
    arguments: tuple[str, ...] = ()

    @property
    def missing(self) -> str:
        if self.python.exists():
            return ""
        return f"run bench/peers/setup.sh {self.python.parents[1].name}"


PEERS = {
    "mooncake_tcp": Peer(
        "Mooncake, TCP", peers_home() / "mooncake/bin/python", "kv_mooncake.py", ("tcp",)
    ),
    "mooncake_shm": Peer(
        "Mooncake, shared memory", peers_home() / "mooncake/bin/python", "kv_mooncake.py", ("shm",)
    ),
    "redis": Peer("Redis, Unix socket", peers_home() / "redis/bin/python", "kv_redis.py"),
    "ray": Peer("Ray's object store", Path(sys.executable), "kv_ray.py"),
}


class Asked:
    """A running peer; its answers are µs per call."""

    def __init__(self, process: "subprocess.Popen[str]", errors: IO[bytes]) -> None:
        self._process = process
        self._errors = errors
        assert self._read() == "ready"

    def __call__(self, operation: str, size: int) -> float:
        assert self._process.stdin is not None
        asked = {"op": operation, "bytes": size, "count": CALLS}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return float(statistics.median(self._read()))

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = b"".join(self._errors.readlines()[-LINES_SHOWN:]).decode(errors="replace")
            raise RuntimeError(f"{self._process.args!r} ended:\n{said}")
        return json.loads(line)


@contextlib.contextmanager
def running_peer(peer: Peer) -> Iterator[Asked]:
    errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed below)
    process = subprocess.Popen(
        [str(peer.python), str(SCRIPTS / peer.script), *peer.arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    try:
        yield Asked(process, errors)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.wait()
        process.stdout.close()
        errors.close()


class Ours:
    """One size of block at one node, by shared memory or by TCP."""

    def __init__(self, client: StoreClient) -> None:
        self._client = client
        size = client.block_bytes
        self._source = np.frombuffer(os.urandom(size), np.uint8)
        self._buffers = [memoryview(bytearray(size)) for _ in range(MANY)]
        self._numbers = itertools.count()
        self._kept: list[tuple[BlockKey, ...]] = []
        self._found = self._keys(LOOKED_UP)

    def put_us(self) -> float:
        keys = self._keys(1)
        return timed_us(lambda: _check(self._client.put(keys, 0, self._fill), 1))

    def put_for_reading(self) -> None:
        """Chains of ``MANY`` blocks, ``RING`` blocks and more in all."""
        while len(self._kept) * MANY < RING:
            keys = self._keys(MANY)
            _check(self._client.put(keys, 0, self._fill), MANY)
            self._kept.append(keys)

    def put_for_finding(self) -> None:
        _check(self._client.put(self._found, 0, self._fill), LOOKED_UP)

    def get_us(self) -> float:
        return timed_us(lambda: self._get(self._next_chain()[:1]))

    def get_many_us(self) -> float:
        return timed_us(lambda: self._get(self._next_chain()))

    def find_us(self) -> float:
        """And hold, and let go."""

        def find() -> None:
            claim = self._client.claim(self._found)
            _check(claim.count, LOOKED_UP)
            self._client.release(claim)

        return timed_us(find)

    def view_us(self) -> float:
        """Without a copy, as Ray gives numpy arrays."""
        keys = self._next_chain()[:1]

        def look() -> None:
            claim = self._client.claim(keys)
            _check(self._client.view(claim, 0).nbytes, self._client.block_bytes)
            self._client.release(claim)

        return timed_us(look)

    def _get(self, keys: tuple[BlockKey, ...]) -> None:
        _check(self._client.fetch(keys, self._buffers[: len(keys)]), len(keys))

    def _next_chain(self) -> tuple[BlockKey, ...]:
        self._kept.append(self._kept.pop(0))
        return self._kept[-1]

    def _keys(self, count: int) -> tuple[BlockKey, ...]:
        return tuple(block_keys(NAMESPACE, [next(self._numbers), *range(count - 1)], 1))

    def _fill(self, _: int, out: memoryview) -> None:
        np.copyto(np.frombuffer(out, np.uint8), self._source)


@contextlib.contextmanager
def ours(size: int) -> Iterator[tuple[Ours, Ours]]:
    """By shared memory, and by TCP."""
    with running_node(slot_count=SLOTS, block_bytes=size) as address:
        local = StoreClient(address, host=local_host_id(), owner="local", warm=True)
        remote = StoreClient(address, host=HostId("elsewhere"), owner="remote")
        both = Ours(local), Ours(remote)
        for each in both:
            each.put_for_reading()
        yield both
        local.close()
        remote.close()


def timed_us(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1e6


def _check(actual: int, expected: int) -> None:
    assert actual == expected, f"{actual}, {expected} expected"


def _median_of_calls(call: Callable[[], float]) -> Callable[[], float]:
    return lambda: statistics.median(call() for _ in range(CALLS))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row for each peer: ours against its, in µs."""

    what: str
    key: str  # of our samples
    operation: str  # of the peers
    size: int
    against: tuple[str, ...]
    bar: Bar | None = None


COMPARISONS = (
    Comparison(
        "put 1 MiB", "put", "put", MIB, ("mooncake_tcp", "redis"), at_most(0.25, of="ratio")
    ),
    Comparison("put 1 MiB", "put", "put", MIB, ("mooncake_shm",)),
    Comparison("put 1 MiB", "put", "put", MIB, ("ray",), at_most(1 / 1.5, of="ratio")),
    Comparison("get 1 MiB, copied", "get", "get", MIB, ("mooncake_shm", "redis")),
    Comparison("get 1 MiB, a view", "view", "get", MIB, ("ray",), at_most(1 / 3, of="ratio")),
    Comparison(
        "get 1 MiB over TCP", "tcp_get", "get", MIB, ("mooncake_tcp",), at_most(0.5, of="ratio")
    ),
    Comparison(
        "get 10 × 1 MiB over TCP", "tcp_many", "get_many", MIB, ("mooncake_tcp",),
        at_most(1 / 1.5, of="ratio"),
    ),
    Comparison("get 10 × 1 MiB, copied", "many", "get_many", MIB, ("mooncake_shm", "redis")),
    Comparison("get 16 KiB, copied", "small_get", "get", 16 * KIB, ("mooncake_shm", "redis")),
    Comparison("get 16 KiB over TCP", "small_tcp_get", "get", 16 * KIB, ("mooncake_tcp",)),
    Comparison(
        f"find {LOOKED_UP} blocks", "find", "present", 16 * KIB, ("mooncake_tcp", "redis")
    ),
)  # fmt: skip


def measure(options: Options) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        asked = {
            name: stack.enter_context(running_peer(peer))
            for name, peer in PEERS.items()
            if not peer.missing
        }
        local, remote = stack.enter_context(ours(MIB))
        small, small_remote = stack.enter_context(ours(16 * KIB))
        small.put_for_finding()
        measures: dict[str, Callable[[], float]] = {
            "put": local.put_us,
            "get": local.get_us,
            "many": local.get_many_us,
            "view": local.view_us,
            "tcp_get": remote.get_us,
            "tcp_many": remote.get_many_us,
            "small_get": small.get_us,
            "small_tcp_get": small_remote.get_us,
            "find": small.find_us,
        }
        measures = {name: _median_of_calls(call) for name, call in measures.items()}
        for comparison in COMPARISONS:
            for name in comparison.against:
                if name in asked:
                    key = f"{name} {comparison.operation} {comparison.size}"
                    measures[key] = _asking(asked[name], comparison)
        for call in measures.values():
            call()
        samples = interleave(options.rounds(40), **measures)
    for comparison in COMPARISONS:
        for name in comparison.against:
            yield _compared(comparison, name, samples)
    yield row("put 1 MiB", samples["put"], "µs", bar=at_most(250))
    yield row("get 1 MiB over TCP", samples["tcp_get"], "µs", bar=at_most(400))
    rates = [MANY * MIB / 1e3 / us for us in samples["tcp_many"]]
    yield row("get 10 × 1 MiB over TCP", rates, "GB/s", bar=at_least(2.2))
    yield row("get 16 KiB over TCP", samples["small_tcp_get"], "µs", bar=at_most(90))
    yield row(f"find {LOOKED_UP} blocks", samples["find"], "µs", bar=at_most(20))


def _asking(peer: Asked, comparison: Comparison) -> Callable[[], float]:
    return lambda: peer(comparison.operation, comparison.size)


def _compared(comparison: Comparison, name: str, samples: dict[str, list[float]]) -> Row:
    peer = PEERS[name]
    if peer.missing:
        return skipped(f"{comparison.what} beside {peer.name}", "µs", peer.missing)
    return row(
        comparison.what,
        samples[comparison.key],
        "µs",
        reference=peer.name,
        reference_samples=samples[f"{name} {comparison.operation} {comparison.size}"],
        bar=comparison.bar,
    )


if __name__ == "__main__":
    run("kvstore_peers", measure)
