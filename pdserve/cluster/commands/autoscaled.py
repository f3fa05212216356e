"""Pools that scale beside static ones of the same cost, as the simulator finds them.

*The same cost* is as many worker-seconds: each static pool has the mean number of workers that the
scaling one was billed for, starts included, rounded to whole workers so that the static pools
together cost at least as much.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table

from pdserve.messages import Role
from pdserve.simulator.report import Case, Goal
from pdserve.simulator.result import Result
from pdserve.simulator.settings import SimulationSettings


def mean_workers(result: Result, role: Role) -> float:
    """That were paid for, over the whole run. Of a run that scaled."""
    worker_ms = result.counters[f"autoscaling_{role}_worker_ms"]
    return worker_ms / 1000 / max(result.span_s, 1e-9)


def static_like(settings: SimulationSettings, scaled: Result) -> SimulationSettings:
    """The static pools that cost what ``scaled`` did, or up to one worker more."""
    prefill, decode = (mean_workers(scaled, role) for role in (Role.PREFILL, Role.DECODE))
    if settings.router.mode == "aggregated":
        return replace(settings, autoscaling=None, decode_workers=max(1, math.ceil(decode - 0.05)))
    total = max(2, math.ceil(prefill + decode - 0.05))
    share = prefill / max(prefill + decode, 1e-9)
    prefill_workers = min(total - 1, max(1, round(total * share)))
    return replace(
        settings,
        autoscaling=None,
        prefill_workers=prefill_workers,
        decode_workers=total - prefill_workers,
    )


def static_name(policy: str, settings: SimulationSettings) -> str:
    if settings.router.mode == "aggregated":
        return f"{policy}, {settings.decode_workers} static"
    return f"{policy}, {settings.prefill_workers}+{settings.decode_workers} static"


def scaled_table(cases: Sequence[Case], goal: Goal) -> Table:
    """Each run that scaled, and the static one after it."""
    table = Table(box=None, pad_edge=False)
    for heading in ("pools", "load", "workers", "most", "changes", "good", "killed"):
        table.add_column(heading, justify="left" if heading == "pools" else "right")
    for case in cases:
        result = case.result
        good = f"{result.attainment(ttft_s=goal.ttft_s, tpot_s=goal.tpot_s):.1%}"
        if "autoscaling_changes" in result.counters:
            workers = "+".join(f"{mean_workers(result, role):.2f}" for role in Role)
            most = "+".join(str(result.counters[f"autoscaling_{role}_most"]) for role in Role)
            changes = str(result.counters["autoscaling_changes"])
            name = f"{case.policy}, scaling"
        else:
            name, most, changes = case.policy, "", ""
            workers = case.policy.rpartition(", ")[2].removesuffix(" static")
        killed = str(result.counters.get("lost", 0))
        table.add_row(name, f"{case.load:g}", workers, most, changes, good, killed)
    return table
