"""A Redis of one test."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.errors import StoreUnavailable
from pdserve.kvstore.masters.metadata import RedisMetadata

PATIENCE_S = 60.0


class RedisServer:
    """A real one, without persistence, on a free port of this host; it answers.

    Raises:
        FileNotFoundError: redis-server is not installed.
    """

    def __init__(self, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process = subprocess.Popen(
            [
                *("redis-server", "--port", str(self.port), "--bind", "127.0.0.1"),
                *("--save", "", "--appendonly", "no", "--dir", str(directory)),
            ],
            stdout=subprocess.DEVNULL,
        )
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                RedisMetadata(self.url).members()
            except StoreUnavailable:
                assert time.monotonic() < until_s, "Redis did not start"
                assert self.process.poll() is None, "Redis ended"
            else:
                return

    def kill(self) -> None:
        """Also where it was stopped."""
        self.process.kill()
        self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def running_redis(directory: Path) -> Iterator[RedisServer]:
    """Skips the test where there is none."""
    try:
        server = RedisServer(directory)
    except FileNotFoundError:
        pytest.skip("redis-server is not installed")
    try:
        yield server
    finally:
        server.kill()
