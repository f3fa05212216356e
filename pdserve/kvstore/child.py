"""A store node as a child of this process, for who wants one to himself: a benchmark, a replay."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from pdserve.errors import StoreUnavailable
from pdserve.ids import HostId
from pdserve.kvstore.arena import Geometry
from pdserve.messages import Address

STOP_S_MAX = 60.0
"""For an orderly end, on a machine where others want the cores; then it is killed."""


def arena_bytes(slot_count: int, block_bytes: int) -> int:
    """What ``--arena-bytes`` must be for an arena of exactly so many slots."""
    return slot_count * Geometry(slot_count, block_bytes).stride_bytes


@contextlib.contextmanager
def child_node(*arguments: str, slot_count: int, block_bytes: int) -> Iterator[Address]:
    """A node with an arena of ``slot_count`` blocks, while the context lasts; its sockets are in a
    folder of its own. ``arguments``: more of its command line.

    Raises:
        StoreUnavailable: it ended before it served; what it said is on standard error.
    """
    with TemporaryDirectory(prefix="pdserve-node-") as directory:
        node = subprocess.Popen(
            [
                *(sys.executable, "-m", "pdserve.kvstore.node"),
                *("--directory", str(Path(directory) / "s")),
                *("--arena-bytes", str(arena_bytes(slot_count, block_bytes))),
                *("--block-bytes", str(block_bytes)),
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert node.stdout is not None
            line = node.stdout.readline()
            if not line:
                raise StoreUnavailable(
                    "a store node of our own ended before it served; its message is above"
                )
            fields = json.loads(line)["address"]
            yield Address(HostId(fields["host"]), fields["unix_path"], fields["tcp"])
        finally:
            _stop(node)


def _stop(node: subprocess.Popen[bytes]) -> None:
    """The end of its input is its signal to leave."""
    try:
        node.communicate(timeout=STOP_S_MAX)
    except subprocess.TimeoutExpired:
        node.kill()
        node.communicate()
