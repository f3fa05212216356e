"""Pools that scale in the simulation: they follow the load, nobody is lost, and it is paid for."""

from dataclasses import replace

from pdserve.clock import S
from pdserve.config import AutoscalingConfig
from pdserve.messages import Role
from pdserve.router.scaling import Bounds, Plan
from pdserve.router_config import RouterConfig
from pdserve.simulator.result import Result
from pdserve.simulator.run import simulate
from pdserve.simulator.settings import Autoscaling, SimulationSettings
from pdserve.simulator.traces import Trace, TraceRequest

PLAN = Plan(
    settings=AutoscalingConfig(upscale_delay_s=2, downscale_delay_s=20, start_s=5),
    bounds={Role.PREFILL: Bounds(1, 6), Role.DECODE: Bounds(1, 4)},
)
SETTINGS = SimulationSettings(
    router=RouterConfig(queue_age_max_ms=None),  # whoever waits for long is served all the same
    prefill_workers=1,
    decode_workers=1,
    decode_tokens=60_000,
    autoscaling=Autoscaling(plan=PLAN, start_ns=5 * S),
)


def tide(*, quiet_s: float, busy_s: float, quiet: float, busy: float) -> Trace:
    """Quiet, busy, and quiet again, evenly; rates per second."""
    arrivals, at_s = [], 0.0
    while at_s < 2 * quiet_s + busy_s:
        arrivals.append(at_s)
        at_s += 1 / (busy if quiet_s <= at_s < quiet_s + busy_s else quiet)
    requests = tuple(
        TraceRequest(round(at_s * S), prompt_tokens=4000, generated_tokens=200) for at_s in arrivals
    )
    return Trace(requests, 16, "tide")


def run(trace: Trace, settings: SimulationSettings = SETTINGS) -> Result:
    return simulate(trace, settings)


def test_a_tide_is_followed_and_every_request_is_served_once() -> None:
    trace = tide(quiet_s=120, busy_s=120, quiet=0.5, busy=8)
    result = run(trace)
    counters = result.counters
    assert result.finished.all()
    assert (result.attempts == 1).all(), "nobody was lost with a worker that left"
    assert counters["autoscaling_prefill_most"] >= 4
    assert counters["autoscaling_decode_most"] >= 2
    billed_s = counters["autoscaling_prefill_worker_ms"] / 1000
    assert result.span_s < billed_s < 0.8 * result.span_s * counters["autoscaling_prefill_most"]


def test_streams_of_a_worker_that_leaves_are_parked_and_go_on() -> None:
    """Long answers: the second decode worker leaves while it has streams."""
    trace = tide(quiet_s=5, busy_s=40, quiet=0.2, busy=4)
    longer = replace(
        trace, requests=tuple(replace(one, generated_tokens=3000) for one in trace.requests)
    )
    result = run(longer)
    assert result.finished.all()
    assert (result.attempts == 1).all()
    assert result.parked.sum() > 0
    assert result.counters["resumes"] == result.counters["parks"]


def test_a_constant_load_settles() -> None:
    changes = [
        run(tide(quiet_s=span_s / 2, busy_s=0, quiet=5, busy=5)).counters["autoscaling_changes"]
        for span_s in (150, 600)
    ]
    assert changes[0] == changes[1], "none came after the first 150 s"


def test_the_same_seed_scales_alike() -> None:
    trace = tide(quiet_s=30, busy_s=60, quiet=0.5, busy=8)
    first, second = run(trace), run(trace)
    assert first.decisions_sha256 == second.decisions_sha256
    assert first.counters == second.counters


def test_workers_that_start_sooner_make_more_of_it_good() -> None:
    trace = tide(quiet_s=60, busy_s=120, quiet=0.5, busy=8)
    good = []
    for start_s in (1, 60):
        scaling = Autoscaling(plan=PLAN, start_ns=start_s * S)
        result = run(trace, replace(SETTINGS, autoscaling=scaling))
        good.append(result.attainment(ttft_s=2.0))
    assert good[0] > good[1]
