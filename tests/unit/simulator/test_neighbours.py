"""Workers of one host, which slow each other down."""

from dataclasses import replace

import pytest

from pdserve.clock import S
from pdserve.messages import Role
from pdserve.simulator.run import simulate
from pdserve.simulator.settings import Death, Slowdown
from tests.unit.simulator.test_simulation import (
    SKIP_JOIN,
    check_conservation,
    mixed_trace,
    settings,
    trace_of,
)

STREAM_AND_PROMPT = trace_of((0.0, 100, 101), (0.2, 100, 1))
"""The second prompt comes beside the stream of the first, and would take a tenth of a second."""


def test_a_prompt_beside_a_stream_takes_longer_and_so_does_the_stream() -> None:
    result = simulate(STREAM_AND_PROMPT, settings(contention=2.0))
    assert result.ttft_s == pytest.approx([0.1, 0.2], abs=1e-6)
    # Ten steps alone, ten at half the pace, eighty alone: 0.1 + 0.2 + 0.8 s.
    assert result.tpot_s[0] == pytest.approx(0.011, abs=0.0002)
    alone = simulate(STREAM_AND_PROMPT, settings())
    assert alone.ttft_s == pytest.approx([0.1, 0.1], abs=1e-6)
    assert alone.tpot_s[0] == pytest.approx(0.010, abs=1e-6)


def test_workers_of_other_hosts_are_no_neighbours() -> None:
    """The first decode worker, which is on the prefill worker's host, is gone at once."""
    gone = Death(role=Role.DECODE, index=0, at_ns=0)
    apart = settings(contention=2.0, decode_workers=2, hosts=2, failures=(gone,))
    result = simulate(trace_of((0.1, 100, 101), (0.3, 100, 1)), apart)
    assert result.ttft_s == pytest.approx([0.1, 0.1], abs=1e-6)
    assert result.tpot_s[0] == pytest.approx(0.010, abs=1e-6)


def test_the_fewer_work_the_less_it_costs() -> None:
    """Of the two others of a worker one works: half of what is lost when both do."""
    result = simulate(STREAM_AND_PROMPT, settings(contention=2.0, prefill_workers=2))
    assert result.ttft_s[1] == pytest.approx(0.15, abs=1e-6)


def test_a_slow_neighbour_stays_as_slow_as_it_is() -> None:
    slow = Slowdown(role=Role.PREFILL, index=0, at_ns=0, factor=3.0)
    result = simulate(STREAM_AND_PROMPT, settings(contention=2.0, failures=(slow,)))
    assert result.ttft_s == pytest.approx([0.3, 0.7], abs=1e-6)


def test_who_comes_back_is_slowed_by_its_neighbours_once() -> None:
    trace = trace_of((0.0, 100, 401), (0.2, 100, 1), (1.0, 100, 1))
    death = Death(role=Role.PREFILL, index=0, at_ns=S // 4, back_after_ns=S // 4)
    result = simulate(trace, settings(contention=2.0, failures=(death,)))
    check_conservation(result)
    assert result.ttft_s[2] == pytest.approx(0.2, abs=1e-6)


def test_slower_costs_are_everybodys_and_multiply_with_a_slow_worker() -> None:
    plain = simulate(STREAM_AND_PROMPT, settings())
    costs = settings().costs.slowed(prefill=1.5, decode=1.5)
    slower = simulate(STREAM_AND_PROMPT, settings(costs=costs))
    assert slower.ttft_s == pytest.approx(1.5 * plain.ttft_s, abs=1e-6)
    assert slower.tpot_s[0] == pytest.approx(1.5 * plain.tpot_s[0], abs=1e-6)
    busy = plain.counters["simulated_busy_us"]
    assert busy == pytest.approx(1e6 * (0.2 + 100 * 0.010), abs=2)
    assert slower.counters["simulated_busy_us"] == pytest.approx(1.5 * busy, abs=2)
    slow = Slowdown(role=Role.PREFILL, index=0, at_ns=0, factor=2.0)
    both = simulate(STREAM_AND_PROMPT, settings(costs=costs, failures=(slow,)))
    assert both.ttft_s == pytest.approx([0.3, 0.4], abs=1e-6)  # the second waits for the first


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["disaggregated", "auto", "aggregated"])
def test_every_request_ends_however_they_disturb_each_other(mode: str, seed: int) -> None:
    crowded = settings(
        router=replace(SKIP_JOIN, mode=mode),  # type: ignore[arg-type]
        prefill_workers=2, decode_workers=2, decode_tokens=3000, contention=1.5,
        failures=(Death(role=Role.DECODE, index=1, at_ns=2 * S, back_after_ns=S),),
    )  # fmt: skip
    result = simulate(mixed_trace(seed), crowded)
    check_conservation(result)
    again = simulate(mixed_trace(seed), crowded)
    assert again.decisions_sha256 == result.decisions_sha256
