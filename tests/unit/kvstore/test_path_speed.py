"""What a path costs: found from moves of any size, and never absurd."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.kvstore.path_speed import (
    BYTES_PER_S_MAX,
    BYTES_PER_S_MIN,
    FIXED_S_MAX,
    PathCost,
    PathSpeed,
)

BELIEVED = PathCost(fixed_s=0.002, bytes_per_s=1e9)
MB = 1 << 20


def test_nothing_known_is_what_was_believed() -> None:
    assert PathSpeed(BELIEVED).cost == BELIEVED
    assert BELIEVED.time_s(0) == 0.0


@settings(max_examples=40)
@given(st.floats(1e-4, 0.1), st.floats(1e7, 2e10), st.integers(0, 1000))
def test_both_terms_are_found(fixed_s: float, bytes_per_s: float, seed: int) -> None:
    true, speed, random_ = PathCost(fixed_s, bytes_per_s), PathSpeed(BELIEVED), random.Random(seed)
    for _ in range(60):
        size = random_.randrange(1, 64) * MB
        speed.observe(size, true.time_s(size))
    for size in (8 * MB, 64 * MB):
        assert 0.7 < speed.cost.time_s(size) / true.time_s(size) < 1.4
    assert 0.5 < speed.cost.time_s(MB) / true.time_s(MB) < 2  # the smallest, hardly ever seen


def test_moves_of_one_size_are_predicted_well() -> None:
    speed = PathSpeed(BELIEVED)
    for _ in range(30):
        speed.observe(8 * MB, 0.2)
    assert 0.15 < speed.cost.time_s(8 * MB) < 0.25


@given(st.lists(st.tuples(st.integers(1, 1 << 40), st.floats(0, 1e9)), max_size=40))
def test_whatever_is_measured_the_cost_stays_within_bounds(moves: list[tuple[int, float]]) -> None:
    speed = PathSpeed(BELIEVED)
    for size, elapsed_s in moves:
        speed.observe(size, elapsed_s)
        assert 0 <= speed.cost.fixed_s <= FIXED_S_MAX
        slack = 1 + 1e-9
        assert BYTES_PER_S_MIN / slack <= speed.cost.bytes_per_s <= BYTES_PER_S_MAX * slack


def test_one_odd_move_is_no_verdict() -> None:
    speed = PathSpeed(BELIEVED)
    for _ in range(20):
        speed.observe(8 * MB, BELIEVED.time_s(8 * MB))
    speed.observe(8 * MB, 100.0)
    assert speed.cost.time_s(8 * MB) < 2 * BELIEVED.time_s(8 * MB)
