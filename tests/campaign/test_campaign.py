"""Twenty seconds of the campaign, some of its mutants, and a few seconds of damaged streams."""

import subprocess
import sys

import pytest

from tests.campaign.__main__ import damaged_streams
from tests.campaign.mutants import ALL, MUTANTS

SECONDS = 20
KILLS = 20
GETS = 100_000
RUN_S_MAX = 280
"""For its end too, on a machine where others want the cores."""

FAST = {"pins", "generation", "checksum"}


def campaign(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: its actors are forks, and this one has threads."""
    return subprocess.run(
        [sys.executable, "-m", "tests.campaign", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=RUN_S_MAX,
    )


def test_every_read_is_right_while_everybody_is_killed() -> None:
    """It ends when ``SECONDS`` are over, or before when it has what such a run must bring."""
    ended = campaign("--seconds", str(SECONDS), "--kills", str(KILLS), "--gets", str(GETS))
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(mutant.name, marks=[] if mutant.name in FAST else pytest.mark.slow)
        for mutant in ALL
    ],
)
def test_without_a_guard_it_turns_red(name: str) -> None:
    ended = campaign(
        *("--mutant", name, "--seconds", str(MUTANTS[name].budget_s), "--kills", "0"),
        *("--audit-every", "4"),
    )
    assert ended.returncode == 1, f"{name} survived: {ended.stdout}\n{ended.stderr}"
    assert "FAILED" in ended.stdout, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MUTANTS if MUTANTS[name].is_control])
def test_with_a_fault_and_every_guard_it_stays_green(name: str) -> None:
    ended = campaign("--mutant", name, "--seconds", "15", "--kills", "0")
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"


def test_a_damaged_stream_gives_the_right_bytes_or_an_error() -> None:
    damaged = damaged_streams(seed=11, damage_min=300, seconds_max=30)
    assert damaged.wrong == []
    assert damaged.damage_count >= 300
    assert min(damaged.gets, damaged.handed, damaged.found_wrong) > 0, "or nothing was tried"
