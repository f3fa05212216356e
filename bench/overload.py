"""`python -m bench.overload`: what is left of a cluster that is offered ten times what it can do.

Simulated by default, with the production router core. ``--live`` starts a real cluster with the
small test model, measures its capacity, and offers it the same multiples over HTTP.

Rows: goodput by load against the peak of the same cluster, the 99th percentile of the time to first
token of whoever was served, the time from the end of a burst until everybody is served in time
again, and how long a refusal takes. Where peers refuse nothing by default, the row says what that
would be worth.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

from bench.frame import Options, Row, at_least, at_most, run
from bench.overload_cells import (
    DECODE_TOKENS_FEW,
    GENERATED_TOKENS,
    LONG_TOKENS,
    OPEN,
    SHEDDING,
    SPAN_S,
    TTFT_S,
    admitted_p99_s,
    burst,
    cell,
    goodput_per_s,
    load,
    recovery_s,
)
from pdserve.router_config import RouterConfig
from pdserve.simulator.run import SimulationSettings, simulate
from pdserve.simulator.synthetic import merged

LOADS = (1, 2, 5, 10)
SEED = 1


def measure(options: Options) -> Iterator[Row]:
    span_s = SPAN_S / 2 if options.quick else SPAN_S
    yield from _goodput("prefill binds", span_s, GENERATED_TOKENS, 10**9)
    yield from _goodput("decode binds", 2 * span_s, LONG_TOKENS, DECODE_TOKENS_FEW)
    yield from _recovery()
    yield _tenants(span_s)
    if options.arguments.live:
        from bench.overload_live import live_rows

        yield from live_rows(quick=options.quick)


def _goodput(name: str, span_s: float, tokens: int, decode_tokens: int) -> Iterator[Row]:
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for policy, router in (("shedding", SHEDDING), ("nothing refused", OPEN)):
        its = cell(router, decode_tokens=decode_tokens)
        found[policy] = {}
        for times in LOADS:
            trace = load(its.capacity_per_s * times, span_s, seed=SEED, generated_tokens=tokens)
            result = simulate(trace, its.settings)
            found[policy][times] = goodput_per_s(result, span_s), admitted_p99_s(result)
    for policy, by_load in found.items():
        peak = max(goodput for goodput, _ in found["shedding"].values())
        for times, (goodput, _) in by_load.items():
            bar = at_least(0.9, of="ratio") if policy == "shedding" else None
            yield Row(
                f"goodput at {times}x, {name}, {policy}", goodput, "1/s",
                reference="peak of shedding", reference_value=peak, ratio=goodput / peak,
                bar="" if bar is None else bar.text("1/s"),
                holds=None if bar is None else bar.holds(goodput, goodput / peak),
            )  # fmt: skip
    at_one, at_ten = found["shedding"][1][1], found["shedding"][10][1]
    bar = at_most(2.0, of="ratio")
    yield Row(
        f"99th percentile of TTFT of the served at 10x, {name}", at_ten, "s",
        reference="the same at 1x", reference_value=at_one, ratio=at_ten / at_one,
        bar=bar.text("s"), holds=bar.holds(at_ten, at_ten / at_one),
    )  # fmt: skip


def _recovery() -> Iterator[Row]:
    clients: dict[str, dict[str, float | int]] = {
        "clients give up": {},
        "clients retry when told": {"client_retries": 2},
        "clients retry in a storm": {"client_retries": 4, "client_patience_s": 0.5},
    }
    for policy, router in (("shedding", SHEDDING), ("nothing refused", OPEN)):
        for name, changes in clients.items():
            seconds = _recovers(router, changes)
            bar = at_most(10.0) if policy == "shedding" else None
            yield Row(
                f"recovery after 20 s of 10x, {policy}, {name}", seconds, "s",
                bar="" if bar is None else bar.text("s"),
                holds=None if bar is None else bar.holds(seconds, None),
            )  # fmt: skip


def _recovers(router: RouterConfig, changes: dict[str, float | int]) -> float:
    its = cell(router)
    trace, _, ends_s = burst(0.7 * its.capacity_per_s, 10 * its.capacity_per_s, seed=SEED)
    settings: SimulationSettings = replace(its.settings, **changes)  # type: ignore[arg-type]
    return recovery_s(simulate(trace, settings), ends_s, TTFT_S)


def _tenants(span_s: float) -> Row:
    its = cell(SHEDDING)
    victim = load(0.4 * its.capacity_per_s, span_s, seed=SEED, tenant="victim")
    flood = load(10 * its.capacity_per_s, span_s, seed=SEED + 1, tenant="flood")
    alone = goodput_per_s(simulate(victim, its.settings), span_s, "victim")
    both = merged("flooded", victim, flood)
    flooded = goodput_per_s(simulate(both, its.settings), span_s, "victim")
    bar = at_least(0.9, of="ratio")
    return Row(
        "goodput of a tenant beside another's flood of 10x", flooded, "1/s",
        reference="alone", reference_value=alone, ratio=flooded / alone,
        bar=bar.text("1/s"), holds=bar.holds(flooded, flooded / alone),
    )  # fmt: skip


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--live", action="store_true", help="with a real cluster as well")


if __name__ == "__main__":
    run("overload", measure, add_arguments=_add_arguments)
