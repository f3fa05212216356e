"""One simulated run: a trace at a load under a policy, and what came of it.

The protocol of every table of ``bench.scheduling``: four prefill workers, all bursts kept and time
scaled so that the trace offers the load ρ, arrivals spread inside the tick to which they were
rounded, the costs of a large model on large GPUs as assumed by the studies we compare with
(``simulator.settings.STUDY_COSTS``), a prefix cache that all workers share and that forgets
nothing. So what differs between two runs of a cell is the order of service alone.
"""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from pdserve.clock import S
from pdserve.router_config import RouterConfig
from pdserve.simulator.run import SimulationSettings, simulate
from pdserve.simulator.settings import STUDY_COSTS, Noise
from pdserve.simulator.traces import Trace, TraceRequest, load_trace
from pdserve.simulator.transformations import scale_to_load, spread

WORKERS = 4
CHUNK_TOKENS = 2048  # about 200 ms of the assumed model
UNLIMITED = 10**9


def _order(policy: str, **settings: object) -> RouterConfig:
    return RouterConfig(
        policy=policy,  # type: ignore[arg-type]
        waiting_max=UNLIMITED,
        queue_age_max_ms=None,
        **settings,  # type: ignore[arg-type]
    )


GAMMAS_PER_S = (0.0005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.8, 1.6)
"""From shortest first to first come, first served."""

POLICIES: Mapping[str, RouterConfig] = {
    "fcfs": _order("fcfs"),
    "ours, mean": _order("skip_join", goal="mean"),
    "ours, mean, no preemption": _order("skip_join", goal="mean", preemption=False),
    "ours, mean, for 32 times shorter": _order("skip_join", goal="mean", preempt_ratio=32),
    "ours, balanced": _order("skip_join", goal="balanced"),
    "ours, tail": _order("skip_join", goal="tail"),
    **{f"ours, γ = {gamma:g}": _order("skip_join", gamma_per_s=gamma) for gamma in GAMMAS_PER_S},
    "ours, γ = 0.0005, no preemption": _order("skip_join", gamma_per_s=0.0005, preemption=False),
    "ours, γ = 0.0005, for 32 times shorter, rescue of 2 %": _order(
        "skip_join", gamma_per_s=0.0005, preempt_ratio=32, rescue_share=0.02
    ),
    "ours, γ = 0.02, rescue without a cap": _order(
        "skip_join", gamma_per_s=0.02, rescue_share=1.0, rescue_ratio=0.001
    ),
    "sjf": _order("sjf", preemption=False),
    "sjf, ageing": _order("sjf_aging", preemption=False),
    "hrrn": _order("hrrn", preemption=False),
    "lpm": _order("lpm", preemption=False),
    "lpm, ageing": _order("lpm_aging", preemption=False),
    "wspt": _order("wspt", preemption=False),
    "γ-boost": _order("gamma_boost", preemption=False),
    "mlfq": _order("mlfq", preempted_max=UNLIMITED),
    "fastserve": _order("fastserve", preempted_max=UNLIMITED),
    "fastserve, released": _order("fastserve_released", preempted_max=UNLIMITED),
    "srpt, oracle": _order("srpt", preempted_max=UNLIMITED),
}
"""Those of ``ours`` are what an operator may choose. What they are compared with runs in the same
core, at the same workers, with the same cache.
"""


@dataclass(frozen=True, slots=True)
class Cell:
    trace: Path
    rho: float
    policy: str
    seed: int
    sigma: float = 0.0  # of the error in predicted work
    placement: str = "late"
    stale_ms: float = 0.0
    workers: int = WORKERS


@dataclass(frozen=True, slots=True)
class Figures:
    """Times to first token, in seconds; a slowdown is one over the time of the prefill alone."""

    mean: float
    p50: float
    p99: float
    worst: float
    slowdown_p99: float
    preempted_mean: float
    preempted_p99: float
    tokens_again: float  # part of the prompt tokens that was computed more than once
    blocks: tuple[float, ...]  # means of successive tenths of the trace, for intervals


@cache
def _loaded(path: Path) -> Trace:
    return load_trace(path)


def prepared(path: Path, rho: float, seed: int, workers: int) -> Trace:
    """The trace at the load ``rho`` of so many workers."""

    def work_s(request: TraceRequest, cached_tokens: int) -> float:
        uncached_tokens = request.prompt_tokens - cached_tokens
        return STUDY_COSTS.prefill_ns(uncached_tokens, cached_tokens) / S

    return scale_to_load(spread(_loaded(path), seed), rho, workers=workers, work_s=work_s)


def measure(cell: Cell) -> Figures:
    """Some seconds."""
    router = POLICIES[cell.policy]
    if cell.placement != "late":
        changes = {"placement": cell.placement, "placement_stale_ms": cell.stale_ms}
        router = replace(router, **changes)  # type: ignore[arg-type]
    trace = prepared(cell.trace, cell.rho, cell.seed, cell.workers)
    result = simulate(
        trace,
        SimulationSettings(
            router=router,
            prefill_workers=cell.workers,
            decode_workers=1,
            decode=False,
            store_tokens=None,
            chunk_tokens=CHUNK_TOKENS,
            noise=Noise(sigma=cell.sigma),
            seed=cell.seed,
        ),
    )
    assert result.finished.all(), "a request was lost"
    ttft_s = result.ttft_s
    alone_s = np.array(
        [
            STUDY_COSTS.prefill_ns(int(total - cached), int(cached)) / S
            for total, cached in zip(result.prompt_tokens, result.cached_tokens, strict=True)
        ]
    )
    least_tokens = int((result.prompt_tokens - result.cached_tokens).sum())
    computed_tokens = result.counters["simulated_prompt_tokens"]
    return Figures(
        mean=float(ttft_s.mean()),
        p50=float(np.median(ttft_s)),
        p99=float(np.quantile(ttft_s, 0.99)),
        worst=float(ttft_s.max()),
        slowdown_p99=float(np.quantile(ttft_s / alone_s, 0.99)),
        preempted_mean=float(result.preempted.mean()),
        preempted_p99=float(np.quantile(result.preempted, 0.99)),
        tokens_again=max(0.0, computed_tokens / least_tokens - 1),
        blocks=tuple(float(block.mean()) for block in np.array_split(ttft_s, 10)),
    )


def measure_all(cells: Iterable[Cell]) -> dict[Cell, Figures]:
    """Every cell once, on all cores; simulated time does not mind the company."""
    wanted = list(dict.fromkeys(cells))
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return dict(zip(wanted, pool.map(measure, wanted, chunksize=1), strict=True))
