"""``docs/campaign.md``: what a run found, in the figures of that run."""

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.campaign.campaign import Result
from tests.campaign.explorer import Explored
from tests.campaign.proof import Proof
from tests.campaign.streams import Damaged

PATH = Path(__file__).resolve().parents[2] / "docs" / "campaign.md"

_INTRODUCTION = (
    "# The kill campaign\n\n"
    "Written by `{command}`; do not edit. {when}, {machine}, commit {commit}.\n\n"
    "`tests/campaign` lets readers, writers, hand-offs, two store nodes (one with a disk), their "
    "metadata (SQLite and a real `redis-server`), a master with its standby, and pairs of nodes "
    "and of masters of which one was away for a while, run at once, in an arena that holds "
    "{share:.0%} of the blocks, and kills and stops them at random moments. Every block's bytes "
    "follow from its key, so every read is compared byte by byte. At quiet moments nothing may be "
    "held (no slot, pin, ticket, board, connection or descriptor), the node's own audit of its "
    "books and bytes finds nothing, and the master knows exactly what is stored. A call that does "
    "not return by its deadline, an untyped error, a broken promise or a node that hangs up on a "
    "live client is a failure too. A seed repeats the strikes; the interleaving is the machine's.\n"
)


@dataclass(frozen=True, slots=True)
class Findings:
    command: str
    campaigns: Sequence[Result]
    proofs: Sequence[Proof]
    damaged: Damaged
    explored: Explored
    share: float


def write(findings: Findings) -> None:
    PATH.write_text(compose(findings))


def compose(findings: Findings) -> str:
    parts = [
        _INTRODUCTION.format(
            command=findings.command,
            when=datetime.datetime.now(datetime.UTC).date().isoformat(),
            machine=_machine(),
            commit=_commit(),
            share=findings.share,
        ),
        "## Campaigns\n",
        _table(
            ("seed", "seconds", "verified gets", "of views", "local claims", "killed", "stopped",
             "hand-offs read", "aborted", "located", "fencing drills", "audits", "outcome"),
            (_campaign_row(each) for each in findings.campaigns),
        ),
        "Killed, by role: " + _sums(each.kills for each in findings.campaigns) + ".\n",
        "## With a guard switched off\n",
        "Each must turn the campaign red; where a guard is behind others, a fault makes those fail "
        "first, and the control, the fault with every guard in place, must stay green.\n",
        _table(
            ("mutant", "guard switched off", "fault beside it", "outcome", "found by"),
            (_proof_row(each) for each in findings.proofs),
        ),
        "## Damaged streams\n",
        _streams(findings.damaged),
        "## All interleavings\n",
        f"{findings.explored.states} states of two or three actors with at most six steps each, on "
        f"two to four slots, and {findings.explored.steps} steps between them, every death "
        "included: no promise broken.\n",
    ]  # fmt: skip
    return "\n".join(parts)


def _campaign_row(result: Result) -> tuple[str, ...]:
    numbers = result.numbers
    return (
        str(result.plan.seed),
        f"{result.seconds:.0f}",
        f"{numbers['gets']:,}",
        f"{numbers['views']:,}",
        f"{numbers['local']:,}",
        str(result.kill_count),
        str(sum(result.stops.values())),
        f"{numbers['adopted']:,}",
        f"{numbers['aborted']:,}",
        f"{numbers['located']:,}",
        str(numbers["drills"]),
        str(result.audits),
        "green" if result.is_green else f"RED: {result.failures[0].kind}",
    )


def _proof_row(proof: Proof) -> tuple[str, ...]:
    result = proof.result
    outcome = "green for" if result.is_green else "red after"
    return (
        proof.mutant.name,
        proof.mutant.guard or "none",
        proof.mutant.fault,
        f"{outcome} {result.seconds:.1f} s" + ("" if proof.holds else " (WRONG)"),
        proof.found_by,
    )


def _streams(damaged: Damaged) -> str:
    damage = ", ".join(f"{what} {count:,}" for what, count in sorted(damaged.damage.items()))
    errors = ", ".join(f"{name} {count:,}" for name, count in sorted(damaged.errors.items()))
    wrong = "none" if not damaged.wrong else damaged.wrong[0]
    return (
        f"A proxy damaged {damaged.damage_count:,} pieces of TCP streams between a client and a "
        f"node ({damage}). Wrong bytes or hangs: {wrong}. {damaged.gets:,} blocks were read, "
        f"{damaged.found_wrong:,} failed their checksum on the way, "
        f"{damaged.handed:,} hand-offs arrived over {damaged.connections:,} connections; typed "
        f"errors: {errors}.\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _sums(counts: Iterable[dict[str, int]]) -> str:
    totals: dict[str, int] = {}
    for each in counts:
        for role, count in each.items():
            totals[role] = totals.get(role, 0) + count
    return ", ".join(f"{role} {count}" for role, count in sorted(totals.items()))


def _machine() -> str:
    load = os.getloadavg()[2]  # of the last quarter of an hour, this run's own included
    return (
        f"{os.cpu_count()} cores ({platform.machine()}) at a load of {load:.0f}, "
        f"Python {platform.python_version()}"
    )


def _commit() -> str:
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=PATH.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() or "unknown"
