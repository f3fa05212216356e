"""Core and simulator together against queues whose answers are known.

A prefill worker is a server, a prompt's length its service time. First against the recursions that
give every single wait of a first-come-first-served queue, which leaves nothing to chance; then, in
the slow tests, a million jobs against the formulas.
"""

import heapq
import math

import numpy as np
import pytest

from pdserve.clock import S
from pdserve.router.costs import CostModel, DecodeCost, MoveCost, PrefillCost, StepCost
from pdserve.router_config import RouterConfig
from pdserve.simulator.result import Floats
from pdserve.simulator.run import SimulationSettings, simulate
from pdserve.simulator.synthetic import Draw, either, exponential, poisson
from pdserve.simulator.traces import Trace

TOKENS_PER_S = 10_000  # so that rounding a job to whole tokens changes it by 0.005 % on average
NO_STEP = StepCost(fixed_s=0.0, context_s=0.0, sequence_s=0.0)
FREE = MoveCost(fixed_s=0.0, bytes_per_s=1e15)
COSTS = CostModel(
    name="queue",
    origin="believed",
    prefill=PrefillCost(fixed_s=0.0, token_s=1 / TOKENS_PER_S),
    decode=DecodeCost(small=NO_STEP, large=NO_STEP),
    handoff=FREE,
    host=FREE,
    ssd=FREE,
    kv_token_bytes=1,
)
ONE_SECOND = exponential(TOKENS_PER_S)
TWO_SIZES = either(TOKENS_PER_S // 2, 5 * TOKENS_PER_S, other_share=1 / 9)  # mean 1 s
TWO_SIZES_SECOND_MOMENT = 0.25 * 8 / 9 + 25 / 9


def waits_s(trace: Trace, servers: int) -> Floats:
    settings = SimulationSettings(
        router=RouterConfig(
            policy="fcfs", preemption=False, waiting_max=10**9, queue_age_max_ms=None
        ),
        costs=COSTS,
        prefill_workers=servers,
        decode_workers=1,
        decode=False,
        chunk_tokens=1,  # nothing is sent ahead: a worker has one job at a time
        chunk_reports_max=0,
    )
    result = simulate(trace, settings)
    assert result.finished.all()
    return np.asarray(result.ttft_s - result.prompt_tokens / TOKENS_PER_S)


def recursion_s(trace: Trace, servers: int) -> Floats:
    """Each job takes the server that is free first: Kiefer and Wolfowitz."""
    free_s = [0.0] * servers
    waits = []
    for request in trace.requests:
        arrival_s = request.arrival_ns / S
        begin_s = max(arrival_s, heapq.heappop(free_s))
        heapq.heappush(free_s, begin_s + request.prompt_tokens / TOKENS_PER_S)
        waits.append(begin_s - arrival_s)
    return np.array(waits)


@pytest.mark.parametrize("servers", [1, 2, 5])
@pytest.mark.parametrize("sizes", [ONE_SECOND, TWO_SIZES])
def test_every_wait_of_first_come_first_served_is_exact(servers: int, sizes: Draw) -> None:
    trace = poisson(200, 0.9 * servers, seed=servers, prompt=sizes)
    np.testing.assert_allclose(waits_s(trace, servers), recursion_s(trace, servers), atol=2e-6)


def shortest_remaining_first_s(trace: Trace) -> Floats:
    """Time in the system of each job, if the server always has the one with the least left."""
    begun: list[tuple[float, int]] = []
    total_s = [0.0] * len(trace.requests)
    now_s = 0.0

    def serve_until(until_s: float) -> None:
        nonlocal now_s
        while begun and now_s < until_s:
            left_s, index = heapq.heappop(begun)
            served_s = min(left_s, until_s - now_s)
            now_s += served_s
            if served_s < left_s:
                heapq.heappush(begun, (left_s - served_s, index))
            else:
                total_s[index] = now_s - trace.requests[index].arrival_ns / S
        now_s = max(now_s, until_s) if until_s < math.inf else now_s

    for index, request in enumerate(trace.requests):
        serve_until(request.arrival_ns / S)
        heapq.heappush(begun, (request.prompt_tokens / TOKENS_PER_S, index))
    serve_until(math.inf)
    return np.array(total_s)


def test_shortest_remaining_first_with_tiny_chunks_comes_within_one_per_cent() -> None:
    trace = poisson(300, 0.8, seed=3, prompt=ONE_SECOND)
    settings = SimulationSettings(
        router=RouterConfig(
            policy="srpt", waiting_max=10**9, preempted_max=10**6, queue_age_max_ms=None
        ),
        costs=COSTS,
        prefill_workers=1,
        decode_workers=1,
        decode=False,
        chunk_tokens=TOKENS_PER_S // 50,
        chunk_reports_max=10**6,
    )
    found_s = simulate(trace, settings).ttft_s.mean()
    assert found_s == pytest.approx(shortest_remaining_first_s(trace).mean(), rel=0.01)


def erlang_c(servers: int, load: float) -> float:
    """The probability that a job has to wait, at ``load`` Erlang."""
    terms = [load**k / math.factorial(k) for k in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("servers", [1, 4])
def test_a_million_jobs_wait_as_erlang_says(servers: int) -> None:
    rate = 0.7 * servers
    waits = waits_s(poisson(1_000_000, rate, seed=1, prompt=ONE_SECOND), servers)
    expected_s = erlang_c(servers, rate) / (servers - rate)
    assert waits.mean() == pytest.approx(expected_s, rel=0.01)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_jobs_of_two_sizes_wait_as_pollaczek_and_khinchine_say() -> None:
    waits = waits_s(poisson(1_000_000, 0.7, seed=1, prompt=TWO_SIZES), 1)
    expected_s = 0.7 * TWO_SIZES_SECOND_MOMENT / (2 * (1 - 0.7))
    assert waits.mean() == pytest.approx(expected_s, rel=0.01)
