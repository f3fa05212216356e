"""The whole simulation: conservation, determinism, physics, and each kind of failure."""

import gc
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pdserve.clock import MS, S
from pdserve.messages import Role
from pdserve.router.costs import CostModel, DecodeCost, MoveCost, PrefillCost, StepCost
from pdserve.router.entry import ShadowJob
from pdserve.router_config import RouterConfig
from pdserve.simulator.adversaries import SCENARIOS
from pdserve.simulator.result import Result
from pdserve.simulator.run import SimulationSettings, simulate
from pdserve.simulator.settings import Death, Noise, Slowdown
from pdserve.simulator.synthetic import always, exponential, poisson
from pdserve.simulator.traces import Trace, TraceRequest

STEP = StepCost(fixed_s=0.010, context_s=0.0, sequence_s=0.0)
FREE = MoveCost(fixed_s=0.0, bytes_per_s=1e15)
COSTS = CostModel(
    name="round",
    origin="believed",
    prefill=PrefillCost(fixed_s=0.0, token_s=0.001),
    decode=DecodeCost(small=STEP, large=STEP),
    handoff=FREE,
    host=FREE,
    ssd=FREE,
    kv_token_bytes=1,
)
"""A prompt's token is a millisecond, a step ten; nothing is lost on the way."""

FCFS = RouterConfig(policy="fcfs", preemption=False, waiting_max=10**6)
SKIP_JOIN = RouterConfig(waiting_max=10**6)


def settings(**changes: object) -> SimulationSettings:
    base = SimulationSettings(
        router=FCFS, costs=COSTS, prefill_workers=1, decode_workers=1, chunk_tokens=100
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def trace_of(*requests: tuple[float, int, int], blocks: tuple[tuple[int, ...], ...] = ()) -> Trace:
    """(arrival in seconds, prompt tokens, generated tokens) each."""
    return Trace(
        tuple(
            TraceRequest(round(at_s * S), prompt, generated, blocks[i] if blocks else ())
            for i, (at_s, prompt, generated) in enumerate(requests)
        ),
        16,
        "test",
    )


def check_conservation(result: Result) -> None:
    """Every request ended, once, in one of the ways there are."""
    counters = result.counters
    assert int(result.finished.sum()) == counters.get("finished", 0)
    ended = sum(
        counters.get(name, 0) for name in ("finished", "refused", "lost", "cancelled", "replaced")
    )
    assert counters["arrived"] == ended
    done = result.finished
    assert (result.ttft_s[done] > 0).all()
    assert (result.e2e_s[done] >= result.ttft_s[done]).all()


# ── physics ──────────────────────────────────────────────────────────────────────────────────────


def test_one_request_alone_takes_what_its_parts_take() -> None:
    result = simulate(trace_of((0.0, 250, 5)), settings())
    assert result.ttft_s[0] == pytest.approx(0.250, abs=1e-6)
    assert result.e2e_s[0] == pytest.approx(0.290, abs=1e-6)  # four more tokens
    assert result.tpot_s[0] == pytest.approx(0.010, abs=1e-6)


def test_prompts_are_computed_one_after_the_other() -> None:
    result = simulate(trace_of((0.0, 250, 1), (0.1, 100, 1)), settings())
    assert result.ttft_s == pytest.approx([0.250, 0.250], abs=1e-6)


def test_without_decode_a_request_ends_with_its_first_token() -> None:
    result = simulate(trace_of((0.0, 250, 500)), settings(decode=False))
    assert result.e2e_s[0] == result.ttft_s[0] == pytest.approx(0.250, abs=1e-6)
    assert result.generated_tokens[0] == 1
    assert np.isnan(result.tpot_s[0])


def test_a_cached_prefix_is_not_computed_again() -> None:
    blocks = tuple(range(10))
    trace = trace_of((0.0, 170, 1), (1.0, 200, 1), blocks=(blocks, blocks))
    result = simulate(trace, settings())
    assert result.cached_tokens.tolist() == [0, 160]
    assert result.ttft_s[1] == pytest.approx(0.040, abs=1e-6)


def test_a_cache_that_is_too_small_forgets() -> None:
    trace = trace_of(
        (0.0, 161, 1),
        (1.0, 161, 1),
        (2.0, 161, 1),
        blocks=(tuple(range(10)), tuple(range(20, 30)), tuple(range(10))),
    )
    result = simulate(trace, settings(cache_tokens=12 * 16))
    assert result.cached_tokens[2] == 16  # of the first prompt, one block was left
    assert simulate(trace, settings()).cached_tokens[2] == 160


def test_a_store_shares_prefixes_between_the_workers_of_its_host_and_fetching_takes_time() -> None:
    blocks = tuple(range(10))
    slow_host = replace(COSTS, host=MoveCost(fixed_s=0.020, bytes_per_s=1e15))
    # The first worker dies: what it computed is left in the store of its host.
    trace = trace_of((0.0, 170, 1), (2.0, 170, 1), blocks=(blocks, blocks))
    death = Death(role=Role.PREFILL, index=0, at_ns=S, back_after_ns=MS)
    result = simulate(
        trace, settings(costs=slow_host, store_tokens=None, failures=(death,), decode=False)
    )
    assert result.cached_tokens.tolist() == [0, 160]
    assert result.ttft_s[1] == pytest.approx(0.030, abs=1e-6)
    without = simulate(trace, settings(costs=slow_host, failures=(death,), decode=False))
    assert without.ttft_s[1] == pytest.approx(0.170, abs=1e-6)


def test_what_another_host_has_is_fetched_where_that_is_sooner_than_computing_it() -> None:
    blocks = tuple(range(10))
    # The second prompt keeps the worker busy that computed the first; the third goes to the other.
    trace = trace_of((0.0, 170, 1), (1.0, 500, 1), (1.001, 170, 1), blocks=(blocks, (), blocks))

    def last_ttft_s(fetch_s: float, **changes: object) -> float:
        costs = replace(COSTS, handoff=MoveCost(fixed_s=fetch_s, bytes_per_s=1e15))
        base = settings(costs=costs, prefill_workers=2, hosts=2, store_tokens=None, decode=False)
        result = simulate(trace, replace(base, **changes))  # type: ignore[arg-type]
        return float(result.ttft_s[2])

    assert last_ttft_s(0.020) == pytest.approx(0.020 + 0.010, abs=1e-6)
    assert last_ttft_s(0.161) == pytest.approx(0.170, abs=1e-6)  # computing takes 160 ms
    assert last_ttft_s(0.020, fetches=False) == pytest.approx(0.170, abs=1e-6)
    assert last_ttft_s(0.020, store_tokens=0) == pytest.approx(0.170, abs=1e-6)
    # The router believes that fetching takes no time; the worker knows better.
    assert last_ttft_s(0.161, predicted=COSTS) == pytest.approx(0.170, abs=1e-6)


def with_disk(*blocks: tuple[int, ...], gap_s: float = 1.0) -> tuple[Trace, dict[str, Any]]:
    """Prompts one after the other, and a worker that remembers one of them, on a host that
    remembers two: what is found there goes to the disk."""
    requests = ((index * gap_s, 161, 1) for index in range(len(blocks)))
    sizes = {"cache_tokens": 12 * 16, "store_tokens": 20 * 16, "decode": False}
    return trace_of(*requests, blocks=blocks), sizes


A, B, C = (tuple(range(first, first + 10)) for first in (0, 20, 40))


def test_what_lies_on_the_disk_is_read_where_that_is_sooner_than_computing_it() -> None:
    trace, sizes = with_disk(A, B, A, B, C, A)

    def last_ttft_s(read_s: float, **changes: object) -> float:
        costs = replace(COSTS, ssd=MoveCost(fixed_s=read_s, bytes_per_s=1e15))
        return float(simulate(trace, settings(costs=costs, **sizes, **changes)).ttft_s[-1])

    assert last_ttft_s(0.0, disk_tokens=0) == pytest.approx(0.161, abs=1e-6)
    assert last_ttft_s(0.020, disk_tokens=None) == pytest.approx(0.020 + 0.001, abs=1e-6)
    assert last_ttft_s(0.159, disk_tokens=None) == pytest.approx(0.159 + 0.001, abs=1e-6)
    assert last_ttft_s(0.161, disk_tokens=None) == pytest.approx(0.161, abs=1e-6)  # computed
    assert last_ttft_s(0.020, disk_tokens=16) == pytest.approx(0.161, abs=1e-6)  # B is there


def test_what_a_waiting_prompt_needs_of_the_disk_comes_up_meanwhile() -> None:
    waits, sizes = with_disk(A, B, A, B, C, (), (), A)
    at_once = (*waits.requests[:5], *(replace(r, arrival_ns=10 * S) for r in waits.requests[5:]))
    costs = replace(COSTS, ssd=MoveCost(fixed_s=0.159, bytes_per_s=1e15))
    result = simulate(
        replace(waits, requests=at_once), settings(costs=costs, disk_tokens=None, **sizes)
    )
    # Two prompts are computed before it, for longer than the disk takes.
    assert result.ttft_s[-1] == pytest.approx(2 * 0.161 + 0.001, abs=1e-6)


def test_when_memory_is_short_the_latest_stream_is_parked_and_ends_all_the_same() -> None:
    trace = trace_of((0.0, 32, 200), (0.0, 32, 200))
    result = simulate(trace, settings(decode_tokens=16 * 16))
    check_conservation(result)
    assert result.finished.all()
    assert result.parked.tolist()[0] == 0
    assert result.parked[1] >= 1
    assert result.generated_tokens.tolist() == [200, 200]


def test_a_prompt_that_fits_nowhere_is_refused() -> None:
    result = simulate(trace_of((0.0, 600, 5), (0.0, 20, 5)), settings(decode_tokens=160))
    check_conservation(result)
    assert result.finished.tolist() == [False, True]


def test_a_short_prompt_preempts_a_long_one_at_a_chunk_border() -> None:
    trace = trace_of((0.0, 5000, 1), (1.05, 200, 1))
    kept = simulate(trace, settings())
    result = simulate(trace, settings(router=SKIP_JOIN))
    assert kept.preempted.tolist() == [0, 0]
    assert result.preempted.tolist() == [1, 0]
    assert result.ttft_s[1] == pytest.approx(0.250, abs=1e-6)  # the chunk under way, and its own
    check_conservation(result)


def test_one_that_is_part_of_a_chunk_goes_ahead_of_a_long_one_at_the_next_border() -> None:
    trace = trace_of((0.0, 5000, 1), (1.05, 10, 1), (1.051, 20, 1))
    result = simulate(trace, settings(router=SKIP_JOIN))
    assert result.preempted.tolist() == [0, 0, 0]
    assert result.ttft_s[1] == pytest.approx(0.060, abs=1e-6)  # the chunk under way, and its own
    assert result.ttft_s[2] == pytest.approx(0.079, abs=1e-6)
    assert result.ttft_s[0] == pytest.approx(5.030, abs=1e-6)  # both of theirs
    check_conservation(result)


def test_what_a_preempted_prompt_computed_is_kept() -> None:
    blocks = (tuple(range(5000 // 16)), ())
    result = simulate(
        trace_of((0.0, 5000, 1), (1.05, 10, 1), blocks=blocks), settings(router=SKIP_JOIN)
    )
    computed = result.counters["simulated_prompt_tokens"]
    assert 5010 <= computed < 5010 + 16  # but for the block that was not full at the border


def test_deadlines_end_what_is_late() -> None:
    result = simulate(
        trace_of((0.0, 2000, 1), (0.0, 2000, 1)), settings(timeout_s=2.5, decode=False)
    )
    assert result.finished.tolist() == [True, False]
    check_conservation(result)


def test_while_a_long_prompt_is_computed_the_queue_is_seen_to_move() -> None:
    """Whoever took its pace for none would predict hours, and refuse who comes."""
    short = tuple((0.5 * i, 100, 1) for i in range(1, 40))
    result = simulate(trace_of((0.0, 60_000, 1), *short), settings())
    assert result.finished.all()
    assert result.ttft_s[1] == pytest.approx(59.6, abs=0.2)


def test_messages_take_their_time() -> None:
    result = simulate(trace_of((0.0, 250, 1)), settings(message_ns=5 * MS))
    assert result.ttft_s[0] == pytest.approx(0.255, abs=1e-6)  # of the dispatch


def test_predictions_that_are_wrong_change_what_is_done_and_not_how_long_it_takes() -> None:
    wrong = replace(COSTS, prefill=PrefillCost(fixed_s=0.0, token_s=0.1))
    result = simulate(trace_of((0.0, 250, 1)), settings(predicted=wrong))
    assert result.ttft_s[0] == pytest.approx(0.250, abs=1e-6)


def test_noise_keeps_the_mean() -> None:
    trace = poisson(3000, 0.1, seed=1, prompt=always(100))
    result = simulate(trace, settings(noise=Noise(sigma=0.5), decode=False))
    assert result.ttft_s.mean() == pytest.approx(0.100, rel=0.05)
    assert result.ttft_s.std() > 0.02


# ── determinism ──────────────────────────────────────────────────────────────────────────────────


def mixed_trace(seed: int, count: int = 120) -> Trace:
    return poisson(count, 6.0, seed=seed, prompt=exponential(400), generated=exponential(30))


def test_the_same_seed_gives_the_same_decisions_bit_by_bit() -> None:
    config = settings(
        router=SKIP_JOIN, prefill_workers=3, noise=Noise(sigma=0.3), decode_tokens=4000
    )
    first, again = (simulate(mixed_trace(1), config) for _ in range(2))
    assert first.decisions_sha256 == again.decisions_sha256
    assert np.array_equal(first.e2e_s, again.e2e_s, equal_nan=True)
    other = simulate(mixed_trace(1), replace(config, seed=1))
    assert other.decisions_sha256 != first.decisions_sha256


@pytest.mark.parametrize("seed", range(4))
def test_every_request_ends_in_a_small_and_crowded_cluster(seed: int) -> None:
    config = settings(
        router=SKIP_JOIN,
        prefill_workers=3,
        decode_workers=2,
        hosts=2,
        cache_tokens=6000,
        store_tokens=8000,
        decode_tokens=3000,
        running_max=4,
        message_ns=MS,
        seed=seed,
    )
    result = simulate(mixed_trace(seed), config)
    check_conservation(result)
    fits = result.prompt_tokens < 3000
    assert result.finished[fits].all()


# ── failures ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("role", list(Role))
def test_a_worker_that_dies_costs_time_and_no_token(role: Role) -> None:
    deaths = tuple(
        Death(role=role, index=0, at_ns=at_s * S, back_after_ns=S // 2) for at_s in (2, 5, 9)
    )
    config = settings(prefill_workers=2, decode_workers=2, failures=deaths)
    trace = mixed_trace(5)
    result = simulate(trace, config)
    check_conservation(result)
    assert result.finished.all()
    assert result.attempts.max() >= 2
    assert result.generated_tokens.tolist() == [r.generated_tokens for r in trace.requests]
    unharmed = simulate(trace, replace(config, failures=()))
    assert result.e2e_s.mean() > unharmed.e2e_s.mean()


def test_a_death_without_a_successor_leaves_deadlines_to_end_what_waits() -> None:
    death = Death(role=Role.PREFILL, index=0, at_ns=S // 10)
    alone = settings(router=replace(FCFS, stand_in=False), failures=(death,))
    result = simulate(trace_of((0.0, 250, 1)), replace(alone, timeout_s=30.0))
    assert not result.finished.any()
    check_conservation(result)
    forever = simulate(trace_of((0.0, 250, 1)), alone)
    assert not forever.finished.any()


def test_a_death_without_a_successor_is_stood_in_for_by_the_other_pool() -> None:
    death = Death(role=Role.PREFILL, index=0, at_ns=S // 10)
    result = simulate(trace_of((0.0, 250, 1)), settings(failures=(death,)))
    assert result.ttft_s == pytest.approx([0.1 + 0.25])
    check_conservation(result)


def test_a_slow_worker_is_slow_from_then_on() -> None:
    slow = Slowdown(role=Role.PREFILL, index=0, at_ns=S, factor=10.0)
    result = simulate(trace_of((0.0, 100, 1), (2.0, 100, 1)), settings(failures=(slow,)))
    assert result.ttft_s == pytest.approx([0.1, 1.0], abs=1e-6)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_adversary_is_survived(name: str) -> None:
    scenario = SCENARIOS[name](120, 1, 2)
    result = simulate(
        scenario.trace,
        scenario.in_settings(
            SimulationSettings(
                router=SKIP_JOIN, prefill_workers=2, decode=False, cache_tokens=200_000
            )
        ),
    )
    check_conservation(result)
    assert result.finished.all()


# ── workers that do both ─────────────────────────────────────────────────────────────────────────

AGGREGATED = RouterConfig(mode="aggregated", policy="fcfs", preemption=False, waiting_max=10**6)


def test_an_aggregated_worker_computes_chunks_beside_its_streams() -> None:
    # 10 ms per step, and 100 ms for a chunk: the second prompt's three chunks ride on steps of the
    # first request's stream, which began at 0.1 s.
    trace = trace_of((0.0, 100, 100), (0.105, 300, 1))
    config = settings(router=AGGREGATED, decode_workers=1)
    result = simulate(trace, config)
    check_conservation(result)
    assert result.ttft_s[0] == pytest.approx(0.100, abs=1e-6)
    assert result.ttft_s[1] == pytest.approx(0.005 + 3 * 0.110, abs=1e-6)
    assert result.e2e_s[0] == pytest.approx(0.100 + 99 * 0.010 + 3 * 0.100, abs=1e-6)
    hidden = simulate(trace, replace(config, overlap=1.0))
    assert hidden.ttft_s[1] == pytest.approx(0.005 + 3 * 0.010, abs=1e-6)


def test_smaller_chunks_beside_streams_spare_the_streams() -> None:
    trace = trace_of((0.0, 100, 100), (0.105, 300, 1))
    config = settings(router=AGGREGATED, mixed_chunk_tokens=50)
    result = simulate(trace, config)
    assert result.ttft_s[1] == pytest.approx(0.005 + 6 * 0.060, abs=1e-6)


def test_chunks_beside_streams_that_get_smaller_as_a_prompt_gets_deeper() -> None:
    trace = trace_of((0.0, 100, 100), (0.105, 300, 1))
    config = settings(router=AGGREGATED, mixed_chunk_tokens=50, double_cost_tokens=150)
    result = simulate(trace, config)
    steps = (300 + 300**2 / (2 * 150)) / 50
    assert result.ttft_s[1] == pytest.approx(0.005 + 0.300 + steps * 0.010, abs=1e-6)


@pytest.mark.parametrize("mode", ["aggregated", "auto"])
@pytest.mark.parametrize("seed", range(2))
def test_every_request_ends_whoever_does_what(mode: str, seed: int) -> None:
    config = settings(
        router=RouterConfig(mode=mode, waiting_max=10**6),  # type: ignore[arg-type]
        prefill_workers=1,
        decode_workers=3,
        decode_tokens=3000,
        mixed_chunk_tokens=32,
        double_cost_tokens=100,
        running_max=6,
        seed=seed,
    )
    result = simulate(mixed_trace(seed, 80), config)
    check_conservation(result)
    assert result.finished[result.prompt_tokens < 3000].all()


@pytest.mark.parametrize("mode", ["aggregated", "auto"])
def test_a_worker_that_does_both_may_die(mode: str) -> None:
    deaths = (Death(role=Role.DECODE, index=0, at_ns=2 * S, back_after_ns=S),)
    config = settings(
        router=RouterConfig(mode=mode, waiting_max=10**6),  # type: ignore[arg-type]
        decode_workers=2,
        failures=deaths,
    )
    trace = mixed_trace(3, 60)
    result = simulate(trace, config)
    check_conservation(result)
    assert result.finished.all()
    assert result.generated_tokens.tolist() == [r.generated_tokens for r in trace.requests]


def test_what_the_router_keeps_of_a_request_is_freed_without_collecting_garbage() -> None:
    """Who collects rarely keeps nothing for it. (The simulation itself is one cycle.)"""
    trace = poisson(500, 8.0, seed=3, prompt=exponential(400), generated=always(5))
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        result = simulate(trace, settings(router=SKIP_JOIN, prefill_workers=2))
        gc.collect()
        kinds = Counter(type(found) for found in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert result.finished.all()
    assert len(kinds) > 5
    kinds.pop(ShadowJob, None)  # shadows have some waiting still: they serve when somebody arrives
    ours = ("pdserve.router.entry", "pdserve.router.orders", "pdserve.messages")
    many = {kind: n for kind, n in kinds.items() if kind.__module__.startswith(ours) and n > 50}
    assert many == {}
