import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import MS, S
from pdserve.ids import RequestId
from pdserve.router.levels import (
    RUNGS,
    Ladder,
    Rung,
    boost_ns,
    boosts_ns,
    level_of,
    quanta_ns,
)
from pdserve.router.places import DEAD_PLACES_MAX, Place
from pdserve.router_config import RouterConfig
from tests.unit.router.entries import entry

LADDER = Ladder.of(RouterConfig(level_count=8), 0.12)


def _rung(*waiting: tuple[str, int]) -> Rung:
    """Of (name, virtual arrival in ms), in the order of their arrival here."""
    rung = Rung()
    for order, (name, virtual_ms) in enumerate(waiting):
        rung.push(entry(name, 1, order=order), virtual_ms * MS)
    return rung


def _names(rung: Rung) -> list[str]:
    return [place[3].id for place in rung]


# ── ladder ───────────────────────────────────────────────────────────────────────────────────────


def test_quanta_double_from_level_to_level_and_rise_evenly_between() -> None:
    quanta = quanta_ns(25 * MS, 4)
    assert quanta[::RUNGS] == (25 * MS, 50 * MS, 100 * MS, 200 * MS)
    ratios = [above / below for below, above in itertools.pairwise(quanta)]
    assert ratios == pytest.approx([2 ** (1 / RUNGS)] * 12)


@pytest.mark.parametrize(
    ("work_ms", "level"), [(0, 0), (25, 0), (26, 1), (50, 1), (51, 2), (3200, 7), (10**6, 7)]
)
def test_a_request_joins_the_first_level_whose_quantum_covers_it(work_ms: int, level: int) -> None:
    assert level_of(LADDER.rung_of(work_ms * MS)) == level


@given(st.integers(1, 10**12), st.integers(1, 16), st.integers(0, 10**16))
def test_a_rung_covers_what_it_holds_and_the_one_before_does_not(
    first_ns: int, level_count: int, work_ns: int
) -> None:
    quanta = quanta_ns(first_ns, level_count)
    ladder = Ladder(quanta, (0,) * len(quanta))
    for work in (work_ns, *(quantum + off for quantum in quanta for off in (-1, 0, 1))):
        rung = ladder.rung_of(work)
        assert rung == 0 or quanta[rung - 1] < work
        assert rung == ladder.last or work <= quanta[rung]


def test_first_come_first_served_is_one_level() -> None:
    ladder = Ladder.of(RouterConfig(policy="fcfs"), 0.12)
    assert ladder.last == 0
    assert ladder.rung_of(10**6 * S) == 0


def test_boosts_fall_from_rung_to_rung_and_are_finite() -> None:
    boosts = LADDER.boosts_ns
    assert list(boosts) == sorted(boosts, reverse=True)
    # 25 ms at γ = 0.12/s: ln(1 / (1 − e^−0.003)) / 0.12 = 5.81 / 0.12 s
    assert boosts[0] == pytest.approx(48.4 * S, rel=1e-2)


def test_a_large_gamma_means_first_come_first_served() -> None:
    assert set(boosts_ns(quanta_ns(25 * MS, 8), gamma_per_s=10**6)) == {0}


def test_a_small_gamma_keeps_its_digits() -> None:
    """For γ·work → 0 the boost is −ln(γ·work) / γ."""
    assert boost_ns(25 * MS, 1e-9) == pytest.approx(24.412145 * 1e9 * S, rel=1e-6)


# ── one rung ─────────────────────────────────────────────────────────────────────────────────────


def test_those_who_come_back_keep_their_order() -> None:
    """D3: by virtual arrival, whoever came back last."""
    rung = _rung(("new", 30))
    rung.push(entry("second", 1, order=-1), 20 * MS)
    rung.push(entry("first", 1, order=-2), 10 * MS)
    assert _names(rung) == ["first", "second", "new"]


def test_at_equal_arrivals_who_came_first_goes_first() -> None:
    assert _names(_rung(("b", 5), ("a", 5))) == ["b", "a"]


def test_one_that_left_may_come_back_to_the_same_place() -> None:
    rung = _rung(("a", 1), ("b", 2), ("c", 3))
    rung.remove(RequestId("b"))
    rung.push(entry("b", 1, order=1), 2 * MS)
    rung.check()
    assert _names(rung) == ["a", "b", "c"]


def test_an_empty_rung_is_walked_to_nobody() -> None:
    rung = _rung(("a", 1))
    rung.remove(RequestId("a"))
    assert list(rung) == []


def test_nobody_waits_twice() -> None:
    rung = _rung(("a", 1))
    with pytest.raises(AssertionError, match="a waits already"):
        rung.push(entry("a", 1), MS)


def test_who_does_not_wait_cannot_leave() -> None:
    with pytest.raises(KeyError):
        _rung().remove(RequestId("a"))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50)), max_size=120))
def test_a_rung_is_a_sorted_list_with_removal(steps: list[tuple[int, int]]) -> None:
    """Model: a dict to (virtual arrival, order). A step adds a name, or removes it if it is
    there."""
    rung, model = Rung(), dict[str, tuple[int, int]]()
    for order, (number, virtual_ms) in enumerate(steps):
        name = RequestId(str(number))
        if name in model:
            rung.remove(name)
            del model[name]
        else:
            rung.push(entry(name, 1, order=order), virtual_ms * MS)
            model[name] = (virtual_ms, order)
        rung.check()
        assert name in rung or name not in model
        assert next(iter(_names(rung)), None) == min(
            model, key=lambda name: model[name], default=None
        )
    assert _names(rung) == sorted(model, key=lambda name: model[name])
    assert len(rung) == len(model)


def test_places_of_those_who_left_do_not_pile_up() -> None:
    rung = _rung(("stays", 0))
    for index in range(1000):
        rung.push(entry(f"r{index}", 1, order=index), (index + 1) * MS)
        rung.remove(RequestId(f"r{index}"))
    assert len(rung._places) <= 2 + DEAD_PLACES_MAX


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many places were looked at."""
    looks: Counter[str] = Counter()
    is_live = Rung._is_live

    def counted(rung: Rung, place: Place) -> bool:
        looks["places"] += 1
        return is_live(rung, place)

    monkeypatch.setattr(Rung, "_is_live", counted)
    return looks


def test_taking_the_head_costs_the_same_from_a_long_rung(looks: Counter[str]) -> None:
    """D6: places looked at per request taken, with 100 and with 3,000 waiting."""
    looks_per_request = []
    for count in (100, 3000):
        rung = _rung(*((f"r{i}", i) for i in range(count)))
        looks.clear()
        while (head := next(iter(rung), None)) is not None:
            rung.remove(head[3].id)
        looks_per_request.append(looks["places"] / count)
    short, long = looks_per_request
    assert long < 1.5 * short


def test_who_left_from_near_the_front_is_not_walked_past(looks: Counter[str]) -> None:
    """As many places are looked at as are found, though half of those in front went."""
    rung = _rung(*((f"r{index}", index) for index in range(500)))
    for index in range(1, 60, 2):
        rung.remove(RequestId(f"r{index}"))
    rung.check()
    looks.clear()
    found = [place[3].id for place in itertools.islice(rung, 30)]
    assert found == [f"r{index}" for index in range(0, 60, 2)]
    assert looks["places"] == 30
