"""Cost models from measurements: what was put in comes out, and what cannot be told is refused."""

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pdserve.clock import S
from pdserve.errors import ConfigError
from pdserve.router.costs import DecodeCost, MoveCost, PrefillCost, StepCost
from pdserve.router.fitting import (
    MovePoint,
    PrefillPoint,
    StepPoint,
    fit_decode,
    fit_move,
    fit_prefill,
)

PREFILL = PrefillCost(fixed_s=0.012, token_s=6e-4, pair_s=8e-8)
SMALL = StepCost(fixed_s=0.010, context_s=2e-7, sequence_s=0.001)
LARGE = StepCost(fixed_s=0.004, context_s=2e-7, sequence_s=0.003)
MOVE = MoveCost(fixed_s=2e-4, bytes_per_s=4e9)

PAIRS = [(u, h) for h in (0, 512, 2048) for u in (16, 64, 256, 1024)]
BATCHES = [(b, b * c) for c in (64, 512, 2048) for b in (1, 2, 4, 8, 16, 32)]


def prefill_points(
    cost: PrefillCost, pairs: Sequence[tuple[int, int]] = PAIRS
) -> list[PrefillPoint]:
    return [PrefillPoint(u, h, cost.time_ns(u, h) / S) for u, h in pairs]


def step_points(cost: DecodeCost) -> list[StepPoint]:
    return [StepPoint(b, context, cost.step_ns(b, context) / S) for b, context in BATCHES]


def move_points(cost: MoveCost) -> list[MovePoint]:
    return [MovePoint(n, cost.time_ns(n) / S) for n in (10_000, 1_000_000, 50_000_000, 10**9)]


def test_exact_measurements_give_the_model_back() -> None:
    fit = fit_prefill(prefill_points(PREFILL))
    assert fit.cost.fixed_s == pytest.approx(PREFILL.fixed_s, rel=1e-4)
    assert fit.cost.token_s == pytest.approx(PREFILL.token_s, rel=1e-4)
    assert fit.cost.pair_s == pytest.approx(PREFILL.pair_s, rel=1e-4)
    assert fit.errors.point_count == len(PAIRS)
    assert fit.errors.p99 < 1e-4
    assert fit.left_out.p99 < 1e-4


def test_moves_give_their_bandwidth_back() -> None:
    fit = fit_move(move_points(MOVE))
    assert fit.cost.bytes_per_s == pytest.approx(4e9, rel=1e-3)
    assert fit.cost.fixed_s == pytest.approx(2e-4, rel=1e-3)


def test_two_regimes_are_found_where_there_are_two() -> None:
    fit = fit_decode(step_points(DecodeCost(small=SMALL, large=LARGE, large_from=8)))
    assert fit.cost.large_from == 8
    assert fit.cost.small.sequence_s == pytest.approx(0.001, rel=1e-3)
    assert fit.cost.large.sequence_s == pytest.approx(0.003, rel=1e-3)


def test_one_regime_stays_one() -> None:
    noise = random.Random(3)
    points = [
        StepPoint(p.sequences, p.context_tokens, p.seconds * noise.uniform(0.97, 1.03))
        for p in step_points(DecodeCost(small=SMALL, large=SMALL))
    ]
    fit = fit_decode(points)
    assert fit.cost.small.sequence_s == pytest.approx(0.001, rel=0.1)
    assert fit.cost.step_ns(32, 32 * 512) / S == pytest.approx(
        SMALL.time_ns(32, 32 * 512) / S, rel=0.05
    )


def test_few_batch_sizes_give_one_regime() -> None:
    points = [StepPoint(b, b * c, SMALL.time_ns(b, b * c) / S) for c in (64, 512) for b in (1, 8)]
    fit = fit_decode([*points, StepPoint(4, 4096, SMALL.time_ns(4, 4096) / S)])
    assert fit.cost.small == fit.cost.large


def test_errors_are_relative_so_short_prompts_count() -> None:
    """A model of 16 tokens that is 10 ms off is wrong by half, whatever 4,096 tokens take."""
    points = prefill_points(PREFILL)
    fit = fit_prefill([*points, PrefillPoint(4096, 0, 2 * PREFILL.time_ns(4096) / S)])
    short = next(p for p in points if (p.uncached_tokens, p.cached_tokens) == (16, 0))
    assert fit.cost.time_ns(16) / S == pytest.approx(short.seconds, rel=0.25)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1e-4, 10.0), min_size=len(PAIRS), max_size=len(PAIRS)))
def test_no_measurements_make_a_negative_price(seconds: list[float]) -> None:
    points = [PrefillPoint(u, h, s) for (u, h), s in zip(PAIRS, seconds, strict=True)]
    with contextlib.suppress(ConfigError):  # more tokens took no longer
        cost = fit_prefill(points).cost
        assert min(cost.fixed_s, cost.token_s, cost.pair_s) >= 0
        assert max(cost.token_s, cost.pair_s) > 0


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-4, 0.1), st.floats(1e-6, 1e-2), st.floats(1e-10, 1e-6), st.randoms())
def test_noise_of_two_per_cent_costs_a_few_per_cent(
    fixed_s: float, token_s: float, pair_s: float, noise: random.Random
) -> None:
    truth = PrefillCost(fixed_s=fixed_s, token_s=token_s, pair_s=pair_s)
    assume(truth.time_ns(1024) > 1.2 * truth.time_ns(1))  # else the noise is all there is to see
    points = [
        PrefillPoint(p.uncached_tokens, p.cached_tokens, p.seconds * noise.uniform(0.98, 1.02))
        for p in prefill_points(truth)
    ]
    fitted = fit_prefill(points).cost
    for u, h in ((100, 300), (700, 0), (900, 1500)):
        assert fitted.time_ns(u, h) == pytest.approx(truth.time_ns(u, h), rel=0.08)


@pytest.mark.parametrize(
    ("fit", "points", "complaint"),
    [
        (fit_prefill, [], "0 points were measured, at least 4"),
        (fit_prefill, prefill_points(PREFILL)[:3], "3 points were measured, at least 4"),
        (
            fit_prefill,
            prefill_points(PREFILL, [(64, 0)] * 8),
            "do not tell its terms apart: let uncached tokens",
        ),
        (
            fit_prefill,
            prefill_points(PREFILL, [(16, 0), (64, 0), (16, 0), (1024, 0)]),
            "all depends on the one point",
        ),
        (
            fit_prefill,
            [PrefillPoint(u, h, 0.1 / (u + h)) for u, h in PAIRS],
            "more tokens take no longer",
        ),
        (fit_prefill, [PrefillPoint(1, 0, 0.0)] * 4, "is no measurement"),
        (fit_prefill, [PrefillPoint(1, 0, float("nan"))] * 4, "is no measurement"),
        (
            fit_decode,
            [StepPoint(b, 64 * b, 0.01 * b) for b in (1, 2, 4, 8, 16)],
            "let batch and context take several values",
        ),
        (fit_move, [MovePoint(1000, 0.01)] * 5, "let the bytes take several values"),
        (fit_move, [MovePoint(10**i, 1 / 10**i) for i in range(4)], "more bytes take no longer"),
    ],
)
def test_what_cannot_be_told_is_refused(
    fit: Callable[[Sequence[Any]], object], points: Sequence[object], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        fit(points)
