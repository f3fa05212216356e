"""A cluster of simulated processes on two or three hosts, and who restarts what has died.

    hosts    one store node each; workers, gateways and routers are spread over them; the first
             has the register of who leads
    restart  as Ray and the store's supervisor do: a process that is dead, or says that it is not
             healthy, is replaced by another one after a while

What runs in a process is production code; this file starts it, and keeps what there is for checks.
"""

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pdserve.clock import MS, S
from pdserve.cluster.gateway.session import GatewaySession, Served
from pdserve.cluster.router_service import RouterService
from pdserve.cluster.worker_shell import WorkerShell
from pdserve.errors import Disconnected, StoreError, StoreUnavailable
from pdserve.ids import HostId, RequestId, WorkerId
from pdserve.kvstore.keys import block_keys
from pdserve.kvstore.tickets import ANYBODY, TicketState
from pdserve.messages import Address, Lost, Role
from pdserve.vitals import Vitals
from tests.simulation.loop import HostClock, SimProcess, VirtualLoop
from tests.simulation.network import Network
from tests.simulation.register import Reigns, SimRegister
from tests.simulation.shape import ROUTER_SILENCE_MS, Shape
from tests.simulation.store import Membership, SimStoreClient, StoreNode
from tests.simulation.worker import NAMESPACE, TOKENIZER, SimEngine, know
from tests.unit.engine.fakes import BLOCK_TOKENS
from tests.unit.engine.rig import prompt


async def no_masters() -> tuple[str, ...]:
    """Nobody knows what other hosts have."""
    return ()


TENANTS = ("acme", "umbrella")
SUPERVISE_S = 0.25
RESTART_NS = (100 * MS, 1 * S)
CONTEXT_TOKENS = 120


class SimRouter(RouterService):
    """That says when it begins to lead."""

    on_lead: Callable[[int], None]

    def lead(self) -> None:
        super().lead()
        self.on_lead(self.candidate.epoch)


class SimGateway(GatewaySession):
    """That shows whom it takes for poison, and for which death."""

    world: "World"

    def _is_poison(self, running: Any, delivery: Any, lost: Lost) -> bool:
        is_poison = super()._is_poison(running, delivery, lost)
        if is_poison and (lost.request, lost.attempt) not in self.world.engine_of[lost.worker].had:
            self.world.innocent.append(f"{lost.request} for the death of {lost.worker}")
        return is_poison


@dataclass
class Place:
    """Where one process runs, and its next incarnation will."""

    name: str
    host: str
    start: Callable[["Place"], None]
    process: SimProcess
    what: Any = None  # the shell, service, session or node
    incarnation: int = 0
    restarting: bool = False
    task: asyncio.Task[Any] | None = None


@dataclass
class World:
    loop: VirtualLoop
    network: Network
    membership: Membership
    shape: Shape
    dice: random.Random
    seed: int
    reigns: Reigns
    keep_log: bool = False
    reading: bool = True
    is_healed: bool = False  # the faults are over
    lasting_ns: int = 0  # until when a fault goes on whose whole length matters
    places: dict[str, Place] = field(default_factory=dict)
    engines: dict[SimProcess, SimEngine] = field(default_factory=dict)
    engine_of: dict[WorkerId, SimEngine] = field(default_factory=dict)  # the dead ones' too
    innocent: list[str] = field(default_factory=list)  # refused for what they had no part in
    log: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = self.shape.config()
        self.hosts = [f"h{index}" for index in range(self.shape.hosts)]
        offsets_ms = zip(self.hosts, self.shape.clocks_ms, strict=False)
        self.clocks = {host: HostClock(offset_ms) for host, offset_ms in offsets_ms}
        self.register = SimRegister(self.network, self.hosts[0])
        self._digest = hashlib.sha256()

    def start(self) -> None:
        hosts = self.hosts
        for host in hosts:
            self._place(f"store-{host}", host, self._start_store)
        for index in range(self.shape.routers):
            self._place(f"router-{index}", hosts[index % len(hosts)], self._start_router)
        roles = [*[Role.PREFILL] * self.shape.prefills, *[Role.DECODE] * self.shape.decodes]
        for index, role in enumerate(roles):
            host = hosts[index % len(hosts)]
            self._place(f"{role}-{index}", host, partial(self._start_worker, role))
        for index in range(self.shape.gateways):
            self._place(f"gateway-{index}", hosts[-1 - index % len(hosts)], self._start_gateway)
        self._place("reader", hosts[-1], self._start_reader)
        supervisor = SimProcess("supervisor", hosts[0])
        loop_task = self._supervise()
        self.loop.spawn(supervisor, loop_task)

    # ── the log ──────────────────────────────────────────────────────────────────────────────────

    def note(self, text: str) -> None:
        line = f"{self.loop.now_ns / MS:12.3f} ms  {text}"
        self._digest.update(line.encode())
        if self.keep_log:
            self.log.append(line)

    def digest(self) -> str:
        return self._digest.hexdigest()

    # ── places ───────────────────────────────────────────────────────────────────────────────────

    def _place(self, name: str, host: str, start: Callable[[Place], None]) -> None:
        place = Place(name, host, start, SimProcess(name, host, self.clocks[host]))
        self.places[name] = place
        start(place)

    def _fresh(self, place: Place) -> SimProcess:
        place.incarnation += 1
        clock = self.clocks[place.host]
        place.process = SimProcess(f"{place.name}.{place.incarnation}", place.host, clock)
        place.what = place.task = None
        return place.process

    def kill(self, place: Place) -> None:
        if place.process.alive:
            self.note(f"KILL {place.process}")
            self.loop.kill_process(place.process)

    def leave(self, place: Place) -> None:
        """It ended by itself."""
        self.note(f"{place.process} has left")
        self.loop.kill_process(place.process)

    def restart(self, place: Place) -> None:
        place.restarting = False
        self._fresh(place)
        self.note(f"start {place.process}")
        place.start(place)

    def _run(self, place: Place, start: Awaitable[Any]) -> None:
        async def run() -> None:
            await start

        place.task = self.loop.spawn(place.process, run())

    def _start_store(self, place: Place) -> None:
        node = StoreNode(
            self.loop,
            place.process,
            self.membership.master,
            incarnation=place.incarnation,
            slot_count=self.shape.slots,
            note=self.note,
        )
        self.membership.check()
        know(node)
        place.what = node

    def _start_router(self, place: Place) -> None:
        process = place.process

        def on_lead(epoch: int) -> None:
            self.note(f"{process} leads in epoch {epoch}")
            self.reigns.begin(process.name, epoch)

        def make() -> SimRouter:
            host = HostId(place.host)
            service = SimRouter(self.config.router, host=host, register=self.register)
            service.on_lead = on_lead
            return service

        place.what = process.context.run(make)
        self._run(place, place.what.start(self._directory(place), tcp_host=place.host))

    def _start_worker(self, role: Role, place: Place) -> None:
        async def start() -> None:
            place.what = shell = WorkerShell(role, self.config, host=HostId(place.host))
            shell._postbox._outbox_max = self.shape.outbox_max
            shell._vitals = Vitals(clock=lambda: 0)  # the real machine's: one look is enough
            await shell.start(
                self._directory(place),
                lambda _bytes, _codec: self._find_store(place.host),
                self._find_router,
                find_masters=no_masters,
                tcp_host=place.host,
            )

        self._run(place, start())

    def _start_gateway(self, place: Place) -> None:
        served = Served("fake", CONTEXT_TOKENS, NAMESPACE, BLOCK_TOKENS, streams_max=64)

        async def start() -> None:
            session = SimGateway(served, TOKENIZER, host=HostId(place.host))
            session.world = self
            await session.start(
                self._directory(place),
                self._find_router,
                tcp_host=place.host,
                silence_s=ROUTER_SILENCE_MS / 1000,
            )
            place.what = session

        self._run(place, start())

    def _start_reader(self, place: Place) -> None:
        place.what = place
        place.task = self.loop.spawn(place.process, self._read(place))

    async def _read(self, place: Place) -> None:
        """Holds prefixes for a while, at any node, and reads them: who holds a block may take its
        time, whatever room others need and whoever else dies."""
        dice = random.Random(f"{self.seed} {place.process}")
        while self.reading:
            await asyncio.sleep(dice.randrange(5, 60) / 1000)
            node: StoreNode = self.places[f"store-{dice.choice(self.hosts)}"].what
            tenant, length = dice.choice(TENANTS), dice.choice((9, 12, 16, 21, 30))
            tokens = prompt(length, salt=dice.randrange(3))
            keys = block_keys(NAMESPACE, tokens, BLOCK_TOKENS, tenant=tenant)
            try:
                client = SimStoreClient(
                    node, str(place.process), reach=lambda there: self.reaches(place.host, there)
                )
            except StoreUnavailable:
                continue
            try:
                claim = client.claim(keys, tenant=tenant)
                await asyncio.sleep(dice.randrange(1, 150) / 1000)
                client.read_each(claim, range(len(claim.grant.slots)), lambda _, __: None)
                client.release(claim)
            except StoreError as error:
                self.note(f"{place.process}: {type(error).__name__}")
            finally:
                client.close()

    def _directory(self, place: Place) -> Path:
        return Path(f"/sim/{place.host}/{place.incarnation}")

    async def _find_store(self, host: str) -> Address:
        place = self.places[f"store-{host}"]
        while not place.process.alive:
            await asyncio.sleep(0.05)
        node: StoreNode = place.what
        return node.address

    async def _find_router(self) -> Address:
        """Any that runs, as Serve says it."""
        services = [place.what for place in self.alive("router") if place.what._listener]
        if not services:
            raise Disconnected("no router has started yet")
        service: RouterService = self.network.dice.choice(services)
        return service.address

    def reaches(self, here: str, node: StoreNode) -> bool:
        there = node.process.host
        now_ns, network = self.loop.now_ns, self.network
        blocked_ns = max(
            network.blocked_until_ns(here, there), network.blocked_until_ns(there, here)
        )
        return here == there or blocked_ns <= now_ns

    # ── supervision ──────────────────────────────────────────────────────────────────────────────

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(SUPERVISE_S)
            for place in self.places.values():
                if place.restarting or place.process.stopped:
                    continue
                if place.process.alive and self._is_unhealthy(place):
                    self.note(f"{place.process} is not healthy")
                    self.loop.kill_process(place.process)
                if not place.process.alive:
                    place.restarting = True
                    delay_ns = self.dice.randrange(*RESTART_NS)
                    self.loop.at(self.loop.now_ns + delay_ns, partial(self.restart, place), None)

    def _is_unhealthy(self, place: Place) -> bool:
        task = place.task
        if (
            task is not None
            and task.done()
            and not task.cancelled()
            and task.exception() is not None
        ):
            self.note(f"{place.process} did not start: {task.exception()!r}")
            return True
        if isinstance(place.what, WorkerShell):
            try:
                place.what.check_health()
            except RuntimeError as error:
                if (engine := self.engines.get(place.process)) is not None and engine.error:
                    raise AssertionError(
                        f"engine of {place.process}: {engine.error!r}"
                    ) from engine.error
                self.note(f"{error}")
                return True
        return False

    # ── for those who look ───────────────────────────────────────────────────────────────────────

    def alive(self, prefix: str) -> list[Place]:
        return [
            place
            for name, place in self.places.items()
            if name.startswith(prefix) and place.process.alive and place.what is not None
        ]

    def place_of(self, worker: WorkerId) -> Place | None:
        """Where it runs, or has run last."""
        for place in self.places.values():
            if isinstance(place.what, WorkerShell) and place.what.worker == worker:
                return place
        return None

    def awaiting_receipts(self) -> list[Place]:
        """Who has received letters of which their sender does not know it yet."""
        speaking = (WorkerShell, GatewaySession)
        places = [
            p for p in self.places.values() if p.process.alive and isinstance(p.what, speaking)
        ]
        outboxes = [
            (address, outbox)
            for place in places
            if isinstance(place.what, WorkerShell)
            for address, outbox in place.what._postbox._outboxes.items()
            if outbox.letters
        ]
        found = []
        for place in places:
            listener = place.what._listener
            if listener is not None and any(
                address == listener.address
                and listener._received.last(outbox.poster) >= outbox.letters[0].sequence
                for address, outbox in outboxes
            ):
                found.append(place)
        return found

    def parked(self) -> Iterator[tuple[RequestId, str]]:
        """Requests whose blocks wait in a store for whoever takes them up, and who put them there:
        by the stores' books, which no bug of a router changes."""
        for place in self.alive("store"):
            core = place.what.core
            for ticket in core.tickets._tickets.values():
                if ticket.reader == ANYBODY and ticket.state is TicketState.SEALED:
                    yield ticket.request, core._owners[ticket.writer].name

    def gateways(self) -> list[Place]:
        return self.alive("gateway")

    def leaders(self) -> list[Place]:
        """More than one, while a deposed router has not heard of it."""
        return [place for place in self.alive("router") if place.what.leads]

    def is_ready(self) -> bool:
        """Whether everybody is there and knows the one router that leads."""
        for place in self.places.values():
            if not place.process.alive or place.what is None or place.process.stopped:
                return False
            link = getattr(place.what, "_link", None)
            if isinstance(place.what, WorkerShell | GatewaySession) and not (
                link and link.connected
            ):
                return False
        leaders = self.leaders()
        if len(leaders) != 1:
            return False
        router: RouterService = leaders[0].what
        if len(router.candidate.standbys) < self.shape.routers - 1:
            return False
        return len(router._core.state.fleet.all()) >= self.shape.prefills + self.shape.decodes

    def leaks(self) -> list[str]:
        """What is held though nobody asks for anything."""
        found: list[str] = []
        for place in self.places.values():
            match place.what:
                case StoreNode() as node:
                    node.check()
                    found += node.leaks()
                case RouterService() as service if service.leads:  # others' books count no more
                    entries = service._core.state.entries
                    found += [
                        f"queue entry {request} ({entry.phase})"
                        for request, entry in entries.items()
                    ]
                    found += [f"orphan {each.ticket}" for each in service._core.state.orphans]
                case GatewaySession() as session:
                    if session.in_flight:
                        found.append(f"{session.in_flight} streams at {place.name}")
        for process, engine in self.engines.items():
            if process.alive and engine.alive:
                engine.loop.pool.check()
                load, pool = engine.loop.load(), engine.loop.pool
                if load.running or load.waiting:
                    found.append(f"{load.running}+{load.waiting} sequences at {process}")
                if pool.free_count != pool.block_count:
                    found.append(f"{pool.block_count - pool.free_count} blocks of {process}")
        return found
