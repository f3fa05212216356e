"""What tests of the store share: real node processes, clients, blocks that can be recognised."""

import contextlib
import json
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pdserve.ids import BlockKey, HostId
from pdserve.kvstore.answers import StoreStat
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.keys import block_keys, namespace_digest
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id

BLOCK_BYTES = 4096 + 32  # not a multiple of the alignment
NAMESPACE = namespace_digest(model="test")
ELSEWHERE = HostId("elsewhere")
PATIENCE_S = 60.0


@dataclass
class Node:
    process: subprocess.Popen[str]
    address: Address

    @property
    def pid(self) -> int:
        return self.process.pid

    def client(
        self,
        owner: str,
        *,
        remote: bool = False,
        verify: bool = True,
        codec: PayloadCodec | None = None,
        corrupt: Callable[[memoryview], None] | None = None,
        shared_memory: bool = True,
        ssl_context: ssl.SSLContext | None = None,
        token: str = "",
        mooncake: bool = False,
    ) -> StoreClient:
        """Through shared memory, or with ``remote`` over TCP."""
        return StoreClient(
            self.address,
            host=ELSEWHERE if remote else local_host_id(),
            owner=owner,
            verify=verify,
            codec=codec,
            corrupt=corrupt,
            shared_memory=shared_memory,
            ssl_context=ssl_context,
            token=token,
            mooncake=mooncake,
        )

    def stop(self) -> int:
        """End it as its parent's death would, and wait."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(PATIENCE_S)


def start_node(
    directory: Path,
    *arguments: str,
    slot_count: int = 16,
    shared: Path | None = None,
    by: tuple[str, ...] = (),
) -> Node:
    """A node process that serves. Its shared memory is below ``directory`` unless said otherwise:
    any file system will do for a test. ``by``: the command that becomes it."""
    stride_bytes = -(-BLOCK_BYTES // 64) * 64
    process = subprocess.Popen(
        [
            *by,
            sys.executable,
            *("-m", "pdserve.kvstore.node"),
            *("--directory", str(directory / "sockets")),
            *("--shared", str(shared or directory / "shared")),
            *("--arena-bytes", str(slot_count * stride_bytes)),
            *("--block-bytes", str(BLOCK_BYTES)),
            *("--tcp-host", "127.0.0.1"),
            *arguments,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the node ended with {process.wait(PATIENCE_S)}"
    ready = json.loads(line)
    assert ready["pid"] == process.pid
    return Node(process, Address(**ready["address"]))


@contextlib.contextmanager
def running_node(
    directory: Path,
    *arguments: str,
    slot_count: int = 16,
    shared: Path | None = None,
    by: tuple[str, ...] = (),
) -> Iterator[Node]:
    node = start_node(directory, *arguments, slot_count=slot_count, shared=shared, by=by)
    try:
        yield node
    finally:
        node.process.kill()
        node.process.wait(PATIENCE_S)
        for pipe in (node.process.stdin, node.process.stdout):
            assert pipe is not None
            pipe.close()


def keys_of(name: str, count: int) -> list[BlockKey]:
    return list(block_keys(NAMESPACE, list(range(count * 4)), 4, tenant=name))


def content(name: str, index: int) -> bytes:
    """Bytes that no other block has, at every place of the block."""
    return (f"{name}/{index}/" * BLOCK_BYTES).encode()[:BLOCK_BYTES]


def filler(name: str) -> Callable[[int, memoryview], None]:
    def fill(index: int, out: memoryview) -> None:
        out[:] = content(name, index)

    return fill


def read(client: StoreClient, keys: list[BlockKey]) -> list[bytes]:
    """The bytes of the longest stored prefix."""
    claim = client.claim(keys)
    out = bytearray(client.block_bytes)
    blocks = []
    for index in range(claim.count):
        client.read(claim, index, memoryview(out))
        blocks.append(bytes(out))
    client.release(claim)
    return blocks


def wait_for(client: StoreClient, condition: Callable[[StoreStat], bool]) -> StoreStat:
    """Ask until it is so; each question is a round trip through the node."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        stat = client.stat()
        if condition(stat):
            return stat
        assert time.monotonic() < until_s, f"still {stat}"


def flip(view: memoryview) -> None:
    view[11] ^= 4
