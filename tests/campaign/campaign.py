"""One run: so long, so many strikes, and quiet moments in between when everything is counted."""

import gc
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaign.audit import audit, left_behind, own_descriptors
from tests.campaign.board import TOTALS, Number
from tests.campaign.disk import swap_records
from tests.campaign.mutants import Mutant
from tests.campaign.stage import SSD, Failure, Stage
from tests.campaign.world import make_world

QUIET_S_MAX = 60.0
END_S_MAX = 60.0
TICK_S = 0.01
DAMAGE_EVERY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    seed: int
    seconds: float
    kills_min: int = 0  # it goes on for as long as these take
    gets_enough: int = 0  # with the kills, they end it before its time; 0: never
    strike_every_s: float = 0.3  # on average
    audit_every_s: float = 12.0
    mutant: Mutant | None = None


@dataclass
class Result:
    plan: Plan
    seconds: float = 0.0
    numbers: dict[str, int] = field(default_factory=dict)
    kills: dict[str, int] = field(default_factory=dict)
    stops: dict[str, int] = field(default_factory=dict)
    audits: int = 0
    failures: list[Failure] = field(default_factory=list)

    @property
    def kill_count(self) -> int:
        return sum(self.kills.values())

    @property
    def is_green(self) -> bool:
        return not self.failures


def run(plan: Plan, say: Callable[[str], None] = lambda _: None) -> Result:
    """Until its time is over and its kills are done, or until something is wrong."""
    result = Result(plan)
    world = make_world()
    gc.freeze()  # forks share what is there already
    shared = _shared_memory()
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        directory = Path(name)
        descriptors = own_descriptors()
        stage = Stage(plan.seed, world, directory, shared, plan.mutant)
        try:
            _play(stage, plan, result, say)
            stage.end(END_S_MAX)
        finally:
            stage.close()
            problem = left_behind(shared, [plan.directory / "sockets" for plan in stage.plans])
            shutil.rmtree(shared)
        result.failures = stage.failures
        if problem and not result.failures:
            result.failures.append(Failure("leak", "nodes", problem))
        if own_descriptors() != descriptors and not result.failures:
            result.failures.append(Failure("leak", "campaign", "its own descriptors"))
        result.numbers = {number.name.lower(): stage.board.total(number) for number in TOTALS}
        result.kills, result.stops = dict(stage.kills), dict(stage.stops)
    return result


def _shared_memory() -> Path:
    """A folder of this run's own, where shared memory is mounted."""
    root = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="campaign-", dir=root if root.is_dir() else None))


def _play(stage: Stage, plan: Plan, result: Result, say: Callable[[str], None]) -> None:
    chance = random.Random(f"{plan.seed} strikes")
    began_s = now_s = time.monotonic()
    strike_at_s = began_s + 0.5
    audit_at_s = began_s + min(plan.audit_every_s, plan.seconds / 2)
    damage_at_s = began_s
    while not stage.failures and not _is_over(stage, plan, now_s - began_s):
        time.sleep(TICK_S)
        stage.look_around()
        now_s = time.monotonic()
        if now_s >= strike_at_s:
            strike_at_s = now_s + chance.uniform(0, 2 * plan.strike_every_s)
            stage.strike()
        if plan.mutant is not None and plan.mutant.swaps_records and now_s >= damage_at_s:
            damage_at_s = now_s + DAMAGE_EVERY_S
            swap_records(stage.plans[SSD].ssd_directory, chance)
        if now_s >= audit_at_s:
            audit_at_s = now_s + plan.audit_every_s
            _audit(stage, result)
            say(_progress(stage, now_s - began_s))
    result.seconds = time.monotonic() - began_s
    if not stage.failures:
        _audit(stage, result)
        result.seconds = time.monotonic() - began_s


def _is_over(stage: Stage, plan: Plan, elapsed_s: float) -> bool:
    if sum(stage.kills.values()) < plan.kills_min:
        return False
    is_enough = 0 < plan.gets_enough <= stage.board.total(Number.GETS)
    return elapsed_s >= plan.seconds or is_enough


def _audit(stage: Stage, result: Result) -> None:
    if not stage.quieten(QUIET_S_MAX):
        return
    for node in stage.nodes:
        problem = audit(node, is_damaged=stage.mutant is not None)
        if problem:
            stage.fail("leak", node.plan.store_id, problem + stage.who_maps(node))
            break
    else:
        if problem := stage.audit_masters():
            stage.fail("masters", "auditor", problem)
    result.audits += 1
    stage.go_on()


def _progress(stage: Stage, elapsed_s: float) -> str:
    board = stage.board
    return (
        f"{elapsed_s:6.1f} s  {board.total(Number.GETS)} gets  "
        f"{sum(stage.kills.values())} kills  {sum(stage.stops.values())} stops  "
        f"{board.total(Number.ADOPTED)} hand-offs  {board.total(Number.ABORTED)} aborted  "
        f"{board.total(Number.DRILLS)} drills"
    )
