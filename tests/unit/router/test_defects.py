"""The twelve defects of FastServe's released code, one test each.

Each shows the defect in ``fastserve_released`` and its absence in ``fastserve``, which is the same
queue as the paper has it; where the paper says nothing, its absence in our own order or core. Two
are not an order's: D11 is about admission, and half of D12 about the cluster.
"""

import time
from collections import Counter
from dataclasses import dataclass
from typing import cast

from pdserve.clock import MS
from pdserve.ids import RequestId
from pdserve.router.entry import Entry
from pdserve.router.orders.base import Order
from pdserve.router.orders.level_lines import LevelHeap, LevelLines, LevelLists
from pdserve.router.orders.mlfq import published, released
from pdserve.router.orders.skip_join import SkipJoin
from pdserve.router_config import RouterConfig
from tests.unit.router import build
from tests.unit.router.entries import COSTS, come_back, dispatch, entry, names, serve, wait

ALPHA_MS = 3000
CONFIG = RouterConfig(first_quantum_ms=25.0, level_count=12, rescue_after_ms=float(ALPHA_MS))


def as_released() -> Order:
    return released(CONFIG, COSTS)


def as_published() -> Order:
    return published(CONFIG, COSTS)


def ours() -> SkipJoin:
    return SkipJoin(RouterConfig(), 0.1, Counter())


def iterate(order: Order, count: int, *, at_ms: int) -> None:
    """So many chunks of somebody else."""
    other = entry("other", 1, at_ms=at_ms, order=10**6)
    wait(order, other)
    dispatch(order, other, at_ms)
    for _ in range(count - 1):
        serve(order, other, 0, left_ms=1, at_ms=at_ms)
    order.forget(other)


def first(order: Order, at_ms: int) -> str:
    return str(next(order.ranked(at_ms * MS)).id)


def ran_and_waits(
    order: Order, name: str, work_ms: int, *, used_ms: int, at_ms: int, number: int
) -> Entry:
    """One that ran for a while within its quantum and waits again."""
    one = entry(name, work_ms, order=number)
    wait(order, one)
    dispatch(order, one)
    serve(order, one, used_ms, left_ms=work_ms - used_ms)
    come_back(order, one, at_ms)
    return one


def test_d1_starvation_ends_at_its_instant_and_not_at_the_next_sweep() -> None:
    late, exact = as_released(), as_published()
    longs = []
    for order in (late, exact):
        # Two iterations each.
        longs.append(ran_and_waits(order, "long", 2000, used_ms=5, at_ms=0, number=0))
        wait(order, entry("short", 8, at_ms=ALPHA_MS - 1, order=1))
        assert first(order, ALPHA_MS - 1) == "short"
    for order in (late, exact):
        next(order.ranked(ALPHA_MS * MS))
    assert [long.level for long in longs] == [8, 0]
    iterate(late, 997, at_ms=30_000)
    assert first(late, 30_000) == "short"
    iterate(late, 1, at_ms=30_000)  # the 1,000th
    next(late.ranked(30_000 * MS))
    assert longs[0].level == 0


def test_d2_who_has_never_run_is_not_starved_for_that() -> None:
    for order, level in ((as_released(), 0), (as_published(), 7)):
        just_came = entry("just came", 2000, at_ms=10_000)
        wait(order, just_came)
        iterate(order, 1000, at_ms=10_001)
        assert first(order, 10_001) == "just came"
        assert just_came.level == level


def test_d3_the_starved_keep_their_order() -> None:
    for order, expected in ((as_released(), "c"), (as_published(), "a")):
        wait(order, *(entry(name, 2000, order=number) for number, name in enumerate("abc")))
        iterate(order, 1000, at_ms=4000)
        assert first(order, 4000) == expected


def test_d4_a_promotion_comes_with_a_fresh_account() -> None:
    for order, level in ((as_released(), 1), (as_published(), 0)):
        one = ran_and_waits(order, "one", 2000, used_ms=300, at_ms=0, number=0)
        iterate(order, 1000, at_ms=4000)
        assert first(order, 4000) == "one"
        assert one.level == 0
        dispatch(order, one, 4000)
        serve(order, one, 2, left_ms=1698, at_ms=4002)  # of a quantum of 10 or 25 ms
        assert one.level == level


def test_d5_levels_tell_times_apart_and_do_not_count_iterations() -> None:
    """Two chunks of 12 and two of 20 ms, either longer than the released first quantum."""
    for order, levels in ((as_released(), (1, 1)), (as_published(), (0, 1))):
        fast, slow = entry("fast", 8), entry("slow", 8, order=1)
        wait(order, fast, slow)
        for one, chunk_ms in ((fast, 12), (slow, 20)):
            dispatch(order, one)
            serve(order, one, chunk_ms, left_ms=8)
            serve(order, one, chunk_ms, left_ms=8)
        assert (fast.level, slow.level) == levels


@dataclass(slots=True)
class Standing:
    """As much of an entry as stands in a line."""

    order: int
    level: int = 0

    @property
    def id(self) -> RequestId:
        return RequestId(f"r{self.order}")


def rotation_ns(lines: LevelLines, count: int) -> int:
    """CPU time to take the first of so many and put it back at the front; the best of some."""
    entries = [cast(Entry, Standing(order)) for order in range(count)]
    for place, one in enumerate(entries):
        lines.push(one, place)
    times_ns = []
    for _ in range(20):
        began_ns = time.process_time_ns()
        for _ in range(20):
            lines.remove(entries[0])
            lines.push(entries[0], 0)
        times_ns.append(time.process_time_ns() - began_ns)
    return min(times_ns)


def test_d6_taking_the_first_costs_the_same_from_a_long_queue() -> None:
    of_lists, of_heap = (
        rotation_ns(kind(), 20_000) / rotation_ns(kind(), 50) for kind in (LevelLists, LevelHeap)
    )
    assert of_heap < of_lists / 2, f"20,000 cost {of_heap} and {of_lists} times as much as 50"


def test_d7_a_demotion_goes_to_the_level_of_what_is_left() -> None:
    for order, level in ((as_released(), 1), (as_published(), 5)):
        one = entry("mistaken", 8)  # by the prediction
        wait(order, one)
        dispatch(order, one)
        serve(order, one, 30, left_ms=800)
        assert one.level == level


def test_d8_what_is_cached_is_no_work() -> None:
    for order, level in ((as_released(), 7), (as_published(), 0)):
        warm = entry("warm", 10, cached_tokens=990)
        wait(order, warm)
        assert warm.level == level


def test_d9_who_was_demoted_goes_behind_those_who_stand_there() -> None:
    for order, of_level_1_ms, expected in (
        (as_released(), 18, "demoted"),
        (as_published(), 40, "stands"),
    ):
        demoted = entry("demoted", 8)
        wait(order, demoted, entry("stands", of_level_1_ms, order=1))
        dispatch(order, demoted)
        serve(order, demoted, 30, left_ms=8, at_ms=30)
        come_back(order, demoted, 30)
        assert order.lengths()[:2] == (0, 2)
        assert first(order, 30) == expected


def test_d10_those_behind_one_that_does_not_fit_are_seen() -> None:
    for order, seen in (
        (as_released(), ["long"]),
        (as_published(), ["long", "short"]),
        (ours(), ["long", "short"]),
    ):
        wait(order, entry("long", 4000), entry("short", 3900, order=1))
        assert names(order) == seen


def test_d11_admission_goes_on_until_memory_is_full_and_then_says_so() -> None:
    """In our core; the released one stops without a word when a tenth of the blocks is left."""
    core, (_, decode) = build.core_with(build.hello("p0"), build.hello("d0", block_count=100))
    decode.report(free_blocks=9)
    fits = core.on_submit(build.request("fits", 32), build.NOW)
    assert build.told(fits) == ["p0 <- dispatch fits, decode d0, level 1, queued 0 ms"]
    full = core.on_submit(build.request("full", 9 * 16), build.NOW)
    assert build.told(full) == []  # it waits
    [refused] = build.told(core.on_submit(build.request("hopeless", 1700), build.NOW))
    assert "refused hopeless/0: This model's maximum context length is 1600" in refused


def test_d12_a_tenant_that_floods_does_not_hold_up_another() -> None:
    for order, expected in ((as_released(), "a1"), (ours(), "b0")):
        flood = [entry(f"a{i}", 100, order=i, tenant="a") for i in range(10)]
        wait(order, *flood, entry("b0", 100, order=10, tenant="b"))
        dispatch(order, flood[0])
        assert first(order, 0) == expected


def test_d12_all_workers_draw_from_one_queue() -> None:
    core, _ = build.core_with(build.hello("p0"), build.hello("p1"), build.hello("d0"))
    commands = [
        *core.on_submit(build.request("r0", 200), build.NOW),
        *core.on_submit(build.request("r1", 200), build.NOW),
    ]
    assert {line.split()[0] for line in build.told(commands)} == {"p0", "p1"}
