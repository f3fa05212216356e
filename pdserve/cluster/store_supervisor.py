"""Keeps one store node running on one host.

An actor per host, found by name, so that the first worker of a host starts it and the others share
it. The store node itself is a plain process without Ray: it outlives no supervisor (its stdin is a
pipe from here, and its end is its signal to leave), and a supervisor outlives no application.

A node that was killed is started again when a worker asks for one, under the id that it had: so it
goes on with the arena that its predecessor left. One that ended because a successor elsewhere has
its name gets another one: else the two would replace each other for ever. Who ends in order, or was
replaced, removes its arena itself; what a killed one has left at the end of the application is
removed from here.
"""

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pdserve.cluster.master_supervisor import ensure_masters, stop_masters, wants_masters
from pdserve.config import StoreConfig
from pdserve.errors import StoreUnavailable
from pdserve.ids import HostId, StoreId, new_store_id
from pdserve.kvstore.arena import geometry_of
from pdserve.kvstore.directory import SHARED, remove_dead
from pdserve.kvstore.process import REPLACED_STATUS
from pdserve.kvstore.security import credentials_of
from pdserve.messages import Address

log = logging.getLogger(__name__)

NAMESPACE = "pdserve"
APP_CHECK_S = 5.0
APP_MISSES_MAX = 2
"""Looks in a row that found no application before the supervisor and its node leave."""

APP_ANSWER_S_MAX = 30.0
READY_TIMEOUT_S = 30.0


class StoreSupervisor:
    def __init__(
        self, app: str, directory: str, tcp_host: str | None, settings: StoreConfig
    ) -> None:
        self._app = app
        self._directory = Path(directory)
        self._tcp_host = tcp_host
        self._settings = settings
        self._nodes: dict[tuple[int, str], tuple[subprocess.Popen[bytes], Address]] = {}
        """By the bytes and the codec of their blocks."""

        self._ids: dict[tuple[int, str], StoreId] = {}

        self._masters: tuple[str, ...] | None = None
        self._starting = asyncio.Lock()
        self._watch = asyncio.get_event_loop().create_task(self._leave_with_the_app())

    async def ensure(self, block_bytes: int, codec: str) -> tuple[str, str, str]:
        """Host, Unix path and TCP address of the running node for blocks of this size and codec.

        Two kinds (a new model beside the old one, during an update) are two nodes: they share
        nothing, so neither can read the other's blocks.

        Raises:
            ConfigError: the arena cannot be of such blocks.
            StoreUnavailable: the node does not start.
        """
        geometry_of(self._settings.arena_bytes, block_bytes)  # said here, and not in a log
        await self.masters()
        async with self._starting:
            node = self._nodes.get((block_bytes, codec))
            if node is None or node[0].poll() is not None:
                if node is not None and node[0].returncode == REPLACED_STATUS:
                    log.warning("a store node was replaced, the next one has another name")
                    del self._nodes[block_bytes, codec]
                    self._ids.pop((block_bytes, codec), None)
                node = await asyncio.to_thread(self._start, block_bytes, codec)
                self._nodes[block_bytes, codec] = node
        address = node[1]
        return address.host, address.unix_path, address.tcp

    async def masters(self) -> tuple[str, ...]:
        """Where the application's masters listen; () where it has none."""
        async with self._starting:
            if self._masters is None:
                self._masters = ()
                if await asyncio.to_thread(wants_masters, self._settings):
                    try:
                        self._masters = await ensure_masters(
                            self._app,
                            self._directory,
                            self._settings,
                            over_tcp=self._tcp_host is not None,
                        )
                    except (ray.exceptions.RayError, TimeoutError) as error:
                        log.warning("no master of the store could be started: %s", error)
        return self._masters

    async def pids(self) -> list[int]:
        return [node.pid for node, _ in self._nodes.values() if node.poll() is None]

    async def stop(self) -> None:
        self._watch.cancel()
        await self._end_all()

    def _start(self, block_bytes: int, codec: str) -> tuple[subprocess.Popen[bytes], Address]:
        settings = self._settings
        command = [
            sys.executable,
            "-m",
            "pdserve.kvstore.node",
            "--directory",
            str(self._directory),
            "--store-id",
            self._ids.setdefault((block_bytes, codec), new_store_id()),
            "--arena-bytes",
            str(settings.arena_bytes),
            "--block-bytes",
            str(block_bytes),
            "--codec",
            codec,
            "--eviction",
            settings.eviction,
            "--shares",
            json.dumps(dict(settings.tenant_shares)),
            "--hard-pin-ratio",
            str(settings.hard_pin_ratio),
        ]
        if settings.ssd_directory is not None:
            directory = Path(settings.ssd_directory).expanduser() / f"{block_bytes}-{codec}"
            command += ["--ssd-directory", str(directory), "--ssd-bytes", str(settings.ssd_bytes)]
            command += ["--ssd-write", settings.ssd_write]
        if self._tcp_host is not None:
            command += ["--tcp-host", self._tcp_host]
            if settings.mooncake:
                command += ["--mooncake"]
        for name, path in asdict(credentials_of(settings)).items():
            if path is not None:
                command += ["--" + name.replace("_", "-"), str(path)]
        if self._masters:
            command += ["--masters", *self._masters]
        if settings.redis_url is not None:
            command += ["--redis-url", settings.redis_url]
        elif not self._masters:
            command += ["--metadata", str(self._directory / "members.sqlite")]
        node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert node.stdout is not None
        line = node.stdout.readline()  # the node prints it, or ends
        if not line:
            if (status := node.wait()) == REPLACED_STATUS:
                self._ids.pop((block_bytes, codec), None)
            raise StoreUnavailable(
                f"the store node ended with exit code {status} before it served; its messages "
                "are in this actor's log"
            )
        address = json.loads(line)["address"]
        return node, Address(HostId(address["host"]), address["unix_path"], address["tcp"])

    async def _end_all(self) -> None:
        for node, _ in self._nodes.values():
            await asyncio.to_thread(_end, node)
        self._nodes.clear()
        for store_id in self._ids.values():
            await asyncio.to_thread(remove_dead, SHARED, store_id)

    async def _leave_with_the_app(self) -> None:
        misses = 0
        while misses < APP_MISSES_MAX:
            await asyncio.sleep(APP_CHECK_S)
            try:
                alive = await asyncio.to_thread(_is_running, self._app)
            except ray.exceptions.GetTimeoutError:
                continue  # a controller that is busy says nothing of the application
            except Exception:  # Serve itself may be gone, and says so in many ways
                alive = False
            misses = 0 if alive else misses + 1
        log.info("application %s is gone, so is its store", self._app)
        await self._end_all()
        await stop_masters(self._app)
        ray.actor.exit_actor()


def _is_running(app: str) -> bool:
    """Asks Serve's controller by name: to import Serve for one question takes this process, and
    each host has one, a second of a core."""
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    ingress = controller.get_ingress_deployment_name.remote(app)
    return ray.get(ingress, timeout=APP_ANSWER_S_MAX) is not None


def _end(node: subprocess.Popen[bytes]) -> None:
    """Ends a node by closing its stdin; it then removes its arena and its sockets."""
    assert node.stdin is not None
    node.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.wait(10.0)
        return
    node.kill()
    node.wait()


def actor_name(app: str, node_id: str) -> str:
    return f"store-{app}-{node_id}"


def supervisor_of_this_host(
    app: str, directory: Path, tcp_host: str | None, settings: StoreConfig
) -> ActorHandle:
    """The application's supervisor on this host, started if there is none. Does not wait for it."""
    node_id = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(StoreSupervisor)
        .options(
            name=actor_name(app, node_id),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(app, str(directory), tcp_host, settings)
    )


async def ensure_store(supervisor: ActorHandle, block_bytes: int, codec: str) -> Address:
    """The address of the host's node for blocks of this kind, which is started if need be.

    Raises:
        StoreUnavailable: it does not start.
    """
    async with asyncio.timeout(READY_TIMEOUT_S):
        host, unix_path, tcp = await supervisor.ensure.remote(block_bytes, codec)
    return Address(HostId(host), unix_path, tcp)


async def masters_by(supervisor: ActorHandle) -> tuple[str, ...]:
    """Where the application's masters listen, as a host's supervisor knows them."""
    async with asyncio.timeout(READY_TIMEOUT_S):
        return tuple(await supervisor.masters.remote())


async def stop_stores(app: str) -> None:
    """Ends every store node of the application, on all hosts, and then the masters, which the nodes
    tell that they leave."""
    for node in ray.nodes():
        with contextlib.suppress(ValueError):  # no supervisor on that host
            supervisor = ray.get_actor(actor_name(app, node["NodeID"]), namespace=NAMESPACE)
            await supervisor.stop.remote()
            ray.kill(supervisor)
    await stop_masters(app)
