"""Who asks, what they must get, and what they got.

The expected tokens are those of a single loop without blocks, chunks or hand-offs
(``tests.unit.engine.rig.plain``). I1 is judged with every piece: what has been delivered is a
prefix of the expected answer, so no token is repeated, skipped or changed at any moment.
"""

import random
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import lru_cache

from pdserve.clock import MS, S
from pdserve.cluster.gateway.calls import Call
from pdserve.cluster.gateway.session import DEADLINE_GRACE_S, GatewaySession
from pdserve.errors import PdserveError
from pdserve.messages import FinishReason, Sampling, ServiceClass, Stop
from tests.simulation.loop import SimProcess
from tests.simulation.patches import steady_unix_ms
from tests.simulation.world import TENANTS, Place, World
from tests.unit.engine.rig import GREEDY, SAMPLINGS, plain, prompt, request

ANSWER_MAX = 24
STYLES: dict[str, Sampling] = {"greedy": GREEDY, "seeded": SAMPLINGS["seeded"]}


@lru_cache(maxsize=4096)
def expected(length: int, salt: int, style: str, seed: int, choice: int) -> tuple[int, ...]:
    """Of which an answer is the first ``max_tokens``."""
    asked = request("r", prompt(length, salt=salt), sampling=STYLES[style], max_tokens=ANSWER_MAX)
    return plain(replace(asked, seed=seed, choice=choice))


@dataclass
class Asked:
    """One call and what became of it."""

    name: str
    length: int
    salt: int
    style: str
    seed: int
    n: int
    max_tokens: int
    tenant: str
    timeout_ms: int
    leaves_after: int | None  # pieces, then the client hangs up
    began_ns: int = 0
    ended_ns: int | None = None
    outcome: str = "open"
    gateway: SimProcess | None = None
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    first_ns: int | None = None

    @staticmethod
    def drawn(dice: random.Random, name: str, *, timeout_ms: int) -> "Asked":
        return Asked(
            name=name,
            length=dice.choice((1, 3, 4, 5, 9, 12, 16, 21, 30)),
            salt=dice.randrange(3),
            style=dice.choice(tuple(STYLES)),
            seed=dice.randrange(2),
            n=dice.choice((1, 1, 1, 2)),
            max_tokens=dice.choice((1, 2, 5, 9, 14, 20)),
            tenant=dice.choice(TENANTS),
            timeout_ms=timeout_ms,
            leaves_after=dice.randrange(6) if dice.random() < 0.12 else None,
        )

    @property
    def due_ns(self) -> int:
        """I4: it must have ended by then, if its gateway runs."""
        return self.began_ns + self.timeout_ms * MS + round(DEADLINE_GRACE_S * S) + S

    def call(self) -> Call:
        return Call(
            call=self.name,
            prompt=prompt(self.length, salt=self.salt),
            n=self.n,
            sampling=STYLES[self.style],
            stop=Stop(max_tokens=self.max_tokens, ignore_eos=True),
            seed=self.seed,
            tenant=self.tenant,
            service_class=ServiceClass.STANDARD,
            deadline_unix_ms=steady_unix_ms(self.gateway, self.began_ns) + self.timeout_ms,
        )


def begin(world: World, place: Place, asked: Asked) -> None:
    asked.began_ns, asked.gateway = world.loop.now_ns, place.process
    session: GatewaySession = place.what
    world.note(
        f"ask {asked.name} at {place.name}: {asked.length} tokens, {asked.n}×{asked.max_tokens}"
    )
    place.process.on_death.append(lambda: _end(world, asked, "gateway died"))
    world.loop.spawn(place.process, _follow(world, session, asked))


async def _follow(world: World, session: GatewaySession, asked: Asked) -> None:
    pieces = session.generate(asked.call())
    count = 0
    try:
        async for piece in pieces:
            _take(world, asked, piece.choice, [token.token for token in piece.tokens], piece.finish)
            count += 1
            if asked.leaves_after is not None and count > asked.leaves_after:
                await pieces.aclose()  # type: ignore[attr-defined]
                _end(world, asked, "left")
                return
        _end(world, asked, "ok")
    except PdserveError as error:
        _end(world, asked, type(error).__name__)
    except AssertionError as error:  # I1: nobody awaits this task, so nobody else would say so
        world.loop.errors.append(str(error))


def _take(
    world: World, asked: Asked, choice: int, tokens: list[int], finish: FinishReason | None
) -> None:
    if asked.first_ns is None:
        asked.first_ns = world.loop.now_ns
    got = asked.tokens[choice]
    got += tokens
    wanted = expected(asked.length, asked.salt, asked.style, asked.seed, choice)[: asked.max_tokens]
    world.note(f"{asked.name}[{choice}] {len(got)} tokens, {finish}")
    assert tuple(got) == wanted[: len(got)], (
        f"I1: {asked.name}[{choice}] got {got}, expected {wanted}"
    )
    if finish is not None:
        assert finish is FinishReason.LENGTH, f"I1: {asked.name}[{choice}] ends with {finish}"
        assert len(got) == len(wanted), f"I1: {asked.name}[{choice}] ends after {len(got)} tokens"


def _end(world: World, asked: Asked, outcome: str) -> None:
    if asked.ended_ns is None:
        asked.ended_ns, asked.outcome = world.loop.now_ns, outcome
        world.note(f"{asked.name} ends: {outcome}")
