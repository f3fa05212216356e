"""``bench.live_scheduling``: the bursts, and what is said of made-up outcomes."""

from dataclasses import replace
from functools import partial

import pytest

from bench import live_scheduling
from bench.intervals import ratio_interval
from bench.live_scheduling import FCFS, SKIP_JOIN, Bursts, rows_of, slowdown
from bench.peers.mixed_load import Outcome
from tests.unit.bench.outcomes import outcome

ALONE_S = {64: 0.1, 1024: 1.0}
BURSTS = Bursts(
    shorts=10,
    longs=2,
    short_tokens=[64],
    long_tokens=[1024],
    answer_tokens=4,
    utilisation=0.8,
)


def test_bursts_are_so_far_apart_that_prefill_is_as_busy_as_asked() -> None:
    assert BURSTS.period_s(ALONE_S) == pytest.approx((10 * 0.1 + 2 * 1.0) / 0.8)
    mixed_lengths = replace(BURSTS, short_tokens=[64, 64, 1024])
    assert mixed_lengths.period_s(ALONE_S) == pytest.approx((10 * 0.4 + 2 * 1.0) / 0.8)
    assert mixed_lengths.lengths() == [64, 1024]


def test_each_burst_brings_its_prompts_within_a_fifth_of_a_second() -> None:
    arrivals = BURSTS.arrivals(period_s=4, seconds=400, seed=1)
    assert arrivals == sorted(arrivals, key=lambda arrival: arrival.due_s)
    bursts: list[list[str]] = []
    begun_s = -10.0
    for arrival in arrivals:
        if arrival.due_s - begun_s > 1:
            begun_s = arrival.due_s
            bursts.append([])
        assert arrival.due_s - begun_s < 0.2
        bursts[-1].append(arrival.kind)
    assert {(burst.count("short"), burst.count("long")) for burst in bursts} == {(10, 2)}
    assert len(bursts) == pytest.approx(100, rel=0.1)
    assert len({tuple(burst) for burst in bursts}) > 50  # the order is not always the same


def test_bursts_repeat_with_their_seed() -> None:
    one, same, other = (BURSTS.arrivals(period_s=4, seconds=40, seed=s) for s in (1, 1, 2))
    assert one == same != other


def test_slowdown_is_beside_what_the_length_takes_alone() -> None:
    (short,) = slowdown(ALONE_S, outcome(ttft_s=0.3, prompt_tokens=64))
    (long,) = slowdown(ALONE_S, outcome(ttft_s=3.0, prompt_tokens=1024))
    assert short == pytest.approx(3)
    assert long == pytest.approx(3)


def burst(short_ttft_s: float, long_ttft_s: float) -> list[Outcome]:
    shorts = [outcome("short", ttft_s=short_ttft_s, due_s=n * 10) for n in range(9)]
    return [*shorts, outcome("long", ttft_s=long_ttft_s, prompt_tokens=1024)]


def test_what_short_prompts_gain_and_long_ones_pay_is_all_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live_scheduling, "ratio_interval", partial(ratio_interval, draws=5))
    runs = {FCFS: [burst(2.0, 2.0)], SKIP_JOIN: [burst(0.5, 3.0)]}
    rows = {made.name: made for made in rows_of(runs, ALONE_S)}
    mean = rows["mean TTFT, skip_join"]
    assert (mean.value, mean.reference_value) == pytest.approx((750, 2000))
    assert (mean.bar, mean.holds) == ("≤ 0.6×", True)
    worst = rows["slowdown p99, skip_join"]
    assert (worst.value, worst.reference_value) == pytest.approx((5, 20))
    assert (worst.bar, worst.holds) == ("≤ 0.5×", True)
    assert rows["mean TTFT, short, skip_join"].ratio == pytest.approx(0.25)
    assert rows["mean TTFT, long, skip_join"].ratio == pytest.approx(1.5)
    assert all(made.ratio_interval is not None for made in rows.values())
