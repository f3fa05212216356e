"""What the store's benchmarks start beside themselves: a node, and a bare peer for comparison."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator

from pdserve.kvstore.child import child_node
from pdserve.messages import Address

BLOCK_BYTES = 30 * 2 * 3 * 16 * 64 * 2
"""Of the default model: 16 tokens of SmolLM2 in bf16."""


def running_node(
    *arguments: str, slot_count: int, block_bytes: int = BLOCK_BYTES
) -> contextlib.AbstractContextManager[Address]:
    """A node with this arena, reached by shared memory, Unix socket and TCP on this machine.

    ``arguments``: more of its command line.
    """
    tcp = ("--tcp-host", "127.0.0.1")
    return child_node(*tcp, *arguments, slot_count=slot_count, block_bytes=block_bytes)


@contextlib.contextmanager
def bare_peer(program: str, *arguments: int) -> Iterator[socket.socket]:
    """Connected to ``program``, Python that prints its port, and ends when the socket does."""
    peer = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE
    )
    assert peer.stdout is not None
    port = int(peer.stdout.readline())
    with socket.create_connection(("127.0.0.1", port)) as connected:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connected
    peer.wait()
    peer.stdout.close()
