"""Feedback queues: levels, quanta, who yields, and who is promoted."""

import pytest

from pdserve.clock import MS
from pdserve.router.orders.level_lines import LevelHeap, LevelLines, LevelLists
from pdserve.router.orders.mlfq import (
    Defects,
    FeedbackQueue,
    Rules,
    plain,
    published,
    released,
)
from pdserve.router_config import RouterConfig
from tests.unit.router.entries import COSTS, come_back, dispatch, entry, names, serve, wait

CONFIG = RouterConfig(level_count=6, first_quantum_ms=25.0, rescue_after_ms=1000.0)


def mlfq() -> FeedbackQueue:
    return plain(CONFIG, COSTS)


def fastserve() -> FeedbackQueue:
    return published(CONFIG, COSTS)


@pytest.mark.parametrize(
    ("work_ms", "level"), [(0, 0), (25, 0), (26, 1), (50, 1), (51, 2), (800, 5), (10**6, 5)]
)
def test_a_request_skips_to_the_first_level_whose_quantum_covers_it(
    work_ms: int, level: int
) -> None:
    queue, one = fastserve(), entry("one", work_ms)
    wait(queue, one)
    assert one.level == level
    assert queue.lengths()[level] == 1


def test_plain_begins_with_level_0_whatever_the_work() -> None:
    queue, long = mlfq(), entry("long", 5000)
    wait(queue, long)
    assert long.level == 0


def test_plain_falls_one_level_at_a_time_as_quanta_are_used_up() -> None:
    queue, one = mlfq(), entry("one", 5000)
    wait(queue, one)
    dispatch(queue, one)
    levels = []
    for _ in range(8):
        serve(queue, one, 26, left_ms=4000)
        levels.append(one.level)
    assert levels == [1, 1, 2, 2, 2, 2, 3, 3]  # after more than 25, 50, 100, …


def test_nobody_falls_out_of_the_last_level() -> None:
    queue, one = mlfq(), entry("one", 5000)
    wait(queue, one)
    dispatch(queue, one)
    for _ in range(10):
        serve(queue, one, 10_000, left_ms=4000)
    assert one.level == CONFIG.level_count - 1


def test_a_quantum_that_is_just_used_up_is_not_overdrawn() -> None:
    queue, one = fastserve(), entry("one", 25)
    wait(queue, one)
    dispatch(queue, one)
    serve(queue, one, 25, left_ms=1)
    assert one.level == 0


def test_who_runs_yields_to_better_levels_alone() -> None:
    queue = fastserve()
    running, same, better = entry("running", 100), entry("same", 90), entry("better", 20)
    wait(queue, running, same, better)
    dispatch(queue, running)
    assert queue.yields(running, better, 0, 0)
    assert not queue.yields(running, same, 0, 0)
    assert not queue.yields(better, running, 0, 0)


def test_who_was_demoted_yields_to_those_who_stood_there_already() -> None:
    queue = mlfq()
    first, second = entry("first", 500), entry("second", 500, order=1)
    wait(queue, first, second)
    for one in (first, second):
        dispatch(queue, one)
        serve(queue, one, 30, left_ms=470)
    come_back(queue, first, at_ms=60)
    assert queue.key_ns(second, 0) > queue.key_ns(first, 0)
    assert queue.yields(second, first, 0, 0)
    come_back(queue, second, at_ms=60)
    assert names(queue) == ["first", "second"]


def test_who_was_interrupted_within_its_quantum_keeps_its_place() -> None:
    queue = fastserve()
    one, other = entry("one", 100), entry("other", 100, order=1)
    wait(queue, one, other)
    dispatch(queue, one)
    serve(queue, one, 40, left_ms=60)
    come_back(queue, one, at_ms=40)
    assert names(queue) == ["one", "other"]
    assert one.level == 2


def test_the_starved_are_promoted_at_their_instant_who_waited_longest_first() -> None:
    queue = fastserve()
    a, b = entry("a", 300, at_ms=0), entry("b", 300, at_ms=10, order=1)
    short = entry("short", 10, at_ms=900, order=2)
    wait(queue, a, b, short)
    assert names(queue, at_ms=999) == ["short", "a", "b"]
    assert a.level == 4
    assert names(queue, at_ms=1000) == ["short", "a", "b"]
    assert (a.level, b.level) == (0, 4)
    wait(queue, entry("late", 10, at_ms=1000, order=3))
    assert names(queue, at_ms=1010) == ["short", "a", "late", "b"]
    assert queue.lengths() == (4, 0, 0, 0, 0, 0)


def test_plain_promotes_nobody() -> None:
    queue, one = mlfq(), entry("one", 300)
    wait(queue, one)
    dispatch(queue, one)
    serve(queue, one, 30, left_ms=270)
    come_back(queue, one, at_ms=30)
    assert names(queue, at_ms=10**9) == ["one"]
    assert one.level == 1


def test_waiting_is_counted_from_when_it_last_ran() -> None:
    queue, one = fastserve(), entry("one", 300)
    wait(queue, one)
    dispatch(queue, one, at_ms=900)
    come_back(queue, one, at_ms=950)
    assert names(queue, at_ms=1949) == ["one"]
    assert one.level == 4
    assert names(queue, at_ms=1950) == ["one"]
    assert one.level == 0


def test_the_level_follows_the_work_until_the_request_has_run() -> None:
    queue, one = fastserve(), entry("one", 300)
    wait(queue, one, entry("other", 20, order=1))
    one.work_ns = 10 * MS  # a cached prefix was found
    queue.refresh(one, 0)
    assert one.level == 0
    assert names(queue) == ["other", "one"]
    dispatch(queue, one)
    come_back(queue, one, at_ms=1)
    one.work_ns = 300 * MS
    queue.refresh(one, 0)
    assert one.level == 0


def test_defects_are_all_or_each() -> None:
    assert Defects.all().sweeps
    assert Defects.all().head_of_line
    assert not Defects().lists
    rules = Rules(
        first_quantum_ns=MS, level_count=2, skips=True, starvation_ns=None, defects=Defects()
    )
    queue = FeedbackQueue(rules, COSTS)
    wait(queue, entry("a", 50), entry("b", 1, order=1))
    assert names(queue, at_ms=10**9) == ["b", "a"]


def test_the_released_has_no_last_level_to_speak_of() -> None:
    queue, one = released(CONFIG, COSTS), entry("one", 100_000)
    wait(queue, one)
    assert one.level == 14  # 10 ms · 2^14 is 164 s
    queue.check()


@pytest.mark.parametrize("lines", [LevelHeap(), LevelLists()])
def test_both_ways_to_keep_levels_agree(lines: LevelLines) -> None:
    entries = {name: entry(name, 1, order=i) for i, name in enumerate("abcdef")}
    for (name, one), level, place in zip(
        entries.items(), [1, 0, 1, 0, 1, 2], [4, 5, -1, 2, 3, 0], strict=True
    ):
        one.level = level
        assert name == one.id
        lines.push(one, place)
    assert "".join(one.id for one in lines) == "dbceaf"
    lines.remove(entries["b"])
    lines.remove(entries["f"])
    assert "".join(one.id for one in lines) == "dcea"
