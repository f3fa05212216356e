"""Traces made up: Poisson arrivals, with lengths drawn from whatever is given."""

import random
from collections.abc import Callable

from pdserve.clock import S
from pdserve.simulator.traces import DEFAULT_BLOCK_TOKENS, Trace, TraceRequest

Draw = Callable[[random.Random], int]
"""A number of tokens, at least 1."""


def exponential(mean_tokens: float) -> Draw:
    return lambda chance: max(1, round(chance.expovariate(1 / mean_tokens)))


def always(tokens: int) -> Draw:
    return lambda _: tokens


def either(tokens: int, other_tokens: int, *, other_share: float) -> Draw:
    return lambda chance: other_tokens if chance.random() < other_share else tokens


def poisson(
    count: int,
    rate_per_s: float,
    *,
    seed: int,
    prompt: Draw,
    generated: Draw = always(1),  # noqa: B008  (a pure function)
    tenant: str = "",
) -> Trace:
    """``count`` requests that share nothing."""
    assert count > 0
    assert rate_per_s > 0
    chance = random.Random(seed)
    requests, now_s = [], 0.0
    for _ in range(count):
        now_s += chance.expovariate(rate_per_s)
        requests.append(
            TraceRequest(round(now_s * S), prompt(chance), generated(chance), tenant=tenant)
        )
    return Trace(tuple(requests), DEFAULT_BLOCK_TOKENS, f"poisson {rate_per_s:g}/s")


def merged(name: str, *traces: Trace) -> Trace:
    """All at once. Block ids are taken as they are: equal ones are shared."""
    requests = [request for trace in traces for request in trace.requests]
    requests.sort(key=lambda request: request.arrival_ns)
    return Trace(tuple(requests), traces[0].block_tokens, name)
