"""The tables of ``bench.scheduling`` on a trace of a few requests: every row comes."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from random import Random

import pytest

from bench import scheduling, scheduling_cells, scheduling_fairness
from bench.scheduling_cells import POLICIES, Cell, Figures, measure


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Forty prompts within forty seconds, some with a prefix in common."""
    chance = Random(5)
    file = tmp_path / "few.jsonl"
    with file.open("w") as lines:
        for index in range(40):
            blocks = chance.randint(1, 30)
            shared = list(range(blocks // 2))
            own = [1000 * (index + 1) + block for block in range(blocks - len(shared))]
            line = {
                "timestamp": 1000 * index,
                "input_length": 512 * blocks,
                "output_length": 8,
                "hash_ids": shared + own,
            }
            lines.write(json.dumps(line) + "\n")
    return file


def _here(cells: Iterable[Cell]) -> dict[Cell, Figures]:
    return {cell: measure(cell) for cell in dict.fromkeys(cells)}


def test_every_policy_has_its_rows(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "measure_all", _here)
    study = scheduling.Study((trace,), seeds=(0,), rhos=(0.9,))
    dominance = list(scheduling.dominance_rows(study))
    assert all(row.bar == "≥ 90 %" and row.holds is not None for row in dominance)
    rows = [*scheduling.queue_rows(study), *dominance]
    names = " | ".join(row.name for row in rows)
    assert all(row.value is not None for row in rows)
    for baseline in scheduling.BASELINES[1:]:
        assert baseline in names
    # The bars of traces that come along are not held against another one.
    assert next(row for row in rows if row.name == "few mean, ours, balanced").bar == ""


def test_oracles_and_baselines_see_the_same_load(trace: Path) -> None:
    """Equal work, so the worst that an order can do is spend it on the wrong ones first."""
    figures = {policy: measure(Cell(trace, 0.9, policy, seed=0)) for policy in POLICIES}
    assert figures["srpt, oracle"].mean <= figures["fcfs"].mean
    assert figures["lpm"].tokens_again == figures["fcfs"].tokens_again == 0


def test_bounds_are_counted() -> None:
    row = scheduling_fairness._bounds("tenant_flood", 4000)
    said = re.search(r"(\d+) came to it, worst wait (\d+) s", row.name)
    assert said is not None
    due, worst_s = map(int, said.groups())
    assert due > 0
    assert worst_s > 60
    assert row.value == 0
    assert row.holds


def test_a_known_policy_is_a_known_setting() -> None:
    assert len({id(router) for router in POLICIES.values()}) == len(POLICIES)
    assert scheduling_cells.POLICIES["ours, mean"].goal == "mean"
