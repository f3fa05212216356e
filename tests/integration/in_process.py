"""A cluster without Ray: router, workers and gateway on one event loop of the test's process.

Sockets, frames, the store node and the engines' threads are the real ones; what is missing is who
places processes and replaces them. So it starts in a second or two, and a test that needs no second
process and no restart need not pay for one.
"""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pdserve.cluster.gateway.front import Front
from pdserve.cluster.gateway.models import Control
from pdserve.cluster.gateway.session import GatewaySession, Served
from pdserve.cluster.router_service import RouterService
from pdserve.cluster.terms import MemoryTerms
from pdserve.cluster.worker_shell import WorkerShell
from pdserve.config import ClusterConfig
from pdserve.messages import Address, Role
from pdserve.router.snapshot import RouterSnapshot
from pdserve.text.tokenizer import load_tokenizer
from pdserve.wire.hosts import local_host_id
from tests.integration.store_nodes import Node, start_node


async def no_masters() -> tuple[str, ...]:
    """Nobody knows what other hosts have."""
    return ()


START_S = 120.0


class InProcessCluster:
    """All methods are called from the test's thread."""

    def __init__(
        self,
        config: ClusterConfig,
        directory: Path,
        model: Path,
        *,
        name: str = "small",
        beside: "InProcessCluster | None" = None,
    ) -> None:
        """``beside``: whose gateway and event loop serve this model too; it is closed after it."""
        self.name = name
        self._beside = beside
        self.config = config
        self._directory = directory
        self._model = model
        self._node: Node | None = None
        self._terms = MemoryTerms()
        self._leader: Address
        self._loop: asyncio.AbstractEventLoop = (
            asyncio.new_event_loop() if beside is None else beside._loop
        )
        self._thread = threading.Thread(target=self._loop.run_forever)
        if beside is None:
            self._thread.start()
        self.workers: dict[str, WorkerShell] = {}
        self.router: RouterService
        self.session: GatewaySession
        self.front: Front
        self.do(self._start())

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs ``work`` on the cluster's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_S)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.front.ports['http']}"

    def snapshot(self) -> RouterSnapshot:
        async def ask() -> RouterSnapshot:
            return self.router.snapshot()

        snapshot: RouterSnapshot = self.do(ask())
        return snapshot

    def held(self) -> int:
        """Requests, device blocks and tickets that somebody has; 0 at rest."""
        snapshot = self.snapshot()
        return sum(snapshot.phases.values()) + sum(
            worker.block_count
            - worker.free_blocks
            + worker.running
            + worker.waiting
            + worker.counters.get("store_tickets", 0)
            for worker in snapshot.workers
        )

    def counter(self, name: str) -> int:
        """Summed over the workers."""
        return sum(worker.counters.get(name, 0) for worker in self.snapshot().workers)

    def names(self) -> set[str]:
        """Of the workers that the router knows."""
        return {str(worker.worker) for worker in self.snapshot().workers}

    def replace_router(self) -> None:
        """The one that leads is gone, and another begins, which has heard nothing."""

        async def replace() -> None:
            await self.router.close()
            await self._start_router(self._directory / "run")

        self.do(replace())

    def close(self) -> None:
        self.do(self._close())
        if self._beside is None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(START_S)
            self._loop.close()
        if self._node is not None:
            self._node.process.kill()
            self._node.process.wait(START_S)
            for pipe in (self._node.process.stdin, self._node.process.stdout):
                assert pipe is not None
                pipe.close()

    async def _start(self) -> None:
        sockets, host = self._directory / "run", local_host_id()
        sockets.mkdir(mode=0o700)
        await self._start_router(sockets)

        async def find_router() -> Address:
            return self._leader

        for role, pool in ((Role.PREFILL, self.config.prefill), (Role.DECODE, self.config.decode)):
            for _ in range(pool.replicas):
                shell = WorkerShell(role, self.config, host=host)
                await shell.start(
                    sockets,
                    self._find_store,
                    find_router,
                    find_masters=no_masters,
                    tcp_host=None,
                )
                self.workers[shell.worker] = shell
        hello = self.router.hello
        assert hello is not None
        served = Served(
            name=self.name,
            context_tokens=8192,
            namespace=bytes.fromhex(hello.namespace),
            block_tokens=hello.block_tokens,
            streams_max=self.config.gateway.streams_max,
        )
        self.session = GatewaySession(served, load_tokenizer(self._model), host=host)
        silence_s = self.config.router.router_silence_ms / 1000
        await self.session.start(sockets, find_router, tcp_host=None, silence_s=silence_s)

        async def snapshot() -> dict[str, Any]:
            return asdict(self.router.snapshot())

        if self._beside is not None:
            self.front = self._beside.front
            self.front.add_model(self.session, self.config.gateway, Control(snapshot, snapshot))
            return
        self.front = Front(self.session, self.config, Control(snapshot, snapshot))
        await self.front.start()

    async def _start_router(self, sockets: Path) -> None:
        self.router = RouterService(self.config.router, host=local_host_id(), register=self._terms)
        self._leader = await self.router.start(sockets, tcp_host=None)

    async def _find_store(self, block_bytes: int, codec: str) -> Address:
        if self._node is None:
            self._node = await asyncio.to_thread(
                start_node,
                self._directory,
                *("--arena-bytes", str(self.config.store.arena_bytes)),
                *("--block-bytes", str(block_bytes), "--codec", codec),
            )
        return self._node.address

    async def _close(self) -> None:
        if self._beside is None:
            await self.front.stop()
        else:
            self.front.remove_model(self.name)
        await self.session.close()
        for shell in self.workers.values():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(15):
                    await shell.close()
        await self.router.close()


@contextlib.contextmanager
def in_process(
    config: ClusterConfig,
    directory: Path,
    model: Path,
    *,
    name: str = "small",
    beside: InProcessCluster | None = None,
) -> Iterator[InProcessCluster]:
    """Arguments are those of ``InProcessCluster``."""
    cluster = InProcessCluster(config, directory, model, name=name, beside=beside)
    try:
        yield cluster
    finally:
        cluster.close()
