"""The processes of ``bench.surface``: router, mock workers and gateways, each one of its own.

They are what Ray starts in a cluster, without Ray: the router's service, and the gateway's session
and front on the event loop that Ray gives its actors. What they are measured by is read from
``/proc``: the processor time of all their threads, to the nanosecond, and the memory they hold.
"""

import asyncio
import contextlib
import cProfile
import multiprocessing
import multiprocessing.process
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from bench.surface_fleet import BLOCK_TOKENS, REPORT_S, Fleet
from bench.surface_stages import noting
from pdserve.config import ClusterConfig, GatewayConfig
from pdserve.ids import HostId
from pdserve.messages import Address
from pdserve.router.succession import Term
from pdserve.router_config import RouterConfig

HOST = HostId("here")
MODEL = "mock"
CONTEXT_TOKENS = 1 << 17
START_S = 120.0
STOP_S = 20.0

SILENCE_S = 60.0
"""Who is silent for less is alive: on a machine that is busy otherwise nobody is to be replaced."""

Serve = Callable[[Pipe], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Record:
    """What a process leaves when it ends, and where; None: nothing."""

    name: str  # of the process
    profile: Path | None
    stages: Path | None


@dataclass(frozen=True, slots=True)
class Place:
    """A process that is up; ``said`` is what it said of itself."""

    process: multiprocessing.process.BaseProcess
    pipe: Pipe
    said: Any

    def cpu_s(self) -> float:
        """Of all threads that live, since the process began."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        taken_ns = 0
        for task in tasks.iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                taken_ns += int((task / "schedstat").read_text().split()[0])
        return taken_ns / 1e9

    def resident_bytes(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        (size,) = (line.split()[1] for line in lines if line.startswith("VmRSS:"))
        return int(size) * 1024

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(STOP_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Places:
    """Router and mock workers, and as many gateways as are asked for."""

    def __init__(
        self,
        *,
        prefills: int = 1,
        decodes: int = 1,
        report_s: float = REPORT_S,
        profiles: Path | None = None,
        stages: Path | None = None,
    ) -> None:
        """
        Args:
            profiles: where each process leaves its profile (``pstats``) when it ends.
            stages: where it leaves what it noted of each request (``surface_stages``).
        """
        self._stack = contextlib.ExitStack()
        self._profiles = profiles
        self._stages = stages
        self._gateways: list[Place] = []
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-")))
        try:
            self.router = self._start("router", _router, self.directory)
            self.address: Address = self.router.said
            self.fleet = self._start("fleet", _fleet, self.address, prefills, decodes, report_s)
        except BaseException:
            self._stack.close()
            raise

    def gateways(self, count: int) -> list[Place]:
        """So many, the same ones again."""
        while len(self._gateways) < count:
            name = f"gateway-{len(self._gateways)}"
            self._gateways.append(self._start(name, _gateway, self.address, self.directory))
        return self._gateways[:count]

    def close(self) -> None:
        self._stack.close()

    def _start(self, name: str, work: Callable[..., None], *arguments: object) -> Place:
        # Forked children would share this process's event loop and threads.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        record = Record(
            name,
            profile=None if self._profiles is None else self._profiles / f"{name}.pstats",
            stages=None if self._stages is None else self._stages / f"{name}.json",
        )
        process = context.Process(target=work, args=(theirs, record, *arguments), daemon=True)
        process.start()
        theirs.close()
        if not ours.poll(START_S):
            process.kill()
            raise RuntimeError(f"the {name} has said nothing for {START_S:g} s")
        try:
            said = ours.recv()
        except EOFError:
            raise RuntimeError(f"the {name} ended before it was up; it says why above") from None
        place = Place(process, ours, said)
        self._stack.callback(place.stop)
        return place


@contextlib.contextmanager
def places(**settings: Any) -> Iterator[Places]:
    running = Places(**settings)
    try:
        yield running
    finally:
        running.close()


# ── what runs in the processes ───────────────────────────────────────────────────────────────────


def _run(serve: Serve, pipe: Pipe, record: Record) -> None:
    """On the event loop that Ray's actors have, until the pipe is closed."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(noting(record.name, record.stages))
        if (profile := record.profile) is not None:
            profiler = cProfile.Profile(time.thread_time)  # of this thread, whoever else is running
            stack.callback(profiler.dump_stats, profile)
            stack.enter_context(profiler)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(serve(pipe))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _closed(pipe: Pipe) -> None:
    """Until the benchmark closes it, or has died."""
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), closed.set)
    await closed.wait()


def _router(pipe: Pipe, record: Record, directory: Path) -> None:
    from pdserve.cluster.collecting import collect_rarely
    from pdserve.cluster.router_service import RouterService

    async def serve(pipe: Pipe) -> None:
        settings = RouterConfig(
            waiting_max=1 << 20, queue_age_max_ms=None, worker_silence_ms=round(SILENCE_S * 1000)
        )
        service = RouterService(settings, host=HOST, register=_Register())
        collect_rarely()  # as the router's actor does
        address = await service.start(directory, tcp_host=None)
        assert service.candidate is not None
        while not service.leads:
            await asyncio.sleep(0.01)
        pipe.send(address)
        await _closed(pipe)
        await service.close()

    _run(serve, pipe, record)


def _fleet(
    pipe: Pipe, record: Record, router: Address, prefills: int, decodes: int, report_s: float
) -> None:
    async def serve(pipe: Pipe) -> None:
        fleet = Fleet(HOST, report_s=report_s)
        await fleet.join(router, prefills=prefills, decodes=decodes)
        pipe.send("up")
        await _closed(pipe)
        await fleet.close()

    _run(serve, pipe, record)


def _gateway(pipe: Pipe, record: Record, router: Address, directory: Path) -> None:
    import pdserve.cluster.app  # noqa: F401  (a gateway's memory holds Ray as well)
    from pdserve.cluster.gateway.front import Front
    from pdserve.cluster.gateway.models import Control
    from pdserve.cluster.gateway.session import GatewaySession, Served
    from pdserve.config import ModelConfig
    from pdserve.model.source import locate
    from pdserve.text.tokenizer import load_tokenizer

    async def find_router() -> Address:
        return router

    async def nothing() -> dict[str, Any]:
        return {}

    async def serve(pipe: Pipe) -> None:
        served = Served(MODEL, CONTEXT_TOKENS, b"\0" * 16, BLOCK_TOKENS, streams_max=1 << 14)
        session = GatewaySession(served, load_tokenizer(locate(ModelConfig()).path), host=HOST)
        await session.start(directory, find_router, tcp_host=None, silence_s=SILENCE_S)
        config = ClusterConfig(gateway=GatewayConfig(http_port=0, grpc_port=0))
        front = Front(session, config, Control(nothing, nothing))
        await front.start()
        ports: Mapping[str, int] = front.ports
        pipe.send(ports)
        await _closed(pipe)
        await front.stop()
        await session.close()

    _run(serve, pipe, record)


class _Register:
    """Of one router that nobody succeeds."""

    def __init__(self) -> None:
        self._terms: dict[int, Term] = {}

    async def latest(self) -> Term | None:
        return self._terms[max(self._terms)] if self._terms else None

    async def claim(self, term: Term) -> Term | None:
        self._terms.setdefault(term.epoch, term)
        return await self.latest()
