import itertools
from bisect import bisect_left
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import MS, S
from pdserve.ids import RequestId
from pdserve.router.levels import (
    Ladder,
    Level,
    boost_ns,
    boosts_ns,
    quanta_ns,
)
from pdserve.router.places import DEAD_PLACES_MAX, Place
from pdserve.router_config import RouterConfig
from tests.unit.router.entries import entry

LADDER = Ladder.of(RouterConfig(level_count=8), 0.12)


def _level(*waiting: tuple[str, int]) -> Level:
    """Of (name, virtual arrival in ms), in the order of their arrival here."""
    level = Level()
    for order, (name, virtual_ms) in enumerate(waiting):
        level.push(entry(name, 1, order=order), virtual_ms * MS)
    return level


def _names(level: Level) -> list[str]:
    return [place[3].id for place in level]


# ── ladder ───────────────────────────────────────────────────────────────────────────────────────


def test_quanta_double() -> None:
    assert quanta_ns(25 * MS, 4) == (25 * MS, 50 * MS, 100 * MS, 200 * MS)


@pytest.mark.parametrize(
    ("work_ms", "level"), [(0, 0), (25, 0), (26, 1), (50, 1), (51, 2), (3200, 7), (10**6, 7)]
)
def test_a_request_joins_the_first_level_whose_quantum_covers_it(work_ms: int, level: int) -> None:
    assert LADDER.level_of(work_ms * MS) == level


@given(
    st.integers(1, 10**12),
    st.integers(1, 16),
    st.integers(0, 10**16),
    st.sampled_from((-1, 0, 1)),
)
def test_the_level_is_that_of_a_walk_along_the_quanta(
    first_ns: int, level_count: int, work_ns: int, off: int
) -> None:
    quanta = quanta_ns(first_ns, level_count)
    ladder = Ladder(quanta, (0,) * level_count)
    for work in (work_ns, *(quantum + off for quantum in quanta)):  # and at every border
        assert ladder.level_of(work) == min(bisect_left(quanta, work), level_count - 1)


def test_first_come_first_served_is_one_level() -> None:
    ladder = Ladder.of(RouterConfig(policy="fcfs"), 0.12)
    assert ladder.last == 0
    assert ladder.level_of(10**6 * S) == 0


def test_boosts_fall_from_level_to_level_and_are_finite() -> None:
    boosts = LADDER.boosts_ns
    assert list(boosts) == sorted(boosts, reverse=True)
    # 25 ms at γ = 0.12/s: ln(1 / (1 − e^−0.003)) / 0.12 = 5.81 / 0.12 s
    assert boosts[0] == pytest.approx(48.4 * S, rel=1e-2)


def test_a_large_gamma_means_first_come_first_served() -> None:
    assert set(boosts_ns(quanta_ns(25 * MS, 8), gamma_per_s=10**6)) == {0}


def test_a_small_gamma_keeps_its_digits() -> None:
    """For γ·work → 0 the boost is −ln(γ·work) / γ."""
    assert boost_ns(25 * MS, 1e-9) == pytest.approx(24.412145 * 1e9 * S, rel=1e-6)


# ── one level ────────────────────────────────────────────────────────────────────────────────────


def test_those_who_come_back_keep_their_order() -> None:
    """D3: by virtual arrival, whoever came back last."""
    level = _level(("new", 30))
    level.push(entry("second", 1, order=-1), 20 * MS)
    level.push(entry("first", 1, order=-2), 10 * MS)
    assert _names(level) == ["first", "second", "new"]


def test_at_equal_arrivals_who_came_first_goes_first() -> None:
    assert _names(_level(("b", 5), ("a", 5))) == ["b", "a"]


def test_one_that_left_may_come_back_to_the_same_place() -> None:
    level = _level(("a", 1), ("b", 2), ("c", 3))
    level.remove(RequestId("b"))
    level.push(entry("b", 1, order=1), 2 * MS)
    level.check()
    assert _names(level) == ["a", "b", "c"]


def test_an_empty_level_is_walked_to_nobody() -> None:
    level = _level(("a", 1))
    level.remove(RequestId("a"))
    assert list(level) == []


def test_nobody_waits_twice() -> None:
    level = _level(("a", 1))
    with pytest.raises(AssertionError, match="a waits already"):
        level.push(entry("a", 1), MS)


def test_who_does_not_wait_cannot_leave() -> None:
    with pytest.raises(KeyError):
        _level().remove(RequestId("a"))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50)), max_size=120))
def test_a_level_is_a_sorted_list_with_removal(steps: list[tuple[int, int]]) -> None:
    """Model: a dict to (virtual arrival, order). A step adds a name, or removes it if it is
    there."""
    level, model = Level(), dict[str, tuple[int, int]]()
    for order, (number, virtual_ms) in enumerate(steps):
        name = RequestId(str(number))
        if name in model:
            level.remove(name)
            del model[name]
        else:
            level.push(entry(name, 1, order=order), virtual_ms * MS)
            model[name] = (virtual_ms, order)
        level.check()
        assert name in level or name not in model
        assert next(iter(_names(level)), None) == min(
            model, key=lambda name: model[name], default=None
        )
    assert _names(level) == sorted(model, key=lambda name: model[name])
    assert len(level) == len(model)


def test_places_of_those_who_left_do_not_pile_up() -> None:
    level = _level(("stays", 0))
    for index in range(1000):
        level.push(entry(f"r{index}", 1, order=index), (index + 1) * MS)
        level.remove(RequestId(f"r{index}"))
    assert len(level._places) <= 2 + DEAD_PLACES_MAX


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many places were looked at."""
    looks: Counter[str] = Counter()
    is_live = Level._is_live

    def counted(level: Level, place: Place) -> bool:
        looks["places"] += 1
        return is_live(level, place)

    monkeypatch.setattr(Level, "_is_live", counted)
    return looks


def test_taking_the_head_costs_the_same_from_a_long_level(looks: Counter[str]) -> None:
    """D6: places looked at per request taken, with 100 and with 3,000 waiting."""
    looks_per_request = []
    for count in (100, 3000):
        level = _level(*((f"r{i}", i) for i in range(count)))
        looks.clear()
        while (head := next(iter(level), None)) is not None:
            level.remove(head[3].id)
        looks_per_request.append(looks["places"] / count)
    short, long = looks_per_request
    assert long < 1.5 * short


def test_who_left_from_near_the_front_is_not_walked_past(looks: Counter[str]) -> None:
    """As many places are looked at as are found, though half of those in front went."""
    level = _level(*((f"r{index}", index) for index in range(500)))
    for index in range(1, 60, 2):
        level.remove(RequestId(f"r{index}"))
    level.check()
    looks.clear()
    found = [place[3].id for place in itertools.islice(level, 30)]
    assert found == [f"r{index}" for index in range(0, 60, 2)]
    assert looks["places"] == 30
