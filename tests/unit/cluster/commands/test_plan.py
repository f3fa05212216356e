"""``pdserve plan`` around its search: objectives, settings, refusals, and what is printed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pdserve.cluster.commands import plan as plan_command
from pdserve.cluster.commands.plan import Objectives, objectives_of, plan, simulation_of
from pdserve.cluster.profiles import read_profile
from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError
from pdserve.router_config import RouterConfig
from pdserve.simulator.settings import SimulationSettings
from pdserve.simulator.traces import Trace

SLO = "ttft=500ms,tpot=50ms"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    lines = [
        {"timestamp": 100 * i, "input_length": 600, "output_length": 9, "hash_ids": [i]}
        for i in range(20)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Trace, SimulationSettings]]:
    """What was simulated. It takes 3 prefill workers for the one objective, 2 for the other."""
    calls: list[tuple[Trace, SimulationSettings]] = []

    def simulate(trace: Trace, settings: SimulationSettings) -> Any:
        calls.append((trace, settings))
        ttft = 1.0 if settings.prefill_workers >= 3 else 0.4
        tpot = 1.0 if settings.decode_workers >= 2 else 0.6

        def attainment(*, ttft_s: float | None = None, tpot_s: float | None = None) -> float:
            return min(1.0 if ttft_s is None else ttft, 1.0 if tpot_s is None else tpot)

        return SimpleNamespace(attainment=attainment)

    monkeypatch.setattr(plan_command, "simulate", simulate)
    return calls


@pytest.mark.parametrize(
    ("slo", "objectives"),
    [
        ("ttft=500ms,tpot=50ms", Objectives(0.5, 0.05)),
        ("tpot=50", Objectives(None, 0.05)),
        (" ttft = 1.5s ", Objectives(1.5, None)),
    ],
)
def test_objectives_in_milliseconds_or_seconds(slo: str, objectives: Objectives) -> None:
    assert objectives_of(slo) == objectives


@pytest.mark.parametrize(
    ("slo", "complaint"),
    [
        ("", "'' does not fit; say ttft=TIME"),
        ("ttft", "'ttft' does not fit"),
        ("e2e=5s", "'e2e=5s' does not fit"),
        ("ttft=1s,ttft=2s", "'ttft=2s' does not fit"),
        ("ttft=fast", "'fast' is no time"),
        ("ttft=5min", "'5min' is no time"),
        ("ttft=1.2.3s", "is no time"),
        ("ttft=.s", "is no time"),
        ("ttft=-5ms", "'-5ms' is no time"),
        ("ttft=0ms", "ttft must be above 0"),
    ],
)
def test_objectives_that_are_none_are_refused(slo: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        objectives_of(slo)
    assert complaint in str(caught.value)


def test_a_plan_says_which_pools_are_the_cheapest(
    trace: Path, played: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(trace, slo=SLO, profile="h100-llama3-8b", workers_max=8, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["cheapest"]["prefill"], told["cheapest"]["decode"]) == (3, 2)
    assert told["cheapest"]["cost"] == 5
    assert (told["origin"], told["ttft_s"]) == ("analytic", 0.5)
    assert len(told["evaluated"]) == len(played)


def test_the_table_shows_everything_that_was_tried(
    trace: Path, played: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(trace, slo=SLO, profile="h100-llama3-8b", workers_max=8)
    out = capsys.readouterr().out
    assert out.count("%") == 3 * len(played)
    (line,) = [line for line in out.splitlines() if "cheapest" in line and "100.0%" in line]
    assert line.split() == ["3", "2", "5", "100.0%", "100.0%", "100.0%", "cheapest"]


def test_nothing_that_holds_is_an_answer_too(
    trace: Path, played: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not plan(trace, slo=SLO, profile="h100-llama3-8b", workers_max=3, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["cheapest"] is None
    assert "first token that is late" in told["why"]


def test_the_trace_is_cut_and_sped_up_as_asked(
    trace: Path, played: list[tuple[Trace, SimulationSettings]]
) -> None:
    plan(trace, slo=SLO, workers_max=8, speed=2.0, requests_max=11)
    requests = played[0][0].requests
    assert len(requests) == 11
    assert requests[-1].arrival_ns == 10 * 100 * 1_000_000 // 2


def test_a_profile_brings_the_size_of_its_workers() -> None:
    profile = read_profile("h100-llama3-8b")
    settings = simulation_of(ClusterConfig(), profile, 3, 2)
    assert settings.costs == profile.costs
    assert settings.decode_tokens == settings.cache_tokens == profile.size.kv_capacity_tokens
    assert (settings.prefill_workers, settings.decode_workers) == (3, 2)
    assert settings.chunk_tokens == ClusterConfig().prefill.chunk_tokens


def test_without_a_profile_workers_are_as_they_are_configured(
    trace: Path, played: list[tuple[Trace, SimulationSettings]]
) -> None:
    plan(trace, slo=SLO, workers_max=8)
    settings = played[0][1]
    assert settings.costs.origin == "believed"
    assert settings.chunk_tokens == ClusterConfig().prefill.chunk_tokens
    assert settings.decode_tokens == ClusterConfig().decode.pool_bytes // 23_040


def test_the_real_simulator_gives_an_answer(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Goal: the command and the simulator fit together. Method: hours for each token."""
    assert plan(trace, slo="ttft=9999s", profile="h100-llama3-8b", workers_max=3, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["cheapest"]["prefill"], told["cheapest"]["decode"]) == (1, 1)
    assert told["cheapest"]["attainment"]["both"] == 1.0


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"workers_max": 1}, "workers-max is 1, must be at least 2"),
        ({"attainment": 1.5}, "attainment is 1.5, must be in"),
        ({"prefill_cost": 0.0}, "prefill-cost is 0.0, must be above 0"),
        ({"speed": float("nan")}, "speed is nan, must be above 0"),
        ({"requests_max": 0}, "requests-max is 0, must be above 0"),
        ({"profile": "h100-llama3-8"}, "did you mean 'h100-llama3-8b'"),
        ({"config": ClusterConfig(router=RouterConfig(mode="aggregated"))}, "has one pool"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    trace: Path, played: list[Any], given: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(trace, slo=SLO, **given)
    assert complaint in str(caught.value)
    assert played == []
