"""``pdserve simulate`` and ``pdserve record`` without a cluster."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from pdserve.clock import MS, S
from pdserve.cluster.commands import record as record_command
from pdserve.cluster.commands import simulate as simulate_command
from pdserve.cluster.commands.simulate import Wish, run_simulations, settings_of
from pdserve.cluster.profiles import Profile, Size
from pdserve.config import ClusterConfig, PoolConfig, StoreConfig
from pdserve.errors import ConfigError
from pdserve.messages import Role
from pdserve.router.costs import believed
from pdserve.settings import from_tree, load
from pdserve.simulator.result import Result
from pdserve.simulator.run import simulate
from pdserve.simulator.settings import Death, Noise, SimulationSettings, Slowdown
from pdserve.simulator.traces import Trace

HEADER = '{"pdserve_recording":1,"block_tokens":16}\n'


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.jsonl"
    lines = [
        json.dumps(
            {
                "arrival_ms": 100 * index,
                "prompt_tokens": 40,
                "generated_tokens": 3,
                "blocks": [0, 1],
                "tenant": "",
                "service_class": "standard",
            }
        )
        for index in range(5)
    ]
    file.write_text(HEADER + "\n".join(lines))
    return file


def test_it_prints_a_table_and_writes_both_files(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, drawn = tmp_path / "found.json", tmp_path / "drawn.html"
    wish = Wish(policies=("fcfs", "skip_join"), speeds=(1.0, 2.0), requests=8)
    run_simulations(trace, ClusterConfig(), wish, json_file=found, html_file=drawn)
    tree = json.loads(found.read_text())
    assert [(case["policy"], case["load"]) for case in tree["cases"]] == [
        ("fcfs", 1.0),
        ("fcfs", 2.0),
        ("skip_join", 1.0),
        ("skip_join", 2.0),
    ]
    assert {case["requests"] for case in tree["cases"]} == {8}
    assert drawn.read_text().startswith("<!doctype html>")
    assert "skip_join" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (Wish(policies=("fifo",)), "policy is 'fifo', must be one of skip_join, fcfs"),
        (Wish(speeds=(0.0,)), "speed is 0.0, must be above 0"),
        (Wish(speeds=()), "no speed is given"),
        (Wish(requests=0), "requests is 0"),
        (Wish(hosts=0), "hosts is 0"),
        (Wish(noise_sigma=-1.0), "noise is -1.0, must be at least 0"),
        (Wish(noise_sigma=float("nan")), "noise is nan, must be at least 0"),
        (Wish(failures=("prefill:0",)), "fail is 'prefill:0', must be like prefill:0@30"),
        (Wish(failures=("gateway:0@1",)), "fail is 'gateway:0@1', must be like"),
        (
            Wish(failures=("decode:1@1",)),
            "there are 1 decode workers, counted from 0; set decode.r",
        ),
        (Wish(failures=("decode:0x2@1+3",)), "stays as it is until the next factor"),
        (Wish(failures=("decode:0x0@1",)), "has a factor above 0"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused_before_anything_runs(
    wish: Wish, said: str, trace: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        run_simulations(trace, ClusterConfig(), wish)


def test_failures_and_noise_are_those_that_were_said(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[SimulationSettings] = []

    def noting(trace: Trace, settings: SimulationSettings) -> Result:
        played.append(settings)
        return simulate(trace, settings)

    monkeypatch.setattr(simulate_command, "simulate", noting)
    said = ("prefill:0@0.05+0.2", "prefill:0@7", "decode:0x4@60.5")
    run_simulations(trace, ClusterConfig(), Wish(failures=said, noise_sigma=0.3))
    (settings,) = played
    assert settings.noise == Noise(sigma=0.3)
    assert settings.failures == (
        Death(role=Role.PREFILL, index=0, at_ns=50 * MS, back_after_ns=200 * MS),
        Death(role=Role.PREFILL, index=0, at_ns=7 * S),
        Slowdown(role=Role.DECODE, index=0, factor=4.0, at_ns=60_500 * MS),
    )


def test_a_file_that_cannot_be_written_is_said(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*missing"):
        run_simulations(
            trace, ClusterConfig(), Wish(), json_file=tmp_path / "missing" / "found.json"
        )


def test_sizes_come_from_the_profile_and_else_from_the_configuration() -> None:
    config = ClusterConfig(
        prefill=PoolConfig(replicas=3, replicas_max=3, pool_blocks=100, chunk_tokens=128),
        decode=PoolConfig(replicas=2, replicas_max=2, pool_bytes=23_040 * 5000),
        store=StoreConfig(arena_bytes=23_040 * 700),
    )
    costs = believed(1000)
    own = settings_of(config, Profile(costs, Size()))
    assert (own.prefill_workers, own.decode_workers) == (3, 2)
    assert (own.cache_tokens, own.decode_tokens, own.store_tokens) == (1600, 5000, 700)
    assert own.chunk_tokens == 128
    assert own.double_cost_tokens is None
    size = Size(kv_capacity_tokens=9000, chunk_tokens=512, running_max=7, double_cost_tokens=2058)
    given = settings_of(config, Profile(costs, size))
    assert (given.cache_tokens, given.decode_tokens, given.chunk_tokens) == (9000, 9000, 512)
    assert (given.running_max, given.double_cost_tokens) == (7, 2058)
    without = load(None, environment={}, assignments=["store.offload=false"])
    assert settings_of(without, Profile(costs, Size())).store_tokens == 0


def answers(*said: dict[str, Any]) -> Any:
    waiting = list(said)
    return lambda *_: waiting.pop(0)


def test_record_writes_what_it_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        record_command, "get_json", answers({"recording": "x", "lines": [HEADER], "lost": 0})
    )
    file = tmp_path / "out.jsonl"
    record_command.record("http://there", file, seconds=0.0)
    assert file.read_text() == HEADER
    with pytest.raises(ConfigError, match=r"out.jsonl is there already"):
        record_command.record("http://there", file, seconds=0.0)


def test_another_recording_is_not_appended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    out = io.StringIO()
    fetch = answers(
        {"recording": "x", "lines": [HEADER], "lost": 0},
        {"recording": "y", "lines": [HEADER], "lost": 0},
    )
    with pytest.raises(ConfigError, match="another recording"):
        record_command._fetch_all(fetch, out, None)
    assert out.getvalue() == HEADER


def test_scaling_pools_are_shown_beside_static_ones_of_the_same_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "burst.jsonl"
    asked = '"input_length": 3000, "output_length": 20, "hash_ids": []'
    lines = [
        f'{{"timestamp": {at_ms}, {asked}}}'
        for at_ms in (*range(0, 60_000, 2000), *range(60_000, 90_000, 250))
    ]
    trace.write_text("\n".join(lines) + "\n")
    pools = {"prefill": {"replicas_max": 4}, "decode": {"replicas_max": 2}}
    config = from_tree({"router": {"prefill_tokens_per_s": 3000}, **pools})
    wish = Wish(autoscale=True, start_s=3.0)
    run_simulations(trace, config, wish, json_file=tmp_path / "out.json")
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert cases[0]["policy"] == "skip_join"
    assert cases[1]["policy"].endswith(" static")
    assert cases[0]["counters"]["autoscaling_prefill_most"] > 1
    assert cases[0]["finished"] == len(lines)
    assert "skip_join, scaling" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no pool may scale"):
        run_simulations(trace, from_tree({}), wish)
    with pytest.raises(ConfigError, match="start_s is -1"):
        run_simulations(trace, config, Wish(autoscale=True, start_s=-1.0))
