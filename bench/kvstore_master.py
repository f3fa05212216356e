"""C16: a master of a million blocks is killed; how long until its standby knows all of them again.

    python -m bench.kvstore_master [--json FILE] [--quick]

Two real masters over a file, real sockets, and store nodes that are synthetic: processes of the
store's protocol that have an inventory of random keys and no arena. One real node beside them is
read from all the while by a client on its host, which is not to notice. What is measured is from
``kill -9`` of the leader until the standby locates a block of every node; that it has every block
then is asserted. An idle machine is assumed: masters, nodes and clients share its cores.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.frame import Options, Row, at_most, row, run
from bench.kvstore_node import running_node
from pdserve.errors import StoreUnavailable
from pdserve.ids import BLOCK_KEY_BYTES, BlockKey, StoreId
from pdserve.kvstore import protocol
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.keys import block_keys, namespace_digest
from pdserve.kvstore.masters.client import MasterClient
from pdserve.kvstore.masters.mastering import AskDeltas, Deltas
from pdserve.kvstore.masters.membership import Membership
from pdserve.kvstore.masters.metadata import EmbeddedMetadata
from pdserve.kvstore.masters.protocol import AskMaster, MasterReport
from pdserve.messages import Address
from pdserve.wire.connection import Connection
from pdserve.wire.hosts import local_host_id
from pdserve.wire.listener import Listener

BLOCKS = 1_000_000
NODES = 4
READ_BLOCKS = 16
LOCATION_BYTES_MAX = 50
PATIENCE_S = 60.0


def measure(options: Options) -> Iterator[Row]:
    rebuilds_s: list[float] = []
    failed_gets: list[float] = []
    longest_ms: list[float] = []
    index_bytes: list[float] = []
    for _ in range(options.rounds(5)):
        found = _killed_master(BLOCKS)
        rebuilds_s.append(found.rebuilt_s)
        failed_gets.append(float(found.failed_gets))
        longest_ms.append(found.longest_get_ms)
        index_bytes.append(found.bytes_per_location)
    yield row("C16 master kill -9 to 1 M blocks located again", rebuilds_s, "s", bar=at_most(3.0))
    yield row("C16 local gets that failed meanwhile", failed_gets, "gets", bar=at_most(0))
    yield row("longest local get of 16 blocks meanwhile", longest_ms, "ms")
    yield row("master's index per location", index_bytes, "bytes", bar=at_most(LOCATION_BYTES_MAX))


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    rebuilt_s: float
    failed_gets: int
    longest_get_ms: float
    bytes_per_location: float


def _killed_master(blocks: int) -> _Found:
    with contextlib.ExitStack() as ending:
        directory = Path(tempfile.mkdtemp())
        ending.callback(shutil.rmtree, directory, ignore_errors=True)
        metadata = directory / "members.sqlite"
        masters = [ending.enter_context(_master(directory, f"m{index}")) for index in range(2)]
        samples = [
            ending.enter_context(_synthetic_node(directory, index, blocks // NODES))
            for index in range(NODES)
        ]
        real = ending.enter_context(
            running_node("--metadata", str(metadata), slot_count=4 * READ_BLOCKS)
        )
        clients = [MasterClient([address], name="bench") for _, address in masters]
        for client in clients:
            ending.callback(client.close)
        reader = _Reader(real)
        ending.callback(reader.close)
        leading, _ = _wait_until_whole(clients, blocks + READ_BLOCKS)
        reading = threading.Thread(target=reader.run)
        reading.start()
        try:
            began_s = time.perf_counter()
            os.kill(masters[leading][0], signal.SIGKILL)
            standby = clients[1 - leading]
            while not all(_is_located(standby, key) for key in samples):
                assert time.perf_counter() - began_s < PATIENCE_S
            rebuilt_s = time.perf_counter() - began_s
        finally:
            reader.stopped.set()
            reading.join()
        _, report = _wait_until_whole([standby], blocks + READ_BLOCKS)
        return _Found(
            rebuilt_s, reader.failed, reader.longest_s * 1e3, report.index_bytes / report.locations
        )


def _wait_until_whole(clients: list[MasterClient], blocks: int) -> tuple[int, MasterReport]:
    """Which of the masters leads, and what it says, once it knows all."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        for index, client in enumerate(clients):
            report = _report(client)
            if report and report.epoch and report.is_whole and report.blocks == blocks:
                return index, report
        assert time.monotonic() < until_s, "the index never became whole"
        time.sleep(0.05)


def _report(client: MasterClient) -> MasterReport | None:
    """None where it does not answer just now: on a busy machine it may have to wait for a core."""
    try:
        return client.call(AskMaster(), MasterReport)
    except StoreUnavailable:
        return None


def _is_located(client: MasterClient, key: BlockKey) -> bool:
    try:
        return bool(client.locate([key]))
    except StoreUnavailable:
        return False


class _Reader:
    """Reads blocks on the host of the real node, verified, again and again."""

    def __init__(self, address: Address) -> None:
        self._client = StoreClient(address, host=local_host_id(), owner="reader")
        self._keys = block_keys(namespace_digest(model="bench"), list(range(READ_BLOCKS)), 1)
        stored = self._client.put(self._keys, 0, _nothing)
        assert stored == READ_BLOCKS
        self._out = memoryview(bytearray(self._client.block_bytes))
        self.stopped = threading.Event()
        self.failed = 0
        self.longest_s = 0.0

    def run(self) -> None:
        while not self.stopped.is_set():
            began_s = time.perf_counter()
            claim = self._client.claim(self._keys)
            for index in range(claim.count):
                self._client.read(claim, index, self._out)
            self.failed += READ_BLOCKS - claim.count
            self._client.release(claim)
            self.longest_s = max(self.longest_s, time.perf_counter() - began_s)
            time.sleep(0.001)

    def close(self) -> None:
        self._client.close()


def _nothing(_: int, __: memoryview) -> None:
    """Leaves a block's bytes as they are."""


# ── processes ────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _started(*command: str) -> Iterator[tuple[int, dict[str, str]]]:
    """A process that prints a line of JSON, and ends with its input."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.pid, json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


@contextlib.contextmanager
def _master(directory: Path, name: str) -> Iterator[tuple[int, Address]]:
    where = ("--directory", str(directory / "sockets"), "--master", name)
    with _started(
        "pdserve.kvstore.masters.process",
        *where,
        *("--metadata", str(directory / "members.sqlite")),
    ) as (pid, said):
        yield pid, Address(**said["address"])  # type: ignore[arg-type]


@contextlib.contextmanager
def _synthetic_node(directory: Path, index: int, blocks: int) -> Iterator[BlockKey]:
    """One of its keys."""
    with _started("bench.kvstore_master", "--node", str(directory), str(index), str(blocks)) as (
        _,
        said,
    ):
        yield BlockKey(bytes.fromhex(said["key"]))


async def _serve_inventory(directory: Path, index: int, blocks: int) -> None:
    store_id = StoreId(f"synthetic-{index}")
    inventory = os.urandom(blocks * BLOCK_KEY_BYTES)
    epochs: list[int] = []

    async def serve(connection: Connection) -> None:
        while True:
            frame = await connection.receive()
            match frame.message:
                case protocol.Greet():
                    await connection.answer(frame, protocol.Welcome(store_id, 1, ""))
                case AskDeltas(after=after):
                    is_whole = after < 0
                    deltas = Deltas(
                        epoch=epochs[0],
                        after=after,
                        sequence=0,
                        is_whole=is_whole,
                        added=blocks if is_whole else 0,
                        removed=0,
                        slots_free=0,
                        block_bytes=1,
                        codec=0,
                        is_draining=False,
                    )
                    await connection.answer(frame, deltas, (inventory,) if is_whole else ())

    listener = await Listener.open(
        directory / "sockets",
        f"{store_id}.sock",
        host=local_host_id(),
        serve=serve,
        codec=protocol.PROTOCOL,
    )
    membership = Membership(EmbeddedMetadata(directory / "members.sqlite"))
    epochs.append(membership.join(store_id, listener.address).epoch)
    print(json.dumps({"key": inventory[-BLOCK_KEY_BYTES:].hex()}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await listener.close()


def _node(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("index", type=int)
    parser.add_argument("blocks", type=int)
    given = parser.parse_args(arguments)
    asyncio.run(_serve_inventory(given.directory, given.index, given.blocks))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--node"]:
        _node(sys.argv[2:])
    else:
        run("kvstore_master", measure)
