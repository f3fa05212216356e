"""``pdserve plan TRACE``: the cheapest pools that hold a service level, by simulation.

Every pair of sizes that the search asks for replays the trace through the router's own code, with
the times of a profile; which pairs those are is decided in ``planning``.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pdserve.cluster.commands.bars import spinner
from pdserve.cluster.commands.planning import Attainment, Plan, cheapest_pools
from pdserve.cluster.commands.simulate import profile_of, settings_of
from pdserve.cluster.profiles import Profile
from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError
from pdserve.simulator.run import SimulationSettings, simulate
from pdserve.simulator.traces import Trace, load_trace
from pdserve.simulator.transformations import first, scale_time, spread

REQUESTS_MAX = 20_000
"""Of a longer trace so many are played: a search takes about twenty simulations."""

SEED = 0
UNITS_S = {"ms": 1e-3, "s": 1.0, "": 1e-3}


@dataclass(frozen=True, slots=True)
class Objectives:
    ttft_s: float | None
    tpot_s: float | None


def plan(
    trace: Path,
    *,
    slo: str,
    config: ClusterConfig | None = None,
    profile: str | None = None,
    workers_max: int = 64,
    attainment: float = 0.9,
    prefill_cost: float = 1.0,
    decode_cost: float = 1.0,
    speed: float = 1.0,
    requests_max: int = REQUESTS_MAX,
    as_json: bool = False,
) -> bool:
    """Prints what was tried and the cheapest pools that hold; False where none do.

    Args:
        slo: "ttft=500ms,tpot=50ms", or one of the two.
        config: its router part is simulated; None: the defaults.
        profile: a file or a shipped name; None takes ``router.profile``.
        attainment: the part of the requests that must be within the objectives.
        speed: how many times as fast the trace is played.
        requests_max: of a longer trace the first ones.

    Raises:
        ConfigError: anything given makes no sense; nothing was simulated.
    """
    _check(workers_max, attainment, prefill_cost, decode_cost, speed, requests_max)
    config = config or ClusterConfig()
    if config.router.mode == "aggregated":
        raise ConfigError(
            "router.mode is aggregated, which has one pool and no ratio to plan; use disaggregated "
            "or auto"
        )
    objectives = objectives_of(slo)
    used = profile_of(config, profile)
    loaded = load_trace(trace)
    played = scale_time(spread(first(loaded, requests_max), SEED), speed)
    console = Console(highlight=False, stderr=True)
    console.print(
        f"[dim]{len(played.requests)} of {len(loaded.requests)} requests of {trace.name}, costs of "
        f"{used.costs.name} ({used.costs.origin})[/]"
    )
    with spinner("searching", console):
        found = cheapest_pools(
            _simulated(played, config, used, objectives, console),
            workers_max=workers_max,
            attainment_min=attainment,
            prefill_cost=prefill_cost,
            decode_cost=decode_cost,
        )
    if as_json:
        print(json.dumps(as_tree(found, used, objectives), indent=2))
    else:
        Console(highlight=False).print(rendered(found))
        Console(highlight=False).print(found.why, markup=False)
    return found.cheapest is not None


def objectives_of(slo: str) -> Objectives:
    """``ttft=500ms,tpot=50ms``: each at most once, in ms unless s is said.

    Raises:
        ConfigError: naming the part that does not fit.
    """
    known: dict[str, float] = {}
    for part in slo.split(","):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        unit = text.lstrip("0123456789.")
        number = text.removesuffix(unit)
        if name not in ("ttft", "tpot") or not equals or name in known:
            raise ConfigError(
                f"slo is {slo!r}: {part!r} does not fit; say ttft=TIME, tpot=TIME, or both with a "
                "comma between"
            )
        if unit.strip() not in UNITS_S or number.count(".") > 1 or not number.strip("."):
            raise ConfigError(
                f"slo is {slo!r}: {text!r} is no time; say it like 500ms, 0.5s or 500"
            )
        known[name] = float(number) * UNITS_S[unit.strip()]
        if known[name] <= 0:
            raise ConfigError(f"slo is {slo!r}: {name} must be above 0")
    return Objectives(known.get("ttft"), known.get("tpot"))


def simulation_of(
    config: ClusterConfig, profile: Profile, prefill: int, decode: int
) -> SimulationSettings:
    """The configured cluster with pools of these sizes, as ``pdserve simulate`` would play it."""
    return replace(
        settings_of(config, profile, seed=SEED), prefill_workers=prefill, decode_workers=decode
    )


def rendered(found: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("prefill", "decode", "cost", "ttft met", "tpot met", "both", ""):
        table.add_column(column, justify="right")
    for tried in sorted(found.evaluated, key=lambda tried: (tried.cost, tried.sizes)):
        table.add_row(
            str(tried.sizes.prefill),
            str(tried.sizes.decode),
            f"{tried.cost:g}",
            f"{tried.attainment.ttft:.1%}",
            f"{tried.attainment.tpot:.1%}",
            f"{tried.attainment.both:.1%}",
            "cheapest" if tried == found.cheapest else "holds" if tried.holds else "",
            style="bold" if tried == found.cheapest else None,
        )
    return table


def as_tree(found: Plan, profile: Profile, objectives: Objectives) -> dict[str, Any]:
    rows = [
        {
            "prefill": tried.sizes.prefill,
            "decode": tried.sizes.decode,
            "cost": tried.cost,
            "attainment": asdict(tried.attainment),
            "holds": tried.holds,
        }
        for tried in found.evaluated
    ]
    cheapest = None if found.cheapest is None else rows[found.evaluated.index(found.cheapest)]
    return {
        "profile": profile.costs.name,
        "origin": profile.costs.origin,
        "ttft_s": objectives.ttft_s,
        "tpot_s": objectives.tpot_s,
        "cheapest": cheapest,
        "why": found.why,
        "evaluated": rows,
    }


def _simulated(
    trace: Trace,
    config: ClusterConfig,
    profile: Profile,
    objectives: Objectives,
    console: Console,
) -> Callable[[int, int], Attainment]:
    def evaluate(prefill: int, decode: int) -> Attainment:
        begun_s = time.monotonic()
        result = simulate(trace, simulation_of(config, profile, prefill, decode))
        met = Attainment(
            ttft=result.attainment(ttft_s=objectives.ttft_s),
            tpot=result.attainment(tpot_s=objectives.tpot_s),
            both=result.attainment(ttft_s=objectives.ttft_s, tpot_s=objectives.tpot_s),
        )
        console.print(
            f"[dim]{prefill} prefill, {decode} decode: {met.both:.1%} "
            f"({time.monotonic() - begun_s:.1f} s)[/]"
        )
        return met

    return evaluate


def _check(
    workers_max: int,
    attainment: float,
    prefill_cost: float,
    decode_cost: float,
    speed: float,
    requests_max: int,
) -> None:
    problems = []
    if workers_max < 2:
        problems.append(f"workers-max is {workers_max}, must be at least 2: one of each kind")
    if not 0 < attainment <= 1:
        problems.append(f"attainment is {attainment}, must be in (0, 1]")
    for name, value in (
        ("prefill-cost", prefill_cost),
        ("decode-cost", decode_cost),
        ("speed", speed),
        ("requests-max", requests_max),
    ):
        if not (value > 0 and math.isfinite(value)):
            problems.append(f"{name} is {value}, must be above 0")
    if problems:
        raise ConfigError("; ".join(problems))
