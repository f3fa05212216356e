"""Pools that scale beside static ones of the same cost, on public traces whose load ebbs and flows.

    python -m bench.autoscaling [--quick] [--json FILE] [--requests 12000] [--start-s 60]
                [--low 0.2] [--high 2.0] [--period 1800] [--live] [--work DIRECTORY]

*Simulated* (``pdserve simulate`` with a shipped profile): the trace's pace goes between ``--low``
and ``--high`` times its own once in ``--period`` seconds. A worker serves ``--start-s`` after it is
wanted, and is paid for from the beginning. Static pools come in whole workers: what as many
worker-seconds of theirs would serve is on the line between the next smaller and the next larger
number, each in that split of the two pools which serves most within the objectives.

*Live* (``--live``): the same autoscaler on a real cluster of this machine, with the small model of
``tests/models`` and tides of two minutes. Prompts and answers of the trace are made shorter. Two
cores gain little by a second worker, so this shows that nobody is lost, and not what is gained.

*Killed* are requests that did not end whole, or that had to begin anew because a worker left.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.frame import ROOT, Options, Row, at_least, at_most, row, run
from bench.peers.mixed_load import Arrival, Lengths, Outcome
from bench.runs import default_directory
from bench.servers import Ours, serving
from pdserve.clock import S
from pdserve.cluster.commands.autoscaled import mean_workers
from pdserve.cluster.commands.simulate import settings_of
from pdserve.cluster.profiles import read_profile
from pdserve.cluster.scaler import plan_of
from pdserve.config import ClusterConfig
from pdserve.messages import Role
from pdserve.settings import from_tree
from pdserve.simulator.result import Result
from pdserve.simulator.run import simulate
from pdserve.simulator.settings import Autoscaling, SimulationSettings
from pdserve.simulator.traces import Trace, load_trace
from pdserve.simulator.transformations import first, repeat, scale_time, spread, tides

TRACES = ROOT / "bench" / "traces"
CASES = (
    # trace, its pace, profile, seconds to the first token and per further one
    ("conversation_trace.jsonl", 1.0, "h100-llama3-70b-tp8", 2.0, 0.05),
    ("AzureLLMInferenceTrace_code.csv", 4.0, "h100-llama3-8b", 1.0, 0.05),
)
MOST = 8
DOWNSCALE_STARTS = 3.0
SEED = 1

LIVE_SECONDS = 240.0
LIVE_PERIOD_S = 120.0
LIVE_PROMPT_RATIO = 16
LIVE_ANSWER_RATIO = 2
LIVE_RATE = 8.0
LIVE_ANSWER_TOKENS_MAX = 400
LIVE_TTFT_S, LIVE_TPOT_S = 2.0, 0.1


def measure(options: Options) -> Iterator[Row]:
    for name, pace, profile, ttft_s, tpot_s in CASES:
        yield from _simulated(options, name, pace, profile, ttft_s, tpot_s)
    if options.arguments.live:
        yield from _live(options)


# ── simulated ────────────────────────────────────────────────────────────────────────────────────


def _simulated(
    options: Options, name: str, pace: float, profile: str, ttft_s: float, tpot_s: float
) -> Iterator[Row]:
    given = options.arguments
    title = name.partition(".")[0].removesuffix("_trace").replace("LLMInferenceTrace", "")
    trace = _played(name, pace, given.requests or (3000 if options.quick else 12_000))
    trace = tides(trace, low=given.low, high=given.high, period_s=given.period)
    config = scaling_config(profile, ttft_s, tpot_s, start_s=given.start_s)
    static = settings_of(config, read_profile(profile), seed=SEED)
    scaling = Autoscaling(plan=plan_of(config), start_ns=round(given.start_s * S))
    scaled = simulate(trace, replace(static, autoscaling=scaling))
    tide_count = max(1.0, scaled.span_s / given.period)
    workers = sum(mean_workers(scaled, role) for role in Role)
    good = {
        total: max(
            simulate(trace, one).attainment(ttft_s=ttft_s, tpot_s=tpot_s)
            for one in splits(static, total, prefill_near=mean_workers(scaled, Role.PREFILL))
        )
        for total in {max(2, math.floor(workers)), max(2, math.ceil(workers))}
    }
    ours = scaled.attainment(ttft_s=ttft_s, tpot_s=tpot_s)
    yield row(
        f"{title}: within objectives, scaling", [100 * ours], "%",
        reference=f"{workers:.2f} static", reference_samples=[100 * between(good, workers)],
        bar=at_least(1, of="ratio"),
    )  # fmt: skip
    for total, part in sorted(good.items()):
        yield row(f"{title}: within objectives, {total} static", [100 * part], "%")
    for role in Role:
        yield row(f"{title}: {role} workers, mean", [mean_workers(scaled, role)], "")
        yield row(
            f"{title}: {role} workers, most", [scaled.counters[f"autoscaling_{role}_most"]], ""
        )
    changes = scaled.counters["autoscaling_changes"]
    yield row(f"{title}: changes per tide, both pools", [changes / tide_count], "")
    yield row(f"{title}: killed by scaling", [killed(scaled)], "", bar=at_most(0))


def _played(name: str, pace: float, requests: int) -> Trace:
    trace = spread(load_trace(TRACES / name), SEED)
    whole = first(trace, requests) if requests <= len(trace.requests) else repeat(trace, requests)
    return scale_time(whole, pace)


def scaling_config(profile: str, ttft_s: float, tpot_s: float, *, start_s: float) -> ClusterConfig:
    """What takes long to start is kept longer, as the documentation advises."""
    pool = {"replicas": 1, "replicas_max": MOST}
    return from_tree(
        {
            "router": {"profile": profile},
            "prefill": pool,
            "decode": pool,
            "store": {"arena_bytes": 64 << 30},
            "autoscaling": {
                "queue_age_ms": 500 * ttft_s,
                "ttft_ms": 1000 * ttft_s,
                "tpot_ms": 1000 * tpot_s,
                "downscale_delay_s": DOWNSCALE_STARTS * start_s,
            },
        }
    )


def splits(
    settings: SimulationSettings, total: int, *, prefill_near: float
) -> list[SimulationSettings]:
    """Splits of so many workers into two pools, near the one that scaled."""
    near = {round(prefill_near) + step for step in (-1, 0, 1)}
    return [
        replace(settings, prefill_workers=prefill, decode_workers=total - prefill)
        for prefill in sorted({min(total - 1, max(1, prefill)) for prefill in near})
    ]


def between(good: Mapping[int, float], workers: float) -> float:
    """What so many workers would do, on the line between the whole numbers about it."""
    low, high = min(good), max(good)
    share = (workers - low) / (high - low) if high > low else 0.0
    return good[low] + min(1.0, max(0.0, share)) * (good[high] - good[low])


def killed(result: Result) -> int:
    again = result.attempts > 1
    return int((~result.finished | again).sum())


# ── live ─────────────────────────────────────────────────────────────────────────────────────────


def _live(options: Options) -> Iterator[Row]:
    from pdserve.config import ModelConfig
    from pdserve.model.source import locate
    from tests.models.small import write_small_model

    work: Path = options.arguments.work
    work.mkdir(parents=True, exist_ok=True)
    seconds = LIVE_SECONDS / 2 if options.quick else LIVE_SECONDS
    arrivals = live_arrivals(seconds)
    with tempfile.TemporaryDirectory() as scratch:
        model = write_small_model(Path(scratch), tokenizer_from=locate(ModelConfig()).path)
        for name, settings in (
            ("scaling, 1 to 2 of each", {"prefill.replicas_max": "2", "decode.replicas_max": "2"}),
            ("static, 1 + 1", {}),
            ("static, 2 + 2", {"prefill.replicas": "2", "decode.replicas": "2"}),
        ):
            outcomes, said = _driven(model, settings, arrivals, work / "live.log")
            yield from live_rows(name, outcomes, said)


def live_arrivals(seconds: float) -> list[Arrival]:
    """Of the conversations, with tides: lengths in proportion, made shorter."""
    trace = spread(load_trace(TRACES / "conversation_trace.jsonl"), SEED)
    trace = first(trace, round(seconds * LIVE_RATE * 2))
    own_rate = len(trace.requests) / (trace.span_ns / S)
    trace = tides(
        scale_time(trace, LIVE_RATE / own_rate), low=0.2, high=1.8, period_s=LIVE_PERIOD_S
    )
    chance = random.Random(SEED)
    return [
        Arrival(
            request.arrival_ns / S,
            "conversation",
            Lengths(
                max(8, request.prompt_tokens // LIVE_PROMPT_RATIO),
                max(2, min(LIVE_ANSWER_TOKENS_MAX, request.generated_tokens // LIVE_ANSWER_RATIO)),
            ),
            chance.getrandbits(32),
        )
        for request in trace.requests
        if request.arrival_ns < seconds * S and request.prompt_tokens < LIVE_PROMPT_RATIO * 1800
    ]


def _driven(
    model: Path, settings: dict[str, str], arrivals: Sequence[Arrival], log: Path
) -> tuple[list[Outcome], dict[str, Any]]:
    import asyncio

    from bench.peers.mixed_load import drive

    form = Ours(
        "disaggregated",
        "skip_join",
        (
            ("model.source", json.dumps(str(model))),
            ("store.arena_bytes", str(256 << 20)),  # its blocks are small
            *((f"{pool}.{name}", value)
              for pool in ("prefill", "decode")
              for name, value in (("threads", "1"), ("pool_blocks", "1024"), ("running_max", "6"))),
            ("autoscaling.queue_age_ms", "300"),
            ("autoscaling.downscale_delay_s", "10"),
            ("autoscaling.load_memory_s", "10"),
            *settings.items(),
        ),
    )  # fmt: skip
    with serving(form, log) as target:
        outcomes = asyncio.run(drive(target, arrivals))
        said = {
            path: json.load(urllib.request.urlopen(f"{target.url}{path}"))
            for path in ("/cluster/autoscaling", "/cluster/status")
        }
    return outcomes, said


def live_rows(name: str, outcomes: Sequence[Outcome], said: dict[str, Any]) -> Iterator[Row]:
    changes = said["/cluster/autoscaling"]["changes"]
    lost = said["/cluster/status"]["counters"].get("lost", 0)
    failed = sum(bool(one.error) for one in outcomes)
    kept = [
        (one.ttft_s is None or one.ttft_s <= LIVE_TTFT_S)
        and (len(one.gaps_s) == 0 or statistics.fmean(one.gaps_s) <= LIVE_TPOT_S)
        and not one.error
        for one in outcomes
    ]
    yield row(f"live, {name}: requests", [len(outcomes)], "")
    yield row(f"live, {name}: within objectives", [100 * statistics.fmean(kept)], "%")
    yield row(f"live, {name}: killed", [failed + lost], "", bar=at_most(0))
    if "scaling" in name:
        yield row(f"live, {name}: changes, both pools", [len(changes)], "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, help="of each trace; 12,000, with --quick 3,000")
    parser.add_argument("--start-s", type=float, default=60.0, help="until a new worker serves")
    parser.add_argument("--low", type=float, default=0.2, help="times the trace's pace, at ebb")
    parser.add_argument("--high", type=float, default=2.0, help="the same at flood")
    parser.add_argument("--period", type=float, default=1800.0, help="seconds from ebb to ebb")
    parser.add_argument("--live", action="store_true", help="a real cluster too")
    parser.add_argument("--work", type=Path, default=default_directory("autoscaling"))


if __name__ == "__main__":
    run("autoscaling", measure, add_arguments=add_arguments)
