"""What is kept of an array's extremes is what a look at the whole array finds."""

import math

from hypothesis import given
from hypothesis import strategies as st

from pdserve.router.slot_arrays import Largest, Openings, bits_of, slots_of

SLOTS = 5

TIMES_NS = st.sampled_from([0.0, 3.0, 3.0, 7.0, 20.0, math.inf])
CHANGES = st.lists(st.tuples(st.integers(0, SLOTS - 1), TIMES_NS), max_size=30)
ASKED = st.sampled_from(["nothing", "soonest", "next", "bits"])


@given(CHANGES, st.lists(ASKED, min_size=30, max_size=30), st.lists(st.integers(0, 3)))
def test_openings_are_what_the_array_says(
    changes: list[tuple[int, float]], asked: list[str], steps_ns: list[int]
) -> None:
    """Whatever was known, and is therefore mended, when an element changes; time goes on."""
    openings = Openings()
    openings.grow(SLOTS)
    truth, now_ns = [math.inf] * SLOTS, 0
    for number, (slot, opens_ns) in enumerate(changes):
        openings.enter(slot, opens_ns)
        truth[slot] = opens_ns
        now_ns += steps_ns[number] if number < len(steps_ns) else 0
        is_open = [one for one in range(SLOTS) if truth[one] <= now_ns]
        match asked[number]:
            case "soonest":
                assert openings.soonest_ns() == min(truth)
                assert openings.is_another(now_ns, but=slot) == (set(is_open) > {slot}) or (
                    slot not in is_open
                )
            case "next":
                assert openings.next_ns() == sorted(truth)[1]
                if is_open:
                    expected = is_open[0] if len(is_open) == 1 else None
                    assert openings.only_slot(now_ns) == expected
            case "bits":
                assert slots_of(openings.bits(now_ns)).tolist() == is_open
        if number % 3 == 0:
            openings.check()  # which asks for all of it


@given(CHANGES)
def test_openings_survive_growth_and_are_asked_about_the_past(
    changes: list[tuple[int, float]],
) -> None:
    openings = Openings()
    assert openings.soonest_ns() == math.inf
    openings.grow(SLOTS)
    for slot, opens_ns in changes:
        openings.enter(slot, opens_ns)
    before = openings.bits(10)
    openings.grow(2 * SLOTS)
    openings.check()
    assert openings.bits(10) == before
    assert openings.bits(0) == bits_of(openings.opens_ns <= 0)


@given(CHANGES, st.lists(st.booleans(), min_size=30, max_size=30))
def test_the_largest_is_the_first_of_the_largest(
    changes: list[tuple[int, float]], asked: list[bool]
) -> None:
    largest = Largest()
    assert largest.slot() is None
    largest.grow(SLOTS)
    truth = [-math.inf] * SLOTS
    for number, (slot, time_ns) in enumerate(changes):
        truth[slot] = -time_ns
        largest.enter(slot, -time_ns)
        if asked[number]:
            best = max(truth)
            assert largest.slot() == (None if best == -math.inf else truth.index(best))
    largest.check()


def test_figures_are_compared_as_the_array_has_them() -> None:
    """Beyond 2**53 ns, a hundred days, an array has fewer digits than an int."""
    openings = Openings()
    openings.grow(2)
    openings.enter(1, 2**53)
    assert openings.soonest_ns() == 2.0**53
    openings.enter(0, 2**53 + 1)
    openings.check()


def test_the_next_one_is_looked_for_again_once_it_has_moved_on() -> None:
    openings = Openings()
    openings.grow(3)
    for slot, opens_ns in enumerate([1.0, 3.0, 7.0]):
        openings.enter(slot, opens_ns)
    assert openings.next_ns() == 3.0
    openings.enter(1, 20.0)
    assert openings.next_ns() == 7.0
    assert openings.only_slot(6) == 0
    openings.enter(0, 8.0)
    assert openings.soonest_ns() == 7.0
    openings.check()
