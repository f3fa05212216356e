"""γ-Boost: exact boosts with a floor, and γ from the tail of the waits."""

import math
import random

import pytest

from pdserve.clock import MS, S
from pdserve.router.levels import boost_ns
from pdserve.router.orders.boost import (
    GAMMA_MAX_PER_S,
    GAMMA_MIN_PER_S,
    GAMMA_START_PER_S,
    REFIT_EVERY,
    WAITS_MAX,
    FixedGamma,
    GammaBoost,
    TailGamma,
    fitted_gamma_per_s,
)
from pdserve.router.orders.table import order_of
from pdserve.router_config import RouterConfig
from tests.unit.router.entries import COSTS, dispatch, entry, names, wait


def boosted(gamma_per_s: float, floor_ms: int = 25) -> GammaBoost:
    return GammaBoost(FixedGamma(gamma_per_s), floor_ns=floor_ms * MS)


def test_a_long_one_is_overtaken_within_the_difference_of_boosts_and_no_longer() -> None:
    order = boosted(0.1)
    window_ms = (boost_ns(100 * MS, 0.1) - boost_ns(2000 * MS, 0.1)) // MS
    wait(order, entry("long", 2000))
    wait(order, entry("early", 100, at_ms=window_ms - 1, order=1))
    wait(order, entry("late", 100, at_ms=window_ms + 1, order=2))
    assert names(order) == ["early", "long", "late"]


def test_less_work_than_the_floor_is_boosted_no_more() -> None:
    order = boosted(0.1)
    wait(order, entry("floor", 25), entry("tiny", 1, at_ms=1, order=1))
    assert names(order) == ["floor", "tiny"]


def test_a_large_gamma_is_first_come_first_served() -> None:
    order = boosted(10**6)
    wait(order, entry("long", 5000), entry("short", 1, at_ms=1, order=1))
    assert names(order) == ["long", "short"]


@pytest.mark.parametrize("gamma_per_s", [0.01, 0.2, 3.0])
def test_the_decay_of_an_exponential_tail_is_found(gamma_per_s: float) -> None:
    count = 20_000
    waits = [round(-math.log(1 - (i + 0.5) / count) / gamma_per_s * S) for i in range(count)]
    assert fitted_gamma_per_s(waits) == pytest.approx(gamma_per_s, rel=0.01)


def test_the_fit_stays_within_its_limits() -> None:
    assert fitted_gamma_per_s([5 * S] * 100) == GAMMA_MAX_PER_S
    assert fitted_gamma_per_s([0]) == GAMMA_MAX_PER_S
    assert fitted_gamma_per_s([0] * 97 + [10**5 * S] * 3) == GAMMA_MIN_PER_S


def test_gamma_is_refitted_now_and_then_to_the_last_waits() -> None:
    gamma, chance = TailGamma(), random.Random(1)
    for _ in range(REFIT_EVERY - 1):
        gamma.observe(round(chance.expovariate(2.0) * S))
    assert gamma.gamma_per_s == GAMMA_START_PER_S
    for _ in range(3 * WAITS_MAX):
        gamma.observe(round(chance.expovariate(2.0) * S))
    assert gamma.gamma_per_s == pytest.approx(2.0, rel=0.4)
    for _ in range(WAITS_MAX + REFIT_EVERY):
        gamma.observe(3 * S)
    assert gamma.gamma_per_s == GAMMA_MAX_PER_S


def test_keys_follow_a_gamma_that_moved() -> None:
    gamma = FixedGamma(0.01)
    order = GammaBoost(gamma, floor_ns=25 * MS)
    wait(order, entry("long", 2000), entry("short", 100, at_ms=5000, order=1))
    assert names(order) == ["short", "long"]
    gamma.gamma_per_s = 10.0
    assert names(order) == ["long", "short"]
    order.check()


def test_the_setting_fixes_gamma_and_without_it_waits_are_fitted() -> None:
    fixed = order_of(RouterConfig(policy="gamma_boost", gamma_per_s=10.0), COSTS)
    fitted = order_of(RouterConfig(policy="gamma_boost"), COSTS)
    for order, first in ((fixed, "long"), (fitted, "short")):
        for index in range(REFIT_EVERY // 2):
            one = entry(f"r{index}", 10, order=index)
            wait(order, one)
            dispatch(order, one, at_ms=1000)
        wait(order, entry("long", 2000, order=900), entry("short", 100, at_ms=5000, order=901))
        assert names(order)[0] == first
