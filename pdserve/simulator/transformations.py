"""A trace made from a trace: pure, and by a seed where chance plays a part.

Load is changed by scaling *time*, never by leaving requests out: dropping some would take away the
prefixes that others reuse, and with them the trace's cache hits.
"""

import itertools
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace

from pdserve.clock import S
from pdserve.simulator.traces import Trace, TraceRequest

TICK_REQUESTS_MIN = 4.0
"""Requests per distinct instant, on average, from which arrivals are taken for quantised."""

TICK_JITTER_RATIO = 0.01
"""Of a tick: a gap is a whole number of them, give or take so much."""

TICK_OFF_RATIO_MAX = 0.05
"""Of all gaps: so many may be further off."""

TIDE_STEPS = 1_000
"""In which a tide's pace is taken for constant."""


def tick_ns(trace: Trace) -> int | None:
    """The tick to which the arrivals were rounded, or None if they were not.

    That is where few instants carry many requests each. All instants are then multiples of their
    greatest common divisor, or nearly multiples of the usual gap between two: the clock of who
    recorded Mooncake's conversations every 3 s was a millisecond early or late.
    """
    instants = sorted({request.arrival_ns for request in trace.requests})
    if len(instants) < 2 or len(trace.requests) < TICK_REQUESTS_MIN * len(instants):
        return None
    gaps = [later - earlier for earlier, later in itertools.pairwise(instants)]
    usual = statistics.median_low(gaps)
    off = sum(abs(gap - round(gap / usual) * usual) > TICK_JITTER_RATIO * usual for gap in gaps)
    return usual if off <= TICK_OFF_RATIO_MAX * len(gaps) else math.gcd(*instants)


def spread(trace: Trace, seed: int) -> Trace:
    """Arrivals spread evenly at random over the tick they were rounded to; else the trace itself.

    Without this every policy looks limited by bursts that only the rounding made.
    """
    tick = tick_ns(trace)
    if tick is None:
        return trace
    chance = random.Random(seed)
    moved = [
        replace(request, arrival_ns=request.arrival_ns + chance.randrange(tick))
        for request in trace.requests
    ]
    moved.sort(key=lambda request: request.arrival_ns)
    return _from_zero(trace, moved)


def scale_time(trace: Trace, factor: float) -> Trace:
    """Everything happens ``factor`` times as fast."""
    assert factor > 0
    moved = [replace(r, arrival_ns=round(r.arrival_ns / factor)) for r in trace.requests]
    return replace(trace, requests=tuple(moved))


def tides(trace: Trace, *, low: float, high: float, period_s: float) -> Trace:
    """Time passes faster and slower: the trace's pace goes from ``low`` times its own to ``high``
    times and back, as a cosine, once in ``period_s`` of the new time."""
    assert 0 < low <= high
    assert period_s > 0
    moved = []
    at_s = told_s = 0.0  # new time, and how much of the old one it has told
    step_s = period_s / TIDE_STEPS
    for request in trace.requests:
        due_s = request.arrival_ns / S
        while True:
            pace = low + (high - low) * (1 - math.cos(2 * math.pi * at_s / period_s)) / 2
            if told_s + pace * step_s > due_s:
                break
            at_s, told_s = at_s + step_s, told_s + pace * step_s
        moved.append(replace(request, arrival_ns=round((at_s + (due_s - told_s) / pace) * S)))
    return replace(trace, requests=tuple(moved))


def scale_to_load(
    trace: Trace, rho: float, *, workers: int, work_s: Callable[[TraceRequest, int], float]
) -> Trace:
    """Time scaled so that the trace offers ``rho`` of what ``workers`` can do.

    Args:
        work_s: seconds that one request takes of a worker, given how many of its tokens lie in
            blocks that an earlier request had too.
    """
    assert rho > 0
    total_s = sum(map(work_s, trace.requests, cached_tokens(trace)))
    span_s = trace.span_ns / S
    assert span_s > 0, f"{trace.name}: all requests arrive at once, no time to scale"
    return scale_time(trace, rho * workers * span_s / total_s)


def cached_tokens(trace: Trace) -> list[int]:
    """Of each request, the tokens that one cache without limits would have on its arrival.

    The last token is always computed, because its logits are the answer.
    """
    seen: set[int] = set()
    cached = []
    for request in trace.requests:
        count = 0
        for block in request.blocks:
            if block not in seen:
                break
            count += 1
        seen.update(request.blocks)
        cached.append(min(count * trace.block_tokens, request.prompt_tokens - 1))
    return cached


def first(trace: Trace, count: int) -> Trace:
    """The first ``count`` requests, or all."""
    assert count > 0
    return replace(trace, requests=trace.requests[:count])


def repeat(trace: Trace, count: int) -> Trace:
    """The trace again and again until there are ``count`` requests.

    Each time with block ids of its own: a second pass that found all its prompts cached would be
    another load.
    """
    assert trace.requests
    requests = list(trace.requests)
    # As long as the mean gap between requests until the next pass begins.
    period_ns = trace.span_ns + trace.span_ns // max(1, len(requests) - 1)
    ids = 1 + max((block for r in requests for block in r.blocks), default=0)
    repeated: list[TraceRequest] = []
    for index in range(count):
        number, place = divmod(index, len(requests))
        request = requests[place]
        repeated.append(
            replace(
                request,
                arrival_ns=request.arrival_ns + number * period_ns,
                blocks=tuple(block + number * ids for block in request.blocks),
            )
            if number
            else request
        )
    return replace(trace, requests=tuple(repeated))


def overlay(trace: Trace, count: int) -> Trace:
    """As many more clients: the trace beside itself, the first ``count`` requests of all copies.

    Each copy begins elsewhere in the trace and has block ids of its own. Unlike ``repeat``, whose
    requests have to be brought closer together to load more workers, and a conversation's turns
    with them, until the next one comes before the last is answered, this leaves the time between
    two turns what it was. Whatever a copy's end cuts off is at its beginning.
    """
    assert trace.requests
    requests = trace.requests
    copies = -(-count // len(requests))  # ceil
    period_ns = trace.span_ns + trace.span_ns // max(1, len(requests) - 1)
    ids = 1 + max((block for r in requests for block in r.blocks), default=0)
    laid = [
        replace(
            request,
            arrival_ns=(request.arrival_ns - requests[0].arrival_ns + shift_ns) % period_ns,
            blocks=tuple([block + copy * ids for block in request.blocks]),
        )
        for copy, shift_ns in ((copy, copy * period_ns // copies) for copy in range(copies))
        for request in requests
    ]
    laid.sort(key=lambda request: request.arrival_ns)
    return _from_zero(trace, laid[:count])


def _from_zero(trace: Trace, requests: list[TraceRequest]) -> Trace:
    first_ns = requests[0].arrival_ns
    return replace(
        trace, requests=tuple(replace(r, arrival_ns=r.arrival_ns - first_ns) for r in requests)
    )
