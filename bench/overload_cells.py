"""Overload in the simulator: the production router between clients and workers of fixed speed.

*Goodput* is what counts: answers per second that were completed within their deadline, their first
token within ``TTFT_S``. *Capacity* is what the prefill pool can compute; in the cell that is bound
by decode, where less than that can be served, loads are multiples of it all the same.
"""

from dataclasses import dataclass, replace

import numpy as np

from pdserve.clock import S
from pdserve.router.costs import CostModel
from pdserve.router_config import RouterConfig
from pdserve.simulator.result import Result
from pdserve.simulator.run import SimulationSettings
from pdserve.simulator.settings import STUDY_COSTS
from pdserve.simulator.synthetic import always, merged, poisson
from pdserve.simulator.traces import Trace

WORKERS = 4
TTFT_S = 2.0
TIMEOUT_S = 20.0
PROMPT_TOKENS = 1500
GENERATED_TOKENS = 60
LONG_TOKENS = 600
DECODE_TOKENS_FEW = 60_000
"""Of KV at a decode worker: room for thirty long answers."""

SPAN_S = 30.0
UNLIMITED = 10**9

SHEDDING = RouterConfig(ttft_max_ms={"standard": TTFT_S * 1000})
OPEN = RouterConfig(waiting_max=UNLIMITED, queue_age_max_ms=None)
"""As peers are by default: nothing is turned away, but for deadlines that cannot be kept."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cluster, and how many requests a second its prefill workers can compute."""

    settings: SimulationSettings
    capacity_per_s: float


def cell(
    router: RouterConfig = SHEDDING, *, costs: CostModel = STUDY_COSTS, decode_tokens: int = 10**9
) -> Cell:
    settings = SimulationSettings(
        router=router,
        costs=costs,
        prefill_workers=WORKERS,
        decode_workers=2,
        decode_tokens=decode_tokens,
        timeout_s=TIMEOUT_S,
    )
    return Cell(settings, WORKERS * S / costs.prefill_ns(PROMPT_TOKENS, 0))


def load(
    per_s: float,
    span_s: float,
    *,
    seed: int,
    tenant: str = "",
    generated_tokens: int = GENERATED_TOKENS,
) -> Trace:
    return poisson(
        max(1, round(per_s * span_s)),
        per_s,
        seed=seed,
        prompt=always(PROMPT_TOKENS),
        generated=always(generated_tokens),
        tenant=tenant,
    )


def burst(calm_per_s: float, burst_per_s: float, *, seed: int) -> tuple[Trace, float, float]:
    """A calm load for 90 s, and on top of it from 30 s to 50 s a burst; when it begins and ends."""
    calm, extra = load(calm_per_s, 90.0, seed=seed), load(burst_per_s, 20.0, seed=seed + 1)
    begins_s, ends_s = 30.0, 50.0
    moved = tuple(
        replace(request, arrival_ns=request.arrival_ns + round(begins_s * S))
        for request in extra.requests
        if request.arrival_ns < (ends_s - begins_s) * S
    )
    return merged("burst", calm, replace(extra, requests=moved)), begins_s, ends_s


def goodput_per_s(result: Result, span_s: float, tenant: str | None = None) -> float:
    good = result.finished & (np.nan_to_num(result.ttft_s, nan=np.inf) <= TTFT_S)
    if tenant is not None:
        good &= np.array([each == tenant for each in result.tenants])
    return float(good.sum()) / span_s


def admitted_p99_s(result: Result) -> float:
    served = result.ttft_s[~np.isnan(result.ttft_s)]
    return float(np.quantile(served, 0.99)) if served.size else float("inf")


def recovery_s(result: Result, ends_s: float, bound_s: float) -> float:
    """From the end of the burst until everybody who arrives later is answered within
    ``bound_s``; infinite where that never comes."""
    after = result.arrival_s >= ends_s
    late = after & ~(result.finished & (np.nan_to_num(result.ttft_s, nan=np.inf) <= bound_s))
    if not late.any():
        return 0.0
    last_s = float(result.arrival_s[late].max())
    if last_s >= result.arrival_s.max() - 1.0:
        return float("inf")
    return last_s - ends_s
