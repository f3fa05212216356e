import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import MS, S
from pdserve.config import RouterConfig
from pdserve.ids import RequestId
from pdserve.router import levels
from pdserve.router.levels import Ladder, LevelQueue, boosts_ns, quanta_ns

LADDER = Ladder.of(RouterConfig())


def _queue(*waiting: tuple[str, int, int], ladder: Ladder = LADDER) -> LevelQueue:
    """Of (name, virtual arrival in ms, level), in the order of their arrival here."""
    queue = LevelQueue(ladder)
    for order, (name, virtual_ms, level) in enumerate(waiting):
        queue.push(RequestId(name), virtual_ns=virtual_ms * MS, order=order, level=level)
    return queue


def test_quanta_double() -> None:
    assert quanta_ns(25 * MS, 4) == (25 * MS, 50 * MS, 100 * MS, 200 * MS)


@pytest.mark.parametrize(
    ("work_ms", "level"), [(0, 0), (25, 0), (26, 1), (50, 1), (51, 2), (3200, 7), (10**6, 7)]
)
def test_a_request_joins_the_first_level_whose_quantum_covers_it(work_ms: int, level: int) -> None:
    assert LADDER.level_of(work_ms * MS) == level


def test_first_come_first_served_is_one_level() -> None:
    ladder = Ladder.of(RouterConfig(policy="fcfs"))
    assert ladder.last == 0
    assert ladder.level_of(10**6 * S) == 0


def test_boosts_fall_from_level_to_level_and_are_finite() -> None:
    boosts = LADDER.boosts_ns
    assert list(boosts) == sorted(boosts, reverse=True)
    # 25 ms at γ = 0.12/s: ln(1 / (1 − e^−0.003)) / 0.12 = 5.81 / 0.12 s
    assert boosts[0] == pytest.approx(48.4 * S, rel=1e-2)


def test_a_large_gamma_means_first_come_first_served() -> None:
    assert set(boosts_ns(quanta_ns(25 * MS, 8), gamma_per_s=10**6)) == {0}


def test_short_ones_go_before_long_ones_that_came_a_little_earlier() -> None:
    queue = _queue(("long", 0, 6), ("short", 1000, 0), ("middle", 1000, 3))
    assert list(queue.in_order()) == ["short", "middle", "long"]


def test_a_long_one_is_overtaken_within_the_difference_of_boosts_and_no_longer() -> None:
    """D1: the bound is a number one can compute, and no sweep has to come round first."""
    window_ms = (LADDER.boosts_ns[0] - LADDER.boosts_ns[6]) // MS
    queue = _queue(("long", 0, 6), ("early", window_ms - 1, 0), ("late", window_ms + 1, 0))
    assert list(queue.in_order()) == ["early", "long", "late"]


def test_who_has_never_run_is_not_taken_for_starved() -> None:
    """D2: keys are about arrival, so a clock that started long ago changes nothing."""
    long_ago = 10**12
    queue = _queue(("long", long_ago, 6), ("short", long_ago + 1, 0))
    assert list(queue.in_order()) == ["short", "long"]


def test_those_who_come_back_keep_their_order() -> None:
    """D3: by virtual arrival, whoever came back last."""
    queue = _queue(("new", 30, 2))
    queue.push(RequestId("second"), virtual_ns=20 * MS, order=1, level=2)
    queue.push(RequestId("first"), virtual_ns=10 * MS, order=0, level=2)
    assert list(queue.in_order()) == ["first", "second", "new"]


def test_at_equal_keys_who_came_first_goes_first() -> None:
    assert list(_queue(("b", 5, 1), ("a", 5, 1)).in_order()) == ["b", "a"]


def test_one_that_left_may_come_back_to_the_same_level() -> None:
    queue = _queue(("a", 1, 0), ("b", 2, 0), ("c", 3, 0))
    queue.remove(RequestId("b"))
    queue.push(RequestId("b"), virtual_ns=2 * MS, order=1, level=0)
    queue.check()
    assert list(queue.in_order()) == ["a", "b", "c"]


def test_nobody_waits_twice() -> None:
    queue = _queue(("a", 1, 0))
    with pytest.raises(AssertionError, match="a waits already"):
        queue.push(RequestId("a"), virtual_ns=MS, order=1, level=3)


def test_who_does_not_wait_cannot_leave() -> None:
    with pytest.raises(KeyError):
        _queue().remove(RequestId("a"))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50), st.integers(0, 7)), max_size=120))
def test_the_queue_is_a_sorted_list_with_removal(
    steps: list[tuple[int, int, int]],
) -> None:
    """Model: a dict of (key, order). A step adds a name, or removes it if it is there."""
    queue, model = LevelQueue(LADDER), dict[str, tuple[int, int]]()
    for order, (number, virtual_ms, level) in enumerate(steps):
        name = RequestId(str(number))
        if name in model:
            queue.remove(name)
            del model[name]
        else:
            queue.push(name, virtual_ns=virtual_ms * MS, order=order, level=level)
            model[name] = (LADDER.key_ns(virtual_ms * MS, level), order)
        queue.check()
    assert list(queue.in_order()) == sorted(model, key=lambda name: model[name])
    assert len(queue) == len(model)


def test_taking_the_head_costs_the_same_from_a_long_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """D6: places looked at per request taken, with 100 and with 3,000 waiting."""
    looks = 0
    is_live = levels._Level._is_live

    def counted(level: levels._Level, place: levels._Place) -> bool:
        nonlocal looks
        looks += 1
        return is_live(level, place)

    monkeypatch.setattr(levels._Level, "_is_live", counted)
    looks_per_request = []
    for count in (100, 3000):
        queue, looks = _queue(*((f"r{i}", i, 0) for i in range(count))), 0
        while len(queue):
            queue.remove(next(queue.in_order()))
        looks_per_request.append(looks / count)
    short, long = looks_per_request
    assert long < 1.5 * short
