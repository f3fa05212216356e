"""The processes of a campaign that are not forks: store nodes, and a Redis that keeps its data."""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.ids import StoreId
from pdserve.messages import Address
from tests.campaign.node import SSD_BYTES
from tests.campaign.world import BLOCK_BYTES, STRIDE_BYTES

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)

START_S_MAX = 60.0
"""For a process to serve, on a machine that is busy with something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePlan:
    store_id: StoreId
    directory: Path  # of sockets, logs and the disk
    shared: Path
    metadata: str  # a file, or a URL of Redis
    slot_count: int
    ssd: bool = False
    mutant: str | None = None

    @property
    def ssd_directory(self) -> Path:
        return self.directory / "ssd"

    def command(self, *, stop_before_register: bool = False) -> list[str]:
        is_redis = self.metadata.startswith("redis://")
        return [
            *(sys.executable, "-m", "tests.campaign.node"),
            *(("--mutant", self.mutant) if self.mutant else ()),
            *(("--stop-before-register",) if stop_before_register else ()),
            *("--directory", str(self.directory / "sockets")),
            *("--shared", str(self.shared)),
            *("--store-id", self.store_id),
            *("--arena-bytes", str(self.slot_count * STRIDE_BYTES)),
            *("--block-bytes", str(BLOCK_BYTES)),
            *("--tcp-host", "127.0.0.1"),
            *("--redis-url" if is_redis else "--metadata", self.metadata),
            *(("--ssd-directory", str(self.ssd_directory)) if self.ssd else ()),
            *(("--ssd-bytes", str(SSD_BYTES)) if self.ssd else ()),
        ]


@dataclass
class Child:
    """A process that ends when its input does, and what it says on standard error."""

    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        self.process.kill()
        self._end()

    def stop(self) -> int:
        """End it as its parent's death would; its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(START_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self._end()

    def _end(self) -> int:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return self.process.wait(START_S_MAX)

    def complaints(self) -> str:
        """What its log says of exceptions; a store node's own peers never cause one."""
        text = self.log.read_text(errors="replace")
        at = text.find("Traceback")
        return "" if at < 0 else text[max(0, at - 200) : at + 3000]


def launched(
    command: Sequence[str], directory: Path, name: str
) -> tuple[subprocess.Popen[bytes], Path]:
    """What a ``Child`` is made of: the process, and the file of what it says."""
    log = directory / f"{name}.{time.monotonic_ns()}.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509  (one system call)
        )
    return process, log


@dataclass
class NodeProcess(Child):
    """One incarnation. ``address`` is None until it serves."""

    plan: NodePlan
    address: Address | None = None
    descriptors_at_rest: int | None = None

    @staticmethod
    def start(plan: NodePlan, *, stop_before_register: bool = False) -> "NodeProcess":
        plan.directory.mkdir(parents=True, exist_ok=True)
        command = plan.command(stop_before_register=stop_before_register)
        return NodeProcess(*launched(command, plan.directory, plan.store_id), plan)

    def serves(self) -> bool:
        """Whether it does by now; does not wait."""
        assert self.process.stdout is not None
        if self.address is None and select.select([self.process.stdout], [], [], 0)[0]:
            line = self.process.stdout.readline()
            if line:
                self.address = Address(**json.loads(line)["address"])
        return self.address is not None

    def wait_until_it_serves(self) -> bool:
        """False when it ended instead."""
        until_s = time.monotonic() + START_S_MAX
        while not self.serves():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < until_s, f"{self.plan.store_id} does not start"
            time.sleep(0.01)
        return True

    def descriptors(self) -> int:
        """Open now, the disk's segments left out: those come and go with what they hold."""
        folder = f"/proc/{self.process.pid}/fd"
        count = 0
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                count += not os.readlink(f"{folder}/{name}").endswith(".seg")
        return count

    def boards(self) -> int:
        """Readers' boards that it has mapped."""
        return Path(f"/proc/{self.process.pid}/maps").read_text().count("/memfd:pins")


class RedisProcess:
    """With an append-only file that is synced at every write: ``kill -9`` loses nothing."""

    def __init__(self, executable: str, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._command = [
            *(executable, "--port", str(self._port), "--bind", "127.0.0.1", "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "always", "--dir", str(directory)),
        ]
        self.url = self.table(0)
        self.process = self._start()

    def table(self, number: int) -> str:
        """The URL of one of its tables."""
        return f"redis://127.0.0.1:{self._port}/{number}"

    @staticmethod
    def start(directory: Path) -> "RedisProcess | None":
        """One that serves; None where it is not installed."""
        executable = shutil.which("redis-server")
        if executable is None:
            return None
        redis = RedisProcess(executable, directory)
        redis.wait_until_it_serves()
        return redis

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            preexec_fn=die_with_parent,  # noqa: PLW1509  (one system call)
        )

    def restart(self) -> None:
        self.kill()
        self.process = self._start()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(START_S_MAX)

    def wait_until_it_serves(self) -> None:
        until_s = time.monotonic() + START_S_MAX
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
            except OSError:
                assert time.monotonic() < until_s, "Redis does not start"
                time.sleep(0.02)
            else:
                return


def die_with_parent() -> None:
    """Asked of the kernel by a new process: a campaign that is killed leaves nobody behind."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stopped_by_itself(pid: int) -> bool:
    """Whether a process is stopped by a signal."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"
    return False


def wake(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
