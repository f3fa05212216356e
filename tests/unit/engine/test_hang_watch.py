"""A hang is told from a long step by the thread's processor time, and by nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import MS, S
from pdserve.engine.hang_watch import CPU_NS_MIN, HUNG_NS, LOOK_NS_MAX, HangWatch

EVERY_NS = S // 4


def looks(
    watch: HangWatch, count: int, *, step: int | None = 1, cpu_ns: int = 0, child: bool = False
) -> list[bool]:
    """``cpu_ns``: of the thread between two looks."""
    return [
        watch.observe(step, index * cpu_ns, index * EVERY_NS, waits_for_child=child)
        for index in range(1, count + 1)
    ]


def test_a_step_without_processor_time_hangs_after_the_bound() -> None:
    found = looks(HangWatch(), 20)
    # The first look only begins to count.
    assert found.index(True) == HUNG_NS // EVERY_NS
    assert all(found[found.index(True) :])


def test_what_computes_never_hangs_however_long_it_takes() -> None:
    assert not any(looks(HangWatch(), 1000, cpu_ns=CPU_NS_MIN))


def test_between_steps_nothing_hangs() -> None:
    assert not any(looks(HangWatch(), 1000, step=None))


def test_a_step_that_waits_for_a_compiler_does_not_hang() -> None:
    assert not any(looks(HangWatch(), 1000, child=True))


def test_another_step_begins_anew() -> None:
    watch = HangWatch()
    assert not any(
        watch.observe(index // 5, 0, index * EVERY_NS, waits_for_child=False)
        for index in range(1000)
    )


@given(st.integers(LOOK_NS_MAX, 10**6 * S))
def test_whoever_looks_may_have_slept(slept_ns: int) -> None:
    watch = HangWatch()
    watch.observe(1, MS, 0, waits_for_child=False)
    assert not watch.observe(1, MS, slept_ns, waits_for_child=False)
