"""One seed: a cluster, its load and its faults; then calm, and the books must balance.

    start ──► load and faults ──► faults end ──► a few more requests ──► everybody done ──► idle

    I1  no token twice, skipped or changed                     with every piece (``clients``)
    I2  a block is read as what it was claimed as              with every read (``store``)
    I3  owned + free + lent = capacity, of arenas and pools    every few events, and at the end
    I4  every call ends by its deadline, ok or typed error     at the end
    I5  after the faults all that is asked is answered, and nothing is held
    I6  nobody waits longer in the queue than its bound says   at the end, without faults
    I7  no store node speaks, or is entered, under an epoch that has been succeeded; no two routers
        lead in one epoch, and no link takes anything of an older one than it has heard of
    I8  nobody is refused as poison for the death of a worker that never had the request

Every tenth seed has no faults: there nothing may go wrong at all. One in ten is pressed for time
(``PRESSED``), and one for room (``CROWD``).
"""

import logging
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pdserve.clock import MS, S
from pdserve.cluster.router_service import RouterService
from tests.simulation import clients, faults
from tests.simulation.clients import Asked
from tests.simulation.loop import VirtualLoop
from tests.simulation.network import Network
from tests.simulation.patches import virtual
from tests.simulation.register import Reigns
from tests.simulation.shape import Shape
from tests.simulation.store import Membership, StoreNode
from tests.simulation.waiting import starved
from tests.simulation.worker import SimParts, forget_nodes
from tests.simulation.world import World

LOAD_NS = 400 * MS
CALLS = (6, 13)
LINGER_NS = (0, 0, 0, 500 * MS, 3 * S, 8 * S, 16 * S)
"""How long faults may go on behind the load, while anybody waits for an answer."""

TIMEOUT_MS = 40_000
START_NS = 20 * S
"""Everybody is up by then, or it is a failure."""

HEAL_NS = 60 * S
"""From the end of the faults until everybody is there again."""

IDLE_NS = 40 * S
"""From the last answer until nothing is held: a gateway's grace, and a silent worker's."""

PRESSED = Shape(
    hosts=1, prefills=1, decodes=1, gateways=1, mode="disaggregated", slots=64, pool_blocks=32,
    gamma_per_s=0.001, rescue_after_ms=200.0, rescue_ratio=1.0, tokens_per_s=145,
)  # fmt: skip
"""Shortest first, but for those who are rescued."""

PRESSED_SLOW = 20
SHORTS, SHORT_EVERY_NS, SHORT_TOKENS = 36, 40 * MS, 7
"""A short prompt takes 54 ms there, so the queue grows."""

LONG_TOKENS, LONG_AFTER_NS = 40, 300 * MS
"""It takes 280 ms, and has a claim 480 ms after it was asked."""


CROWD = (14, 22)
CROWD_NS = 150 * MS
CROWD_TOKENS = 20
"""Calls of long answers at once, where a decode worker has room for two to the end: they are parked
and resumed by turns."""


@dataclass(frozen=True, slots=True)
class Outcome:
    seed: int
    violation: str | None
    digest: str  # of the log and the number of callbacks
    callbacks: int
    virtual_s: float
    outcomes: tuple[str, ...]
    faults: tuple[str, ...]
    log: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """In the place of what a seed would draw."""

    shape: Shape
    faults: tuple[faults.Fault, ...]


def simulate(seed: int, *, keep_log: bool = False, plan: Plan | None = None) -> Outcome:
    """Never raises for what the cluster does: that is the outcome's ``violation``."""
    os.environ.setdefault("PDSERVE_COMPILED", "0")
    loop = VirtualLoop()
    chance = random.Random(f"{seed} chance")  # of processes: secrets and ids
    network = Network(loop, random.Random(f"{seed} network"))
    loop.network = network
    parts: list[World] = []
    reigns = Reigns()
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    forget_nodes()
    directory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    try:
        with (
            tempfile.TemporaryDirectory(dir=directory) as scratch,
            virtual(
                loop,
                chance,
                lambda config, role: SimParts(config, role, parts[0]),
                reigns.watch,
            ),
        ):
            play = _Play(
                seed, loop, network, Path(scratch), parts, reigns, keep_log=keep_log, plan=plan
            )
            try:
                violation = play.run()
            finally:
                loop.shut_down()
    finally:
        logging.disable(level)
    world = parts[0]
    world.note(f"{loop.callback_count} callbacks")
    return Outcome(
        seed,
        violation,
        world.digest(),
        loop.callback_count,
        loop.now_ns / S,
        tuple(asked.outcome for asked in play.asked),
        tuple(fault.kind for fault in play.faults),
        tuple(world.log),
    )


class _Play:
    def __init__(
        self,
        seed: int,
        loop: VirtualLoop,
        network: Network,
        scratch: Path,
        parts: list[World],
        reigns: Reigns,
        *,
        keep_log: bool,
        plan: Plan | None,
    ) -> None:
        self.dice = dice = random.Random(f"{seed} plan")
        self.is_pressed = plan is None and seed % 10 == 5
        self.is_crowded = plan is None and seed % 10 == 7
        self.is_calm = (plan is None and seed % 10 == 0) or self.is_pressed
        self.loop = loop
        self.asked: list[Asked] = []
        self.faults = [] if self.is_calm else faults.drawn(dice, span_ns=LOAD_NS)
        self.linger_ns = 0 if self.is_calm else dice.choice(LINGER_NS)
        shape = PRESSED if self.is_pressed else Shape.drawn(dice)
        if self.is_crowded:
            mode = dice.choice(("disaggregated", "auto"))
            shape = replace(shape, mode=mode, prefills=1, decodes=2, slots=64, pool_blocks=14)
            self.faults = faults.with_one(self.faults, "kill resuming", 10 * MS)
        if plan is not None:
            shape, self.faults, self.linger_ns = plan.shape, list(plan.faults), max(LINGER_NS)
        self.world = world_of(loop, network, scratch, shape, seed, parts, reigns, keep_log=keep_log)

    def run(self) -> str | None:
        try:
            self._play()
        except AssertionError as error:
            return str(error) or repr(error)
        return None

    # ── the acts ─────────────────────────────────────────────────────────────────────────────────

    def _play(self) -> None:
        loop, world = self.loop, self.world
        self._await(world.is_ready, START_NS, "I5: the cluster does not start")
        if self.is_pressed:
            self._press()
            return
        zero_ns = loop.now_ns
        for index in range(self.dice.randrange(*(CROWD if self.is_crowded else CALLS))):
            asked = Asked.drawn(self.dice, f"call-{index}", timeout_ms=TIMEOUT_MS)
            within_ns = CROWD_NS if self.is_crowded else LOAD_NS
            if self.is_crowded:
                asked = replace(asked, n=1, max_tokens=CROWD_TOKENS)
            self._later(zero_ns + self.dice.randrange(within_ns), partial(self._ask, asked))
        for fault in self.faults:
            self._later(zero_ns + fault.at_ns, partial(faults.strike, world, fault))
        self._await(lambda: False, LOAD_NS, "")
        self._await(self._all_ended, self.linger_ns, "")
        self._await(lambda: loop.now_ns >= world.lasting_ns, faults.LASTING_NS, "")
        self._heal()
        self._await(world.is_ready, HEAL_NS, "I5: the cluster does not recover")
        probes = [
            Asked.drawn(self.dice, f"probe-{index}", timeout_ms=TIMEOUT_MS) for index in range(2)
        ]
        for probe in probes:
            self._ask(probe)
        self._await(self._all_ended, TIMEOUT_MS * MS + 5 * S, "")
        self._judge(probes)
        self._balance()

    def _press(self) -> None:
        """Short prompts without end, and a long one among them that they would all overtake."""
        loop, world = self.loop, self.world
        for engine in world.engines.values():
            engine.slow = PRESSED_SLOW
        zero_ns = loop.now_ns
        long = replace(
            Asked.drawn(self.dice, "long", timeout_ms=TIMEOUT_MS),
            length=LONG_TOKENS, n=1, max_tokens=1, leaves_after=None,
        )  # fmt: skip
        self._later(zero_ns + LONG_AFTER_NS, lambda: self._ask(long))
        for index in range(SHORTS):
            short = replace(
                Asked.drawn(self.dice, f"short-{index}", timeout_ms=TIMEOUT_MS),
                length=SHORT_TOKENS, salt=index, n=1, max_tokens=1, leaves_after=None,
            )  # fmt: skip
            when_ns = zero_ns + index * SHORT_EVERY_NS + self.dice.randrange(10 * MS)
            self._later(when_ns, partial(self._ask, short))
        self._await(lambda: len(self.asked) > SHORTS, 2 * SHORTS * SHORT_EVERY_NS, "")
        self._await(self._all_ended, TIMEOUT_MS * MS + 5 * S, "")
        self._judge([])
        chunk_tokens = world.config.prefill.chunk_tokens
        late = starved(self.asked, PRESSED, slow=PRESSED_SLOW, chunk_tokens=chunk_tokens)
        assert late is None, f"I6: {late}"
        self._balance()

    def _balance(self) -> None:
        """Nothing is held, and the books agree."""
        world = self.world
        world.reading = False
        self._await(lambda: not world.leaks(), IDLE_NS, "I5: still held", seldom=True)
        for place in world.places.values():
            if isinstance(place.what, StoreNode):
                place.what.check()
        world.membership.check()

    def _heal(self) -> None:
        world = self.world
        world.note("faults end")
        world.is_healed = True
        world.network.heal()
        world.register.down_until_ns = 0
        for place in world.places.values():
            if place.process.stopped:
                self.loop.continue_process(place.process)
            engine = world.engines.get(place.process)
            if engine is not None:
                engine.slow = 1
            if isinstance(place.what, StoreNode):
                place.what.is_full = False

    def _judge(self, probes: list[Asked]) -> None:
        for asked in self.asked:
            assert asked.ended_ns is not None, f"I4: {asked.name} has not ended"
            late = asked.ended_ns > asked.due_ns
            assert not late or asked.outcome == "gateway died", f"I4: {asked.name} ended too late"
            # Every pool has a worker again long before the deadline, so nothing need be lost but
            # what a dead gateway had: its connections are gone with it.
            # Chance may have somebody computed at two deaths, and alone: who has nothing else
            # against him is refused for that, as docs/overload.md says.
            assert asked.outcome in ("ok", "left", "gateway died", "PoisonRequest"), (
                f"I4: {asked.name} failed: {asked.outcome}"
            )
        assert not self.world.innocent, (
            f"I8: refused is {self.world.innocent[0]}, which never had it"
        )
        for probe in probes:
            assert probe.outcome != "gateway died", f"I5: {probe.name} after the faults"
        if self.is_calm and not self.is_pressed:  # there it predicts a rate that is not so
            router: RouterService = self.world.leaders()[0].what
            broken = router.snapshot().counters.get("bounds_broken", 0)
            assert not broken, f"I6: {broken} waited longer than their bound"

    # ── small things ─────────────────────────────────────────────────────────────────────────────

    def _ask(self, asked: Asked) -> None:
        ready = [
            place
            for place in self.world.gateways()
            if place.what._link is not None and place.what._listener is not None
        ]
        if ready:
            self.asked.append(asked)
            clients.begin(self.world, self.dice.choice(ready), asked)

    def _all_ended(self) -> bool:
        return all(asked.ended_ns is not None for asked in self.asked)

    def _later(self, when_ns: int, action: Callable[[], None]) -> None:
        def act() -> None:
            action()

        self.loop.at(when_ns, act, None)

    def _await(
        self, done: Callable[[], bool], limit_ns: int, otherwise: str, *, seldom: bool = False
    ) -> None:
        """Looks every 20 ms, or 500 ms, of virtual time."""
        loop = self.loop
        deadline_ns = loop.now_ns + limit_ns
        while not done():
            if loop.now_ns >= deadline_ns:
                if otherwise:
                    raise AssertionError(f"{otherwise} after {limit_ns // S} s: {self._state()}")
                return
            until_ns = loop.now_ns + (500 if seldom else 20) * MS
            loop.run_until(lambda: False, deadline_ns=until_ns)
            self._errors()

    def _errors(self) -> None:
        assert not self.loop.errors, self.loop.errors[0]

    def _state(self) -> str:
        leaks = self.world.leaks()
        absent = [
            p.name for p in self.world.places.values() if not p.process.alive or p.what is None
        ]
        return f"{leaks[:4]}, absent: {absent}"


def world_of(
    loop: VirtualLoop,
    network: Network,
    scratch: Path,
    shape: Shape,
    seed: int,
    parts: list[World],
    reigns: Reigns,
    *,
    keep_log: bool,
) -> World:
    world = World(
        loop,
        network,
        Membership(scratch / "members"),
        shape,
        random.Random(f"{seed} faults"),
        seed,
        reigns,
        keep_log=keep_log,
    )
    parts.append(world)  # its workers ask for it
    world.start()
    return world
