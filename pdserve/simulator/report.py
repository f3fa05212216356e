"""What a simulation found, for people and for programs: rows of a table, and JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdserve.simulator.charts import number
from pdserve.simulator.result import Floats, Result


@dataclass(frozen=True, slots=True)
class Goal:
    """What a request must keep to count as good."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Case:
    """One policy under one load."""

    policy: str
    load: float  # 1: the trace's own pace
    result: Result


HEADINGS = (
    "policy", "load", "requests", "finished",
    "TTFT mean s", "TTFT p50 s", "TTFT p99 s", "TTFT max s", "TPOT mean ms", "TPOT p99 ms",
    "total mean s", "total p99 s", "good", "prefill busy", "cached", "preempted", "parked",
)  # fmt: skip

SHORT = (
    "policy", "load", "finished", "TTFT mean s", "TTFT p50 s", "TTFT p99 s", "TPOT mean ms",
    "total mean s", "good", "prefill busy",
)  # fmt: skip
"""Those that fit on a terminal."""


def summary(case: Case, goal: Goal) -> dict[str, Any]:
    """Plain values only. Times in seconds; None where there is none."""
    result = case.result
    prompt_tokens = int(result.prompt_tokens.sum())
    return {
        "policy": case.policy,
        "load": case.load,
        "requests": result.count,
        "finished": int(result.finished.sum()),
        "ttft_s": quantiles(result.ttft_s),
        "tpot_s": quantiles(result.tpot_s),
        "e2e_s": quantiles(result.e2e_s),
        "good_ratio": result.attainment(ttft_s=goal.ttft_s, tpot_s=goal.tpot_s),
        "goodput_per_s": goodput_per_s(case, goal),
        "prefill_busy_ratio": result.prefill_busy,
        "cached_ratio": float(result.cached_tokens.sum()) / max(1, prompt_tokens),
        "preempted_per_request": float(result.preempted.mean()),
        "parked_per_request": float(result.parked.mean()),
        "counters": dict(result.counters),
        "decisions_sha256": result.decisions_sha256,
    }


def rows(cases: Sequence[Case], goal: Goal) -> list[tuple[str, ...]]:
    """The table's cells, under ``HEADINGS``."""
    return [_row(summary(case, goal)) for case in cases]


def as_json(cases: Sequence[Case], goal: Goal, *, trace: str, seed: int) -> dict[str, Any]:
    return {
        "trace": trace,
        "seed": seed,
        "goal": {"ttft_s": goal.ttft_s, "tpot_s": goal.tpot_s},
        "cases": [summary(case, goal) for case in cases],
    }


def goodput_per_s(case: Case, goal: Goal) -> float:
    """Good requests per second of arrivals."""
    result = case.result
    span_s = max(float(result.arrival_s[-1]), 1e-9)
    return result.attainment(ttft_s=goal.ttft_s, tpot_s=goal.tpot_s) * result.count / span_s


def quantiles(values: Floats) -> dict[str, float | None]:
    known = values[np.isfinite(values)]
    if not len(known):
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
    p50, p90, p99 = (float(q) for q in np.quantile(known, (0.5, 0.9, 0.99)))
    return {
        "mean": float(known.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(known.max())
    }  # fmt: skip


def _row(of: dict[str, Any]) -> tuple[str, ...]:
    def cell(group: str, name: str, unit: float = 1.0) -> str:
        value = of[group][name]
        return number(math.nan if value is None else value * unit)

    return (
        of["policy"],
        number(of["load"]),
        f"{of['requests']:,}",
        f"{of['finished']:,}",
        *(cell("ttft_s", name) for name in ("mean", "p50", "p99", "max")),
        *(cell("tpot_s", name, 1000) for name in ("mean", "p99")),
        *(cell("e2e_s", name) for name in ("mean", "p99")),
        f"{of['good_ratio']:.1%}",
        f"{of['prefill_busy_ratio']:.0%}",
        f"{of['cached_ratio']:.0%}",
        number(of["preempted_per_request"]),
        number(of["parked_per_request"]),
    )
