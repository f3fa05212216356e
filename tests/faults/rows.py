"""What runs of the faults have shown: ``docs/faults.json``, and ``docs/faults.md`` made from it.

Every test that has passed enters its row, in the place of the one that an earlier run entered.
``FAULTS_REPORT`` names the table's file; without it nothing is written.
"""

import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPORT_ENV = "FAULTS_REPORT"

HEAD = """# Faults

What a cluster does while something in it dies; written by `make faults`, do not edit. Every row is
one test of `tests/faults`: the load runs, the fault strikes in the middle of it, and every answer
is compared with that of a run without the fault: text, token ids, log-probabilities and finish
reasons, for greedy and seeded requests, penalties, `n` = 2, log-probabilities, stop strings and
JSON schemas in turn. *Identical* counts answers that are equal in all of it, where answers are what
the test is about. *Pause* is the longest that any client waited for its next event, from sending
on; what else the machine did is in it, which the last column tells. After every fault the cluster
must hold nothing: no queue entry, no block, no ticket. One row again:
`FAULTS_REPORT=docs/faults.md python -m pytest "TEST"`; `FAULTS_REQUESTS_PER_CLIENT` (100) makes its
load smaller, and the row says what it was.

| | fault | load | identical | what else | seed | test | date, machine |
|---|---|---|---|---|---|---|---|
"""


def _machine() -> str:
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[1]
    return f"{cores} cores ({platform.machine()}) at a load of {load:.0f}"


@dataclass(frozen=True, slots=True)
class Row:
    fault: str  # F1 …
    what: str
    load: str
    identical: int
    asked: int  # 0: answers are not what the test is about
    note: str
    seed: int
    date: str = field(default_factory=lambda: f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}")
    machine: str = field(default_factory=_machine)
    test: str = field(
        default_factory=lambda: os.environ["PYTEST_CURRENT_TEST"].removesuffix(" (call)")
    )


def enter(fault: str, what: str, load: str, note: str, *, seed: int, whole: int = 0) -> None:
    """The row of a test that has passed; ``whole`` answers were asked for and were right."""
    add(Row(fault, what, load, whole, whole, note, seed))


def add(row: Row) -> None:
    """Called in a test."""
    path = os.environ.get(REPORT_ENV)
    if not path:
        return
    table = Path(path)
    kept = table.with_suffix(".json")
    rows = [Row(**entry) for entry in json.loads(kept.read_text())] if kept.exists() else []
    rows = sorted([*(r for r in rows if r.test != row.test), row], key=_place)
    kept.write_text(json.dumps([asdict(each) for each in rows], indent=1) + "\n")
    table.write_text(text_of(rows))


def _place(row: Row) -> tuple[int, str]:
    return int(row.fault[1:]), row.what


def _identical(row: Row) -> str:
    return f"{row.identical} of {row.asked}" if row.asked else "–"


def text_of(rows: list[Row]) -> str:
    return HEAD + "".join(
        f"| {row.fault} | {row.what} | {row.load} | {_identical(row)} | {row.note} "
        f"| {row.seed} | `{row.test}` | {row.date}, {row.machine} |\n"
        for row in rows
    )
