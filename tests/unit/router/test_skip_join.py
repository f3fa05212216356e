"""Who goes first: by level, by tenant, by class; and who yields."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.clock import MS
from pdserve.messages import ServiceClass
from pdserve.router.entry import Entry
from pdserve.router.orders.skip_join import CLASS_DELAYS_NS, SkipJoin
from pdserve.router.orders.tenants import TAGS_MAX, FairTags
from pdserve.router_config import RouterConfig
from tests.unit.router.entries import come_back, dispatch, entry, names, serve, wait
from tests.unit.router.servers import serve_all

GAMMA_PER_S = 0.12
NEVER_MS = 10**9
"""So late that nobody is rescued."""


def _order(
    *,
    gamma_per_s: float = GAMMA_PER_S,
    weights: dict[str, float] | None = None,
    preempt_ratio: float | None = None,
) -> SkipJoin:
    config = RouterConfig(
        level_count=8,
        rescue_after_ms=float(NEVER_MS),
        tenant_weights=weights or {},
        preempt_ratio=preempt_ratio,
    )
    return SkipJoin(config, gamma_per_s, Counter())


def _one_by_one(order: SkipJoin) -> list[str]:
    """The first, and then the first of the others, and so on."""
    taken = []
    while len(order):
        first = next(order.ranked(0))
        order.remove(first)
        order.forget(first)
        taken.append(str(first.id))
    return taken


# ── levels ───────────────────────────────────────────────────────────────────────────────────────


def test_short_ones_go_before_long_ones_that_came_a_little_earlier() -> None:
    order = _order()
    wait(
        order,
        entry("long", 1500, order=0),
        entry("short", 20, at_ms=1000, order=1),
        entry("middle", 200, at_ms=1000, order=2),
    )
    assert names(order) == ["short", "middle", "long"]


def test_a_long_one_is_overtaken_within_the_difference_of_boosts_and_no_longer() -> None:
    """D1: the bound is a number one can compute, and no sweep has to come round first."""
    order = _order()
    ladder = order.ladder
    window_ms = (ladder.boosts_ns[0] - ladder.boosts_ns[ladder.rung_of(1500 * MS)]) // MS
    wait(
        order,
        entry("long", 1500, order=0),
        entry("early", 20, at_ms=window_ms - 1, order=1),
        entry("late", 20, at_ms=window_ms + 1, order=2),
    )
    assert names(order) == ["early", "long", "late"]


def test_who_has_never_run_is_not_taken_for_starved() -> None:
    """D2: keys are about arrival, so a clock that started long ago changes nothing."""
    long_ago_ms = 10**8
    order = _order()
    wait(
        order,
        entry("long", 1500, at_ms=long_ago_ms, order=0),
        entry("short", 20, at_ms=long_ago_ms + 1, order=1),
    )
    assert names(order, long_ago_ms + 2) == ["short", "long"]


def test_first_come_first_served_is_one_level_where_nobody_yields() -> None:
    order = SkipJoin(RouterConfig(policy="fcfs"), GAMMA_PER_S, Counter())
    long, short = entry("long", 10**4, order=0), entry("short", 1, at_ms=1, order=1)
    wait(order, long, short)
    assert names(order, NEVER_MS) == ["long", "short"]
    assert order.lengths() == (2,)
    assert not order.preempts


def test_gamma_turns_the_order_of_those_who_wait() -> None:
    order = _order(gamma_per_s=1000.0)
    wait(order, entry("long", 1500, order=0), entry("short", 20, at_ms=1000, order=1))
    assert names(order) == ["long", "short"]
    order.set_gamma(GAMMA_PER_S)
    assert names(order) == ["short", "long"]
    order.check()


def test_a_prefix_that_came_or_went_moves_who_waits() -> None:
    order = _order()
    one = entry("one", 1500)
    wait(order, one)
    one.work_ns = 20 * MS  # most of it is in the store now
    order.refresh(one, 0)
    assert (one.level, order.lengths()[0]) == (0, 1)
    one.work_ns = 1500 * MS  # and now it is not
    order.refresh(one, 0)
    assert (one.level, order.lengths()[6]) == (6, 1)
    one.work_ns = 20 * MS
    order.refresh(one, 0)
    assert one.level == 6, "once demoted it does not rise again"
    order.check()


def test_one_that_comes_back_has_its_place_and_its_level() -> None:
    order = _order()
    demoted, other = entry("demoted", 1500, order=0), entry("other", 3000, at_ms=1, order=1)
    wait(order, demoted, other)
    dispatch(order, demoted)
    serve(order, demoted, 1700, left_ms=900)  # more than level 6 gives
    come_back(order, demoted, 5000)
    assert demoted.level == 7
    assert names(order) == ["demoted", "other"]


def test_work_before_a_newcomer_is_that_of_its_rung_and_those_above() -> None:
    order = _order()
    wait(order, entry("a", 20), entry("b", 100, order=1), entry("c", 1500, order=2))
    assert order.work_before_ns(20 * MS) == 20 * MS
    assert order.work_before_ns(150 * MS) == 120 * MS
    assert order.work_before_ns(1600 * MS) == 1620 * MS
    assert _one_by_one(order) == ["a", "b", "c"]
    assert order.work_before_ns(10**6 * MS) == 0


# ── classes ──────────────────────────────────────────────────────────────────────────────────────


def test_a_class_is_a_fixed_advantage_in_time() -> None:
    interactive_ms = -CLASS_DELAYS_NS[ServiceClass.INTERACTIVE] // MS
    batch_ms = CLASS_DELAYS_NS[ServiceClass.BATCH] // MS
    order = _order()
    wait(
        order,
        entry("batch", 20, at_ms=0, order=0, service_class=ServiceClass.BATCH),
        entry("before it", 20, at_ms=batch_ms - 1, order=1),
        entry("behind it", 20, at_ms=batch_ms + 1, order=2),
        entry(
            "chat",
            20,
            at_ms=batch_ms - 2 + interactive_ms,
            order=3,
            service_class=ServiceClass.INTERACTIVE,
        ),
    )
    assert names(order) == ["chat", "before it", "batch", "behind it"]


# ── tenants ──────────────────────────────────────────────────────────────────────────────────────

JOBS = st.lists(
    st.tuples(st.sampled_from((5, 30, 200, 900, 5000)), st.integers(0, 40_000)), max_size=25
)


@given(jobs=JOBS, spent_ms=st.lists(st.integers(1, 10**5), max_size=5))
def test_what_a_tenant_has_used_does_not_turn_its_own_order(
    jobs: list[tuple[int, int]], spent_ms: list[int]
) -> None:
    """Model: a sort by arrival less the rung's boost; its past is charged beforehand."""
    order = _order()
    for number, work_ms in enumerate(spent_ms):
        past = entry(f"past {number}", work_ms, order=-number - 1)
        wait(order, past)
        dispatch(order, past)
        order.forget(past)
    waiting = [
        entry(f"r{number}", work_ms, at_ms=at_ms, order=number)
        for number, (work_ms, at_ms) in enumerate(jobs)
    ]
    wait(order, *waiting)
    order.check()

    def key(one: Entry) -> tuple[int, int]:
        return one.arrived_ns - order.ladder.boosts_ns[one.rung], one.order

    expected = [str(one.id) for one in sorted(waiting, key=key)]
    assert names(order) == expected
    assert _one_by_one(order) == expected


@given(
    jobs=st.lists(
        st.tuples(
            st.sampled_from((5, 30, 200, 5000)), st.integers(0, 40_000), st.sampled_from("uvw")
        ),
        max_size=25,
    ),
    spent_ms=st.dictionaries(st.sampled_from("uvw"), st.integers(1, 10**5)),
)
def test_those_ranked_are_the_next_ones_one_after_the_other(
    jobs: list[tuple[int, int, str]], spent_ms: dict[str, int]
) -> None:
    order = _order()
    for number, (tenant, work_ms) in enumerate(spent_ms.items()):
        past = entry(f"past {number}", work_ms, order=-number - 1, tenant=tenant)
        wait(order, past)
        dispatch(order, past)
        order.forget(past)
    for number, (work_ms, at_ms, tenant) in enumerate(jobs):
        wait(order, entry(f"r{number}", work_ms, at_ms=at_ms, order=number, tenant=tenant))
    order.check()
    assert names(order) == _one_by_one(order)


def _traffic(
    chance: Random, tenant: str, *, busy: float, seconds: int, number_from: int
) -> list[Entry]:
    """Poisson arrivals that keep ``busy`` servers busy."""
    sizes_ms = (50, 100, 200, 1250)
    entries: list[Entry] = []
    at_s = 0.0
    while (at_s := at_s + chance.expovariate(busy / (sum(sizes_ms) / len(sizes_ms) / 1000))) < (
        seconds
    ):
        name = f"{tenant}{len(entries)}"
        work_ms, at_ms = chance.choice(sizes_ms), int(at_s * 1000)
        entries.append(
            entry(name, work_ms, at_ms=at_ms, order=number_from + len(entries), tenant=tenant)
        )
    return entries


def _mean_ms(order: SkipJoin, arrivals: list[Entry], count: int) -> float:
    arrivals = sorted(arrivals, key=lambda one: one.arrived_ns)
    times_ms = [
        served.response_ns / MS
        for served in serve_all(order, arrivals, count)
        if served.entry.request.tenant == "victim"
    ]
    return sum(times_ms) / len(times_ms)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_a_tenant_that_floods_ten_times_its_share_hardly_slows_another(
    load: float, seed: int
) -> None:
    """Four servers for two tenants. One asks for ``load`` of its half; the other for twenty.

    Compared with the first alone on two servers, which is its share: at most 1.25 × the mean.
    """
    chance = Random(seed)
    victim = _traffic(chance, "victim", busy=2 * load, seconds=200, number_from=0)
    flood = _traffic(chance, "flood", busy=20, seconds=60, number_from=10**6)
    alone_ms = _mean_ms(_order(), victim, 2)
    beside_ms = _mean_ms(_order(), [*victim, *flood], 4)
    assert beside_ms <= 1.25 * alone_ms


def test_tenants_that_both_have_work_share_by_their_weights() -> None:
    order = _order(weights={"gold": 3.0})
    arrivals = [
        entry(f"{tenant}{number}", 100, order=2 * number + odd, tenant=tenant)
        for number in range(400)
        for odd, tenant in enumerate(("gold", "lead"))
    ]
    first = serve_all(order, arrivals, 4)[:400]
    gold = sum(served.entry.request.tenant == "gold" for served in first)
    assert gold == pytest.approx(300, abs=4)


def test_a_share_that_was_not_used_is_gone() -> None:
    """An hour of idleness gives no right to an hour of service."""
    order = _order()
    wait(order, entry("early", 100, tenant="busy"))
    dispatch(order, next(order.ranked(0)))
    hour_ms = 3_600_000
    rivals = [
        entry(f"{tenant}{number}", 100, at_ms=hour_ms, order=2 * number + odd, tenant=tenant)
        for number in range(100)
        for odd, tenant in enumerate(("busy", "idle"))
    ]
    served = serve_all(order, rivals, 1)[:40]
    assert sum(one.entry.request.tenant == "idle" for one in served) == pytest.approx(20, abs=1)


def test_tags_of_the_past_are_forgotten() -> None:
    tags = FairTags({})
    for number in range(10 * TAGS_MAX):
        at_ms = 1000 * number
        one = entry(f"r{number}", 10, at_ms=at_ms, tenant=f"t{number}")
        tags.charge(one, [], at_ms * MS)
        assert len(tags._tags_ns) <= TAGS_MAX + 1
    assert tags.tag_ns("t0", 0) == 0


def test_a_tag_in_the_future_is_kept_however_many_there_are() -> None:
    tags = FairTags({})
    tags.charge(entry("flood", 10**6, tenant="flood"), [], 0)
    flood_ns = tags.tag_ns("flood", 0)
    for number in range(10 * TAGS_MAX):
        tags.charge(entry(f"r{number}", 10, tenant=f"t{number}"), [], 0)
    assert tags.tag_ns("flood", 0) == flood_ns > 0


# ── who yields ───────────────────────────────────────────────────────────────────────────────────


def test_it_yields_to_a_key_that_is_better_by_more_than_the_margin() -> None:
    order = _order()
    running, waiting = entry("running", 1500, order=0), entry("waiting", 20, at_ms=100, order=1)
    wait(order, running, waiting)
    dispatch(order, running)
    boosts_ns = order.ladder.boosts_ns
    gain_ns = boosts_ns[waiting.rung] - boosts_ns[running.rung] - 100 * MS
    assert order.yields(running, waiting, gain_ns - 1, 0)
    assert not order.yields(running, waiting, gain_ns, 0)
    assert not order.yields(waiting, running, 0, 0)


def test_what_is_left_of_it_counts_and_not_what_it_was() -> None:
    order = _order()
    running, waiting = entry("running", 1500, order=0), entry("waiting", 100, at_ms=1, order=1)
    wait(order, running, waiting)
    dispatch(order, running)
    assert order.yields(running, waiting, 0, 0)
    serve(order, running, 1450, left_ms=50)
    assert not order.yields(running, waiting, 0, 0)


def test_who_runs_by_its_tenants_right_does_not_yield_to_one_whose_tenant_is_ahead() -> None:
    """Both are as long, and the other came first; but its tenant has had two before."""
    order = _order(preempt_ratio=1.0)
    for number, name in enumerate(("a0", "a1")):
        past = entry(name, 1000, order=-2 * number - 1, tenant="a")
        rival = entry(f"rival of {name}", 1000, order=-2 * number - 2, tenant="b")
        wait(order, past, rival)
        dispatch(order, past)
    running = entry("running", 1000, at_ms=900, order=9, tenant="c")
    waiting = entry("waiting", 1000, at_ms=0, order=2, tenant="a")
    wait(order, running, waiting)
    dispatch(order, running, 900)
    for rival in [one for one in order.ranked(0) if one.request.tenant == "b"]:
        order.remove(rival)
    assert not order.yields(running, waiting, 0, 900 * MS)
    own = entry("own", 1000, at_ms=0, order=3, tenant="c")
    wait(order, own)
    assert order.yields(running, own, 0, 900 * MS), "among its own the tag is no matter"


# ── nothing is left behind ───────────────────────────────────────────────────────────────────────


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("uv"), st.integers(1, 3000)), max_size=30), st.data())
def test_an_order_remembers_nobody_who_was_forgotten(
    jobs: list[tuple[str, int]], data: st.DataObject
) -> None:
    order = _order()
    waiting = [
        entry(f"r{number}", work_ms, order=number, tenant=tenant)
        for number, (tenant, work_ms) in enumerate(jobs)
    ]
    wait(order, *waiting)
    while waiting:
        one = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
        if data.draw(st.booleans()):
            order.dispatched(one, 0)
        order.remove(one)
        order.forget(one)
        order.check()
        assert sum(order.lengths()) == len(order) == len(waiting)
    for kept in (order._standings, order._tenants):
        assert not kept
    assert sum(order._work_ns) == 0


def test_nobody_waits_twice_and_who_does_not_wait_cannot_leave() -> None:
    order = _order()
    one = entry("a", 1)
    wait(order, one)
    with pytest.raises(AssertionError, match="a waits already"):
        wait(order, one)
    dispatch(order, one)
    with pytest.raises(KeyError):
        order.remove(one)
