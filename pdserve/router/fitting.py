"""Cost models from measurements: three non-negative terms, fitted to relative errors.

Every model of ``costs`` is linear in its coefficients: a point gives a row of terms (1, U, pairs)
and the seconds it took. Row and seconds are divided by the seconds, so that the least squares are
those of *relative* errors: a prefill of 16 tokens counts as much as one of 4096, where absolute
errors would leave the short ones to chance.

No coefficient may be negative, because a price that falls as work grows would have the router
prefer more work. With at most three terms the exact answer is found by trying: of every set of
terms, the unbounded least squares; of those without a negative coefficient, the best.

Decode steps have two regimes, as weights are shared by a batch until arithmetic is what limits: all
splits between two batch sizes are tried, and the best one is taken if it predicts a point that it
has not seen better than one regime does. A left-out point says that, an error over the fitted
points does not: two regimes always fit better than one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from pdserve.clock import S
from pdserve.errors import ConfigError
from pdserve.router.costs import DecodeCost, MoveCost, PrefillCost, StepCost

SIGNIFICANT_DIGITS = 6

Array = np.ndarray[Any, np.dtype[np.float64]]
Cost = TypeVar("Cost")


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    uncached_tokens: int
    cached_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepPoint:
    sequences: int
    context_tokens: int  # summed over the batch
    seconds: float


@dataclass(frozen=True, slots=True)
class MovePoint:
    moved_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of a model at some points: 0.02 is 2 per cent."""

    point_count: int
    mean: float
    p99: float


@dataclass(frozen=True, slots=True)
class Fit(Generic[Cost]):
    cost: Cost
    errors: Errors  # at the points it was fitted to
    left_out: Errors  # at each point, of the model fitted to all the others


class _Timed(Protocol):
    @property
    def seconds(self) -> float: ...


Point = TypeVar("Point", bound=_Timed)


class _Undetermined(Exception):
    """These points leave a coefficient open."""


def fit_prefill(points: Sequence[PrefillPoint]) -> Fit[PrefillCost]:
    """Raises ConfigError: too few points, or U and H do not vary enough to tell the terms apart."""
    return _fit("prefill", points, _solve_prefill, prefill_errors, need=4)


def fit_decode(points: Sequence[StepPoint]) -> Fit[DecodeCost]:
    """Raises ConfigError: too few points, or batch and context do not vary independently."""
    one = _fit("decode", points, _solve_one_regime, decode_errors, need=4)
    try:
        two = _fit("decode", points, _solve_two_regimes, decode_errors, need=4)
    except ConfigError:  # no split leaves both sides determined, whichever point is left out
        return one
    return min(one, two, key=lambda fit: fit.left_out.mean)


def fit_move(points: Sequence[MovePoint]) -> Fit[MoveCost]:
    """Raises ConfigError: too few points, or more bytes take no longer."""
    return _fit("move", points, _solve_move, move_errors, need=3)


def prefill_errors(cost: PrefillCost, points: Sequence[PrefillPoint]) -> Errors:
    return _errors(points, lambda p: cost.time_ns(p.uncached_tokens, p.cached_tokens))


def decode_errors(cost: DecodeCost, points: Sequence[StepPoint]) -> Errors:
    return _errors(points, lambda p: cost.step_ns(p.sequences, p.context_tokens))


def move_errors(cost: MoveCost, points: Sequence[MovePoint]) -> Errors:
    return _errors(points, lambda p: cost.time_ns(p.moved_bytes))


def _errors(points: Sequence[Point], predicted_ns: Callable[[Point], int]) -> Errors:
    assert points
    ratios = [abs(predicted_ns(point) / S / point.seconds - 1) for point in points]
    return Errors(len(points), float(np.mean(ratios)), float(np.quantile(ratios, 0.99)))


def _fit(
    what: str,
    points: Sequence[Point],
    solve: Callable[[Sequence[Point]], Cost],
    errors: Callable[[Cost, Sequence[Point]], Errors],
    *,
    need: int,
) -> Fit[Cost]:
    """``need``: one more than there are coefficients, or nothing is left to leave out."""
    if len(points) < need:
        raise ConfigError(f"{what}: {len(points)} points were measured, at least {need} are needed")
    for point in points:
        if not 0 < point.seconds < float("inf"):
            raise ConfigError(f"{what}: {point} is no measurement; seconds must be positive")
    try:
        cost = solve(points)
    except _Undetermined as error:
        raise ConfigError(
            f"{what}: {len(points)} points do not tell its terms apart: {error}"
        ) from None
    left_out = []
    for index, point in enumerate(points):
        try:
            without = solve([*points[:index], *points[index + 1 :]])
        except _Undetermined as error:
            raise ConfigError(
                f"{what}: all depends on the one point {point}: without it, {error}; measure more "
                "points around it"
            ) from None
        left_out.append(errors(without, [point]).mean)
    return Fit(
        cost,
        errors(cost, points),
        Errors(len(points), float(np.mean(left_out)), float(np.quantile(left_out, 0.99))),
    )


def _solve_prefill(points: Sequence[PrefillPoint]) -> PrefillCost:
    fixed, token, pair = _coefficients(
        [
            (1.0, p.uncached_tokens, p.uncached_tokens * (p.uncached_tokens + 2 * p.cached_tokens))
            for p in points
        ],
        points,
        "let uncached tokens take at least three values, some after cached ones",
    )
    if token == pair == 0:
        raise _Undetermined("more tokens take no longer")
    return PrefillCost(fixed_s=fixed, token_s=token, pair_s=pair)


def _solve_one_regime(points: Sequence[StepPoint]) -> DecodeCost:
    step = _solve_step(points)
    return DecodeCost(small=step, large=step)


def _solve_two_regimes(points: Sequence[StepPoint]) -> DecodeCost:
    best: tuple[float, DecodeCost] | None = None
    for large_from in sorted({point.sequences for point in points})[1:]:
        try:
            cost = DecodeCost(
                small=_solve_step([p for p in points if p.sequences < large_from]),
                large=_solve_step([p for p in points if p.sequences >= large_from]),
                large_from=large_from,
            )
        except _Undetermined:
            continue
        error = sum(
            (cost.step_ns(p.sequences, p.context_tokens) / S / p.seconds - 1) ** 2 for p in points
        )
        if best is None or error < best[0]:
            best = error, cost
    if best is None:
        raise _Undetermined("no batch size splits them into two regimes with enough points each")
    return best[1]


def _solve_step(points: Sequence[StepPoint]) -> StepCost:
    fixed, context, sequence = _coefficients(
        [(1.0, point.context_tokens, point.sequences) for point in points],
        points,
        "let batch and context take several values each, independently",
    )
    return StepCost(fixed_s=fixed, context_s=context, sequence_s=sequence)


def _solve_move(points: Sequence[MovePoint]) -> MoveCost:
    fixed, byte = _coefficients(
        [(1.0, point.moved_bytes) for point in points], points, "let the bytes take several values"
    )
    if byte == 0:
        raise _Undetermined("more bytes take no longer; move more of them")
    return MoveCost(fixed_s=fixed, bytes_per_s=_rounded(1 / byte))


def _coefficients(
    rows: Sequence[tuple[float, ...]], points: Sequence[Point], remedy: str
) -> tuple[float, ...]:
    """Non-negative least squares of relative errors.

    Raises:
        _Undetermined: the rows leave a coefficient open; ``remedy`` is what to measure then.
    """
    seconds_P = np.array([point.seconds for point in points])
    terms_PT = np.array(rows, dtype=np.float64) / seconds_P[:, None]
    scale_T = np.linalg.norm(terms_PT, axis=0)
    if len(rows) < len(rows[0]) or not scale_T.all():
        raise _Undetermined(remedy)
    # Columns of one length: tokens and pairs differ by five orders of magnitude.
    terms_PT = terms_PT / scale_T
    if np.linalg.matrix_rank(terms_PT, tol=1e-6) < len(scale_T):
        raise _Undetermined(remedy)
    best_T, least = np.zeros(len(scale_T)), float(len(points))  # of a model that says 0 s
    for count in range(1, len(scale_T) + 1):
        for chosen in map(list, combinations(range(len(scale_T)), count)):
            found = np.linalg.lstsq(terms_PT[:, chosen], np.ones(len(points)), rcond=None)[0]
            error = float(np.sum((terms_PT[:, chosen] @ found - 1) ** 2))
            if found.min() >= 0 and error < least:
                best_T, least = np.zeros(len(scale_T)), error
                best_T[chosen] = found
    return tuple(_rounded(float(value)) for value in best_T / scale_T)


def _rounded(value: float) -> float:
    """What a person can read in a file; far finer than any measurement."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
