"""``python -m tests.campaign``: one campaign; with ``--mutants`` the proof that it can fail; with
``--report`` both, with damaged streams and all interleavings, in ``docs/campaign.md``."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # actors are forks, of one thread

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

from pdserve.ids import StoreId
from tests.campaign import proof, report
from tests.campaign.campaign import Plan, Result, run
from tests.campaign.explorer import explore_all
from tests.campaign.mutants import MUTANTS
from tests.campaign.processes import NodePlan, NodeProcess
from tests.campaign.streams import Damaged, damage_streams
from tests.campaign.world import ARENA_SHARE, make_world

FAILURES_SHOWN = 5


def say(line: str) -> None:
    print(line, flush=True)


def show(result: Result) -> None:
    """What happened, and where it is red why."""
    say(f"seed {result.plan.seed}: {result.seconds:.1f} s, {result.audits} audits")
    parts = {"": result.numbers, "killed": result.kills, "stopped": result.stops}
    for what, numbers in parts.items():
        say(f"  {what} " + ", ".join(f"{name} {count}" for name, count in numbers.items()))
    for failure in result.failures[:FAILURES_SHOWN]:
        say(f"FAILED, seed {result.plan.seed}: {failure}")


def damaged_streams(seed: int, damage_min: int, seconds_max: float) -> Damaged:
    """With a node of their own."""
    world = make_world()
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        plan = NodePlan(
            store_id=StoreId("damaged"),
            directory=Path(name),
            shared=Path(name),
            metadata=str(Path(name) / "metadata"),
            slot_count=world.slot_count,
        )
        node = NodeProcess.start(plan)
        try:
            assert node.wait_until_it_serves(), node.log.read_text()
            assert node.address is not None
            result = damage_streams(
                node.address, world, seed, damage_min=damage_min, seconds_max=seconds_max
            )
            if complaints := node.complaints():
                result.wrong.append(complaints)
        finally:
            node.kill()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="of all chance; random without")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kills", type=int, default=50, help="go on until so many were killed")
    parser.add_argument("--gets", type=int, default=0, help="end early with so many, and the kills")
    parser.add_argument("--audit-every", type=float, default=12.0, help="seconds")
    parser.add_argument("--mutant", choices=MUTANTS, default=None, help="run with this one")
    parser.add_argument("--mutants", action="store_true", help="run with each, in turn")
    parser.add_argument("--damage", type=int, default=0, help="damage so many pieces of streams")
    parser.add_argument("--report", action="store_true", help="all of it, to docs/campaign.md")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    say(f"seed {seed}")
    if given.mutants:
        return 0 if all(each.holds for each in proof.prove(seed, say)) else 1
    mutant = None if given.mutant is None else MUTANTS[given.mutant]
    if shutil.which("redis-server") is None:
        say("redis-server is not installed: both nodes enter themselves in a file")
    plan = Plan(
        seed=seed,
        seconds=given.seconds,
        kills_min=given.kills,
        gets_enough=given.gets,
        audit_every_s=given.audit_every,
        mutant=mutant,
    )
    result = run(plan, say)
    show(result)
    damaged = Damaged()
    if given.damage:
        damaged = damaged_streams(seed, given.damage, given.seconds)
        say(f"{damaged}")
    if not given.report:
        return 0 if result.is_green and not damaged.wrong else 1
    findings = report.Findings(
        command="python -m tests.campaign " + " ".join(sys.argv[1:]),
        campaigns=[result],
        proofs=proof.prove(seed, say),
        damaged=damaged,
        explored=explore_all(),
        share=ARENA_SHARE,
    )
    report.write(findings)
    say(f"written to {report.PATH}")
    holds = all(each.holds for each in findings.proofs)
    return 0 if result.is_green and holds and not damaged.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
