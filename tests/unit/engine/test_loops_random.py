"""Goal: whatever order things happen in, every request that is not cancelled gets exactly the
tokens of a single loop, and in the end every block, pin and ticket is back.

Method: two prefill and two decode workers with small pools, and every request is prefilled and
decoded where the dice say: on the usual workers, on one alone, or the other way round. Moves do
not happen when they are submitted but when the dice say so, one at a time per worker; the dice also
submit, cancel, preempt, and take stores down and up again. What the loops tell the router is
answered as a router would.
"""

import random
from dataclasses import replace
from typing import Any, Literal

import pytest

from pdserve.engine import loop as loop_module
from pdserve.engine.loop import EngineLoop
from pdserve.engine.outputs import ToRouter
from pdserve.ids import RequestId
from pdserve.kvstore.keys import block_keys
from pdserve.lifecycle import Event, Phase
from pdserve.messages import Beams, Cancel, Preempt, Progress, Request, WorkerFailed
from tests.unit.engine import rig as rig_module
from tests.unit.engine.beam_searches import answers, expected
from tests.unit.engine.fakes import BLOCK_TOKENS
from tests.unit.engine.late_device import LateDrawn, LateRunner, wait_for
from tests.unit.engine.rig import (
    GREEDY,
    NAMESPACE,
    SAMPLINGS,
    LateMover,
    Rig,
    plain,
    prompt,
    request,
)

ROUNDS = 150
SETTLE_ROUNDS_MAX = 20_000
ATTEMPTS_MAX = 30


class World:
    def __init__(
        self,
        seed: int,
        *,
        faults: bool,
        habit: float = 0.0,
        speculation: Literal["off", "prompt_lookup"] = "off",
        beams: bool = False,
        step_ahead: bool = False,
    ) -> None:
        self.beams = beams
        self.dice = random.Random(seed)
        # A text has room in a pool; drafts need some of it to repeat.
        self.prompt_max, self.answer_max = (10, 45) if habit else (30, 20)
        if beams:
            self.prompt_max, self.answer_max = 10, 9  # three beams that share little have room too
        self.rig = Rig(
            one_host=self.dice.random() < 0.5,
            habit=habit,
            speculation=speculation,
            step_ahead=step_ahead,
            clock=lambda: 0,  # in no time all drafts that are offered pay
        )
        for name in ("p0", "p1"):
            self.rig.prefill(name, blocks=14, chunk_tokens=8)
        for name in ("d0", "d1"):
            self.rig.decode(name, blocks=14, running_max=4)
        self.loops: list[EngineLoop] = [
            *self.rig.prefills.values(),
            *self.rig.decodes.values(),
        ]
        movers = [loop._mover for loop in self.loops]
        self.movers = [mover for mover in movers if isinstance(mover, LateMover)]
        assert len(self.movers) == 4
        self.faults = faults
        # Only greedy streams are stepped ahead; now and then one is not.
        self.samplings = [*SAMPLINGS.values(), *[GREEDY] * (12 if step_ahead else 0)]
        self.asked: dict[RequestId, Request] = {}
        self.first: dict[RequestId, Request] = {}
        self.cancelled: set[RequestId] = set()

    def submit(self) -> None:
        number = len(self.first)
        asked = request(
            f"r{number}",
            prompt(self.dice.randrange(1, self.prompt_max), salt=self.dice.randrange(3)),
            sampling=self.dice.choice(self.samplings),
            max_tokens=self.dice.randrange(1, self.answer_max),
            choice=number,
        )
        if self.beams and self.dice.random() < 0.5:
            width = self.dice.randrange(1, 4)
            asked = replace(asked, sampling=GREEDY, beams=Beams(width, width))
        self.first[asked.request] = asked
        self.dispatch(asked)

    def dispatch(self, asked: Request) -> None:
        self.asked[asked.request] = asked
        prefill, decode = self.dice.choice(("p0", "p1")), self.dice.choice(("d0", "d1"))
        match self.dice.randrange(4):
            case 0:
                prefill = decode
            case 1:
                decode = prefill
            case 2:
                prefill, decode = decode, prefill
        self.rig.send(asked, prefill=prefill, decode=decode)

    def step(self, loop: Any) -> None:
        for output in self.rig.step(loop):
            if isinstance(output, ToRouter):
                self.answer(output.message)
        while self.rig.parked:
            handoff = self.rig.parked.pop()
            if handoff.request.request in self.cancelled:
                self.rig.stores[handoff.store].abort(handoff.ticket)
            else:
                self.rig.resume(handoff, self.dice.choice(("d0", "d1", "p0")))
        for each in self.loops:
            each.pool.check()

    def answer(self, message: object) -> None:
        if not isinstance(message, Progress | WorkerFailed):
            return
        asked = self.asked[message.request]
        if message.request in self.cancelled:
            if isinstance(message, Progress) and message.event is Event.ADOPTED:
                self.cancel(message.request)  # it crossed its hand-off
        elif message.attempt != asked.attempt:
            return
        elif isinstance(message, WorkerFailed):
            assert asked.attempt < ATTEMPTS_MAX
            said = () if asked.beams else self.rig.tokens(asked.request)
            tokens = asked.tokens[: asked.prompt_tokens] + said
            keys = block_keys(NAMESPACE, tokens, BLOCK_TOKENS)
            self.dispatch(replace(asked, attempt=asked.attempt + 1, tokens=tokens, block_keys=keys))
        elif message.event is Event.PREEMPTED:
            self.dispatch(asked)

    def cancel(self, name: RequestId) -> None:
        self.cancelled.add(name)
        for loop in self.loops:
            loop.handle(Cancel(name))

    def play(self) -> None:
        for _ in range(ROUNDS):
            match self.dice.randrange(12):
                case 0:
                    self.submit()
                case 1 if self.first and self.dice.random() < 0.3:
                    self.cancel(self.dice.choice(list(self.first)))
                case 2 if self.first:
                    asked = self.asked[self.dice.choice(list(self.first))]
                    phase = self.dice.choice((Phase.PREFILLING, Phase.DECODING))
                    for loop in self.loops:
                        loop.handle(Preempt(asked.request, asked.attempt, phase))
                case 3 if self.faults:
                    store = self.dice.choice(list(self.rig.stores.values()))
                    store.down = self.dice.random() < 0.2
                case 4 if self.faults:
                    store = self.dice.choice(list(self.rig.stores.values()))
                    store.full = self.dice.random() < 0.2
                case 5 | 6 | 7:
                    self.dice.choice(self.movers).run_one()
                case _:
                    self.step(self.dice.choice(self.loops))

    def settle(self) -> None:
        """Everything that is left gets done, stores up and no dice thrown but for routing."""
        for store in self.rig.stores.values():
            store.down = store.full = False
        for _ in range(SETTLE_ROUNDS_MAX):
            moved = [mover.run_one() for mover in self.movers]
            busy = [loop for loop in self.loops if loop.busy()]
            for loop in busy:
                self.step(loop)
            if not busy and not any(moved):
                return
        raise AssertionError("it never settles")


@pytest.fixture(autouse=True)
def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig_module, "Mover", LateMover)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("faults", [False, True], ids=["calm", "faults"])
def test_any_order_gives_the_same_tokens_and_leaves_nothing(seed: int, *, faults: bool) -> None:
    play(World(seed, faults=faults), seed)


@pytest.mark.parametrize("first_seed", range(100, 115, 3))
@pytest.mark.parametrize("faults", [False, True], ids=["calm", "faults"])
def test_with_drafts_too(first_seed: int, *, faults: bool) -> None:
    accepted = 0
    for seed in range(first_seed, first_seed + 3):
        world = World(seed, faults=faults, habit=3.0, speculation="prompt_lookup")
        play(world, seed)
        accepted += sum(loop.load().counters.get("tokens_accepted", 0) for loop in world.loops)
    assert accepted > 0


@pytest.mark.parametrize("seed", range(200, 210))
@pytest.mark.parametrize("faults", [False, True], ids=["calm", "faults"])
def test_with_beam_searches_too(seed: int, *, faults: bool) -> None:
    world = World(seed, faults=faults, beams=True)
    play(world, seed)
    assert any(asked.beams for asked in world.first.values())


@pytest.mark.parametrize("first_seed", range(200, 206, 3))
@pytest.mark.parametrize("faults", [False, True], ids=["calm", "faults"])
def test_with_steps_ahead_too_on_a_device_that_computes_as_late_as_it_may(
    monkeypatch: pytest.MonkeyPatch, first_seed: int, *, faults: bool
) -> None:
    monkeypatch.setattr(rig_module, "FakeRunner", LateRunner)
    monkeypatch.setattr(loop_module, "Drawn", LateDrawn)
    monkeypatch.setattr(loop_module, "wait_for", wait_for)
    for seed in range(first_seed, first_seed + 3):
        world = World(seed, faults=faults, step_ahead=True)
        play(world, seed)
        assert any(runner.fed_steps for runner in world.rig.runners.values())


def play(world: World, seed: int) -> None:
    world.play()
    world.settle()
    for name, asked in world.first.items():
        if name not in world.cancelled and asked.beams is not None:
            assert answers(world.rig, name) == [answer.tokens for answer in expected(asked)]
        elif name not in world.cancelled:
            wanted = plain(asked, habit=world.rig.habit)
            assert world.rig.tokens(name) == wanted, f"{name} of seed {seed}"
    if world.faults:  # an abort that met a store that was down: the connection's end does it there
        for store in world.rig.stores.values():
            store.tickets.clear()
            store.claims.clear()
    world.rig.check_idle()
