"""From uses to time and back: what is not known exactly is said to be younger, and to be fewer."""

from bisect import bisect_right

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.kvstore.use_times import LOOKS_MAX, UseTimes


def test_a_use_is_as_old_as_the_first_look_after_it() -> None:
    times = UseTimes(0, 100)
    times.look(10, 200)
    times.look(10, 300)
    times.look(15, 400)
    assert [times.age_ns(use, 500) for use in (0, 1, 10, 11, 15, 16)] == [
        400,
        300,
        300,
        100,
        100,
        0,
    ]
    assert [times.uses_at(at) for at in (0, 100, 199, 200, 399, 400, 900)] == [
        *(0, 0, 0, 10, 10, 15, 15)
    ]


steps = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=LOOKS_MAX + 9)


@settings(max_examples=50, deadline=None)
@given(steps, st.integers(1, 1 << 40))
def test_however_long_it_lasts_the_looks_are_bounded_and_never_flatter(
    steps: list[tuple[int, int]], began_ns: int
) -> None:
    """Between any two uses and moments, against all that ever happened."""
    times = UseTimes(0, began_ns)
    uses, now_ns = [0], [began_ns]
    for more, later_ns in steps:
        uses.append(uses[-1] + more)
        now_ns.append(now_ns[-1] + later_ns)
        times.look(uses[-1], now_ns[-1])
    assert len(times) <= LOOKS_MAX
    end_ns = now_ns[-1]
    for use, at_ns in zip(uses[1::7], now_ns[1::7], strict=True):
        first_ns = now_ns[uses.index(use)]
        assert 0 <= times.age_ns(use, end_ns) <= end_ns - first_ns
        assert times.uses_at(at_ns) <= uses[bisect_right(now_ns, at_ns) - 1]
        assert times.uses_at(end_ns - times.age_ns(use, end_ns)) >= use, "there and back"


def test_of_very_many_looks_the_young_ones_are_kept() -> None:
    times, count = UseTimes(0, 0), 10 * LOOKS_MAX
    for use in range(1, count):
        times.look(use, 100 * use)
        assert len(times) <= LOOKS_MAX
    end_ns = 100 * (count - 1)
    for use in range(1, count):
        age_ns = end_ns - 100 * use
        assert 0.8 * age_ns <= times.age_ns(use, end_ns) <= age_ns
    young = range(count - LOOKS_MAX // 16, count)
    assert [times.uses_at(100 * use) for use in young] == list(young)
