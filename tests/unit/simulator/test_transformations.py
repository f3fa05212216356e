import itertools
import statistics
from collections import Counter
from dataclasses import replace

import pytest

from pdserve.clock import MS, S
from pdserve.simulator.synthetic import always, exponential, merged, poisson
from pdserve.simulator.traces import Trace, TraceRequest
from pdserve.simulator.transformations import (
    cached_tokens,
    first,
    overlay,
    repeat,
    scale_time,
    scale_to_load,
    spread,
    tick_ns,
    tides,
)


def ticking(ticks: int = 10, per_tick: int = 6) -> Trace:
    requests = [
        TraceRequest(tick * 3 * S, 100 + number, 1)
        for tick in range(ticks)
        for number in range(per_tick)
    ]
    return Trace(tuple(requests), 16, "ticking")


def sizes(trace: Trace) -> Counter[int]:
    return Counter(request.prompt_tokens for request in trace.requests)


def test_a_tick_is_found_where_there_is_one() -> None:
    assert tick_ns(ticking()) == 3 * S
    assert tick_ns(poisson(50, 1.0, seed=1, prompt=always(5))) is None
    assert tick_ns(first(ticking(), 3)) is None  # one instant says nothing about a tick


def test_a_tick_of_a_clock_that_is_early_or_late_is_found() -> None:
    """Mooncake's conversations came every 2,999, 3,000 or 3,001 ms; its divisor is one of them."""
    late = [
        replace(each, arrival_ns=each.arrival_ns - each.arrival_ns // S % 2 * MS)
        for each in ticking().requests
    ]
    assert tick_ns(replace(ticking(), requests=tuple(late))) == pytest.approx(3 * S, rel=0.001)
    spread_out = spread(replace(ticking(), requests=tuple(late)), seed=1)
    gaps_ns = [b.arrival_ns - a.arrival_ns for a, b in itertools.pairwise(spread_out.requests)]
    assert max(gaps_ns) < 3 * S
    assert statistics.median(gaps_ns) > 0.1 * S


def test_a_tick_at_which_often_nobody_comes_is_found() -> None:
    instants_s = [0, 2, 4, 5, 7, 10, 12, 14]
    requests = [TraceRequest(at * S, 100, 1) for at in instants_s for _ in range(5)]
    assert tick_ns(Trace(tuple(requests), 16, "sparse")) == S


def test_spread_arrivals_stay_within_their_tick_and_differ_by_seed() -> None:
    trace = ticking()
    moved = spread(trace, seed=1)
    assert sizes(moved) == sizes(trace)
    assert moved.requests[0].arrival_ns == 0
    assert len({request.arrival_ns for request in moved.requests}) == len(moved.requests)
    assert moved.span_ns < 30 * S
    assert spread(trace, seed=1) == moved
    assert spread(trace, seed=2) != moved


def test_arrivals_that_are_exact_are_not_spread() -> None:
    trace = poisson(50, 1.0, seed=1, prompt=always(5))
    assert spread(trace, seed=1) is trace


def test_scaling_to_a_load_moves_time_only() -> None:
    trace = ticking()  # 60 requests in 27 s
    scaled = scale_to_load(trace, 0.5, workers=2, work_s=lambda request, cached: 0.9)
    assert sizes(scaled) == sizes(trace)
    assert scaled.span_ns == pytest.approx(54 * S)  # 54 s of work, half of two workers' time
    assert scale_time(trace, 3.0).span_ns == 9 * S


def test_what_one_endless_cache_would_have() -> None:
    trace = Trace(
        (
            TraceRequest(0, 40, 1, (1, 2)),
            TraceRequest(1, 40, 1, (1, 3)),
            TraceRequest(2, 32, 1, (1, 2)),  # all of it: but the last token is always computed
            TraceRequest(3, 40, 1, (9, 2)),  # a known block behind an unknown one is of no use
        ),
        16,
        "t",
    )
    assert cached_tokens(trace) == [0, 16, 31, 0]


def test_repeating_takes_fresh_ids_each_time() -> None:
    once = Trace((TraceRequest(0, 40, 1, (0, 7)), TraceRequest(2 * S, 40, 1, (0,))), 16, "t")
    often = repeat(once, 5)
    assert len(often.requests) == 5
    assert [r.arrival_ns // S for r in often.requests] == [0, 2, 4, 6, 8]
    by_pass = [set(often.requests[i].blocks) for i in (0, 2, 4)]
    assert not by_pass[0] & by_pass[1]
    assert not by_pass[1] & by_pass[2]
    assert often.requests[3].blocks == (often.requests[2].blocks[0],)
    assert repeat(once, 1).requests == once.requests[:1]


def test_copies_lie_beside_each_other_with_ids_of_their_own() -> None:
    once = Trace((TraceRequest(0, 40, 1, (0, 7)), TraceRequest(2 * S, 41, 1, (0,))), 16, "t")
    beside = overlay(once, 4)
    assert [r.arrival_ns // S for r in beside.requests] == [0, 0, 2, 2]
    assert [r.prompt_tokens for r in beside.requests] == [40, 41, 41, 40]
    assert beside.requests[2].blocks == beside.requests[0].blocks[:1]  # two seconds later, as ever
    assert beside.requests[1].blocks == beside.requests[3].blocks[:1]
    assert not set(beside.requests[0].blocks) & set(beside.requests[3].blocks)
    assert sizes(overlay(ticking(), 200)).total() == 200
    assert overlay(once, 2).requests == once.requests


def test_poisson_arrivals_have_their_rate_and_their_seed() -> None:
    trace = poisson(4000, 8.0, seed=3, prompt=exponential(100))
    assert trace.span_ns / S == pytest.approx(500, rel=0.05)
    assert sum(r.prompt_tokens for r in trace.requests) / 4000 == pytest.approx(100, rel=0.05)
    assert poisson(20, 8.0, seed=3, prompt=always(1)) == poisson(20, 8.0, seed=3, prompt=always(1))


def test_merged_traces_are_one_in_order() -> None:
    one, other = (poisson(20, 1.0, seed=seed, prompt=always(seed)) for seed in (1, 2))
    both = merged("both", one, other)
    arrivals = [request.arrival_ns for request in both.requests]
    assert arrivals == sorted(arrivals)
    assert sizes(both) == Counter({1: 20, 2: 20})


def test_tides_keep_all_requests_in_order_and_change_the_pace_as_said() -> None:
    even = Trace(tuple(TraceRequest(n * S, 10, 10) for n in range(2000)), 16, "even")
    moved = tides(even, low=0.5, high=2.0, period_s=400.0)
    instants = [request.arrival_ns for request in moved.requests]
    assert instants == sorted(instants)
    assert instants[0] == 0
    assert [replace(r, arrival_ns=0) for r in moved.requests] == [
        replace(r, arrival_ns=0) for r in even.requests
    ]
    tide = [instant for instant in instants if instant < 400 * S]
    assert abs(len(tide) - 400 * 1.25) <= 2, "on average 1.25 times as many"
    slack = sum(instant < 40 * S for instant in instants)
    flood = sum(180 * S <= instant < 220 * S for instant in instants)
    assert 20 <= slack <= 24
    assert 77 <= flood <= 80
