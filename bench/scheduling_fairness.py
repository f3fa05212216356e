"""Fairness: the stated bound on waiting under loads meant to break it, and tenants kept apart."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np

from bench.frame import Row, at_most
from pdserve.router_config import RouterConfig
from pdserve.simulator.adversaries import SCENARIOS, VICTIM, tenant_flood
from pdserve.simulator.run import SimulationSettings, simulate

WORKERS = 8
UNLIMITED = 10**9
REQUESTS = 1_000_000
REQUESTS_QUICK = 40_000

UNHEALTHY = frozenset({"size_lie", "slow_worker", "flapping_worker"})
"""Here work takes longer than predicted or workers are missing, so the bound, which is one on
predicted work at the workers there are, is reported and not held."""


def fairness_rows(*, quick: bool) -> Iterator[Row]:
    each = (REQUESTS_QUICK if quick else REQUESTS) // len(SCENARIOS)
    flooded = 20_000 if quick else 100_000
    goals = ("mean", "balanced")
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        bounds = pool.map(_bounds, SCENARIOS, [each] * len(SCENARIOS))
        isolations = pool.map(_isolation, goals, [flooded] * len(goals))
        yield from bounds  # each as soon as it is there
        yield from isolations


def _settings(**changes: object) -> SimulationSettings:
    router = RouterConfig(waiting_max=UNLIMITED, queue_age_max_ms=None, goal="mean")
    settings = SimulationSettings(
        router=router, prefill_workers=WORKERS, decode_workers=1, decode=False, store_tokens=None
    )
    return replace(settings, **changes)  # type: ignore[arg-type]


def _bounds(name: str, count: int) -> Row:
    """How many claims were served later than was stated."""
    scenario = SCENARIOS[name](count, 0, WORKERS)
    result = simulate(scenario.trace, scenario.in_settings(_settings()))
    due, broken = (result.counters.get(f"bounds_{what}", 0) for what in ("due", "broken"))
    worst_s = float(np.nanmax(result.ttft_s))
    bar = None if name in UNHEALTHY else at_most(0)
    return Row(
        f"bound broken, {name}, {count} requests, {due} came to it, worst wait {worst_s:.0f} s",
        broken, "times", bar="" if bar is None else bar.text("times"),
        holds=None if bar is None else bar.holds(broken, None),
    )  # fmt: skip


def _isolation(goal: str, count: int) -> Row:
    """A tenant beside one that asks for ten times as much, and alone on half of the workers."""
    router = RouterConfig(waiting_max=UNLIMITED, queue_age_max_ms=None, goal=goal)  # type: ignore[arg-type]
    trace = tenant_flood(count, 0, WORKERS).trace
    flooded = simulate(trace, _settings(router=router))
    victim = np.array([tenant == VICTIM for tenant in flooded.tenants])
    alone_trace = replace(trace, requests=tuple(r for r in trace.requests if r.tenant == VICTIM))
    alone = simulate(alone_trace, _settings(router=router, prefill_workers=WORKERS // 2))
    value, reference = float(flooded.ttft_s[victim].mean()), float(alone.ttft_s.mean())
    bar = at_most(1.25, of="ratio")
    return Row(
        f"mean of a tenant that another floods, {goal}", value, "s",
        reference="alone on its share", reference_value=reference, ratio=value / reference,
        bar=bar.text(""), holds=bar.holds(value, value / reference),
    )  # fmt: skip
