"""Keeps the store's masters running: one that leads, and a standby.

Where membership is in a file both run on one host, beside it, under one actor. Where it is in Redis
there are two actors, on two hosts if there are so many. An actor starts a master again that has
died, at the address that it had. Which of them leads is their own affair (``kvstore.election``);
nothing that they know must outlive them.
"""

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
from ray.actor import ActorHandle

from pdserve.config import StoreConfig
from pdserve.kvstore.security import credentials_of

log = logging.getLogger(__name__)

NAMESPACE = "pdserve"
MASTERS = 2
LOOK_S = 0.5
END_S = 10.0
READY_S = 30.0


@dataclass(slots=True)
class _Process:
    process: subprocess.Popen[bytes]
    address: str  # host:port, or the path of its socket
    port: int


class MasterSupervisor:
    """An actor, detached; it ends with ``stop``."""

    def __init__(
        self, rank: int, count: int, directory: str, over_tcp: bool, settings: StoreConfig
    ) -> None:
        """``count`` masters on this host, of which the first has number ``rank``."""
        self._rank = rank
        self._count = count
        self._directory = Path(directory)
        self._tcp_host = ray.util.get_node_ip_address() if over_tcp else None
        self._settings = settings
        self._masters: list[_Process] = []
        self._starting = asyncio.Lock()
        self._keeping: asyncio.Task[None] | None = None
        # Also when Ray starts this actor again, on another host maybe, and nobody asks.
        self._first = asyncio.get_event_loop().create_task(self.ensure())

    async def ensure(self) -> list[str]:
        """Where they listen."""
        async with self._starting:
            while len(self._masters) < self._count:
                number = self._rank + len(self._masters)
                self._masters.append(await asyncio.to_thread(self._start, number, 0))
            if self._keeping is None:
                self._keeping = asyncio.get_running_loop().create_task(self._keep())
        return [master.address for master in self._masters]

    async def pids(self) -> list[int]:
        return [each.process.pid for each in self._masters if each.process.poll() is None]

    async def stop(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
        for master in self._masters:
            await asyncio.to_thread(_end, master.process)
        self._masters.clear()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for index, master in enumerate(self._masters):
                if master.process.poll() is None:
                    continue
                log.warning("a store master has ended, another one begins at %s", master.address)
                try:
                    self._masters[index] = await asyncio.to_thread(
                        self._start, self._rank + index, master.port
                    )
                except OSError as error:
                    log.warning("it does not begin: %s", error)

    def _start(self, number: int, port: int) -> _Process:
        settings = self._settings
        command = [
            *(sys.executable, "-m", "pdserve.kvstore.masters.process"),
            *("--directory", str(self._directory), "--socket", f"master-{number}.sock"),
            *("--tcp-port", str(port)),
        ]
        if self._tcp_host is not None:
            command += ["--tcp-host", self._tcp_host]
        for name, path in asdict(credentials_of(settings)).items():
            if path is not None:
                command += ["--" + name.replace("_", "-"), str(path)]
        if settings.redis_url is not None:
            command += ["--redis-url", settings.redis_url]
        else:
            command += ["--metadata", str(self._directory / "members.sqlite")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        line = process.stdout.readline()  # it prints one, or ends
        if not line:
            raise OSError(f"a master ended with exit code {process.wait()} before it served")
        address = json.loads(line)["address"]
        where = address["tcp"] or address["unix_path"]
        return _Process(process, where, int(where.rpartition(":")[2]) if address["tcp"] else 0)


def _end(master: subprocess.Popen[bytes]) -> None:
    assert master.stdin is not None
    master.stdin.close()
    try:
        master.wait(END_S)
    except subprocess.TimeoutExpired:
        master.kill()
        master.wait()


def wants_masters(settings: StoreConfig) -> bool:
    """As ``store.master`` has it; ``auto``: where there is more than one host."""
    if settings.master == "auto":
        return sum(bool(node["Alive"]) for node in ray.nodes()) > 1
    return settings.master == "on"


async def ensure_masters(
    app: str, directory: Path, settings: StoreConfig, *, over_tcp: bool
) -> tuple[str, ...]:
    """Where the application's masters listen; they are started where there are none."""
    addresses: list[str] = []
    async with asyncio.timeout(READY_S):
        for supervisor in _supervisors(app, directory, settings, over_tcp=over_tcp):
            addresses += await supervisor.ensure.remote()
    return tuple(addresses)


async def stop_masters(app: str) -> None:
    for rank in range(MASTERS):
        with contextlib.suppress(ValueError):  # there is no such actor
            supervisor = ray.get_actor(actor_name(app, rank), namespace=NAMESPACE)
            with contextlib.suppress(ray.exceptions.RayError):  # somebody else was faster
                await supervisor.stop.remote()
            ray.kill(supervisor)


def actor_name(app: str, rank: int) -> str:
    return f"store-masters-{app}-{rank}"


def _supervisors(
    app: str, directory: Path, settings: StoreConfig, *, over_tcp: bool
) -> list[ActorHandle]:
    spread = settings.redis_url is not None and over_tcp
    ranks = range(MASTERS) if spread else range(1)
    return [
        ray.remote(MasterSupervisor)
        .options(
            name=actor_name(app, rank),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy="SPREAD",
        )
        .remote(rank, MASTERS // len(ranks), str(directory), over_tcp, settings)
        for rank in ranks
    ]
