"""The line through a process's memory, and what its interval says."""

import math
import random

import pytest

from bench.soak import fit, student_95


def test_a_straight_line_has_its_slope_and_no_width() -> None:
    slope = fit([(x, 5 + 0.25 * x) for x in range(10)])
    assert slope is not None
    assert slope.per_min == pytest.approx(0.25)
    assert slope.high - slope.low == pytest.approx(0, abs=1e-9)


def test_too_few_points_are_no_line() -> None:
    assert fit([(0, 1), (1, 2)]) is None
    assert fit([(1, 1), (1, 2), (1, 3)]) is None


@pytest.mark.parametrize("true_slope", [0.0, 0.3])
def test_the_interval_has_the_true_slope_in_nineteen_of_twenty_cases(true_slope: float) -> None:
    dice = random.Random(4)
    inside = 0
    for _ in range(400):
        points = [(x / 4, 100 + true_slope * x / 4 + dice.gauss(0, 2)) for x in range(20)]
        slope = fit(points)
        assert slope is not None
        inside += slope.low <= true_slope <= slope.high
    assert 0.92 <= inside / 400 <= 0.98


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (100, 1.984)]
)
def test_quantiles_of_students_t(freedom: int, quantile: float) -> None:
    assert math.isclose(student_95(freedom), quantile, rel_tol=0.01)
