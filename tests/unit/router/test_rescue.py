"""Nobody waits beyond a stated bound, and the price of that is capped. Whatever arrives."""

from collections import Counter
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdserve.clock import MS, S
from pdserve.messages import ServiceClass
from pdserve.router.entry import Entry
from pdserve.router.orders.rescue import DEAD_CLAIMS_MAX, PIECE_MAX_NS, Rescue
from pdserve.router.orders.skip_join import SkipJoin
from pdserve.router_config import RouterConfig
from tests.unit.router.entries import come_back, dispatch, entry, names, serve, wait
from tests.unit.router.servers import Served, serve_all

WINDOW_NS = 60 * S


def _order(
    *, after_ms: float = 1000, ratio: float = 2, share: float = 0.1, gamma_per_s: float = 0.01
) -> SkipJoin:
    config = RouterConfig(rescue_after_ms=after_ms, rescue_ratio=ratio, rescue_share=share)
    return SkipJoin(config, gamma_per_s, Counter())


def _rescue(*, share: float = 0.1) -> Rescue:
    """Of one worker; due after a second and twice the work."""
    return Rescue(after_ns=1 * S, ratio=2, share=share)


def _name(one: Entry | None) -> str | None:
    return None if one is None else str(one.id)


# ── claims ───────────────────────────────────────────────────────────────────────────────────────


def test_a_claim_is_due_after_the_wait_and_the_ratio_of_its_own_work() -> None:
    order = _order()
    wait(order, entry("long", 500, order=0), entry("short", 5, at_ms=1500, order=1))
    assert names(order, 1999) == ["short", "long"]
    assert names(order, 2000) == ["long", "short"]


def test_a_claim_does_not_leave_its_level() -> None:
    """If its turn comes there first, so much the better: it costs no credit."""
    order = _order()
    first, second = entry("first", 500, order=0), entry("second", 500, at_ms=1, order=1)
    wait(order, first, second)
    assert names(order, 5000) == ["first", "second"]
    assert sum(order.lengths()) == 2
    dispatch(order, first, 5000)
    order.check()
    wait(order, entry("short", 5, at_ms=5000, order=2))
    assert names(order, 5000) == ["second", "short"], "the first one was not paid for"


def test_one_that_was_rescued_is_paid_for_before_the_next_is() -> None:
    rescue = _rescue(share=0.1)
    first, second = entry("first", 500), entry("second", 500, order=1)
    for one in (first, second):
        rescue.add(one)
    assert _name(rescue.head(2 * S)) == "first"
    rescue.pay(first)
    rescue.remove(first.id)
    # 500 ms of work at a tenth of a worker are 5 s.
    assert rescue.head(7 * S - 1) is None
    assert _name(rescue.head(7 * S)) == "second"


def test_idleness_gives_no_credit() -> None:
    rescue = _rescue(share=0.1)
    hour_ms = 3_600_000
    first = entry("first", 500, at_ms=hour_ms)
    second = entry("second", 500, at_ms=hour_ms, order=1)
    rescue.add(first)
    rescue.add(second)
    now_ns = hour_ms * MS + 2 * S
    assert _name(rescue.head(now_ns)) == "first"
    rescue.pay(first)
    rescue.remove(first.id)
    assert rescue.head(now_ns + 5 * S - 1) is None


def test_what_is_earned_while_no_server_is_free_is_not_lost_but_it_is_bounded() -> None:
    """A claim waits for a server for a second: the next one has its credit 5 − 1 s later."""
    for waited_ns, saved_ns in ((1 * S, 1 * S), (1000 * S, PIECE_MAX_NS)):
        rescue = _rescue(share=0.1)
        first, second = entry("first", 500), entry("second", 500, order=1)
        rescue.add(first)
        rescue.add(second)
        assert _name(rescue.head(2 * S)) == "first"
        at_ns = 2 * S + waited_ns
        assert _name(rescue.head(at_ns)) == "first"
        rescue.pay(first)
        rescue.remove(first.id)
        assert rescue.head(at_ns + 5 * S - saved_ns - 1) is None
        assert _name(rescue.head(at_ns + 5 * S - saved_ns)) == "second"


def test_more_workers_rescue_faster() -> None:
    rescue = _rescue(share=0.1)
    rescue.set_workers(10)
    first, second = entry("first", 500), entry("second", 500, order=1)
    rescue.add(first)
    rescue.add(second)
    assert _name(rescue.head(2 * S)) == "first"
    rescue.pay(first)
    rescue.remove(first.id)
    assert _name(rescue.head(2 * S + 500 * MS)) == "second"


def test_who_does_not_wait_has_no_claim() -> None:
    rescue = _rescue()
    one = entry("one", 500)
    rescue.add(one)
    rescue.remove(one.id)
    assert rescue.head(100 * S) is None
    assert rescue.bound_ns(one.id) is None
    with pytest.raises(KeyError):
        rescue.remove(one.id)


def test_one_that_comes_back_late_has_its_claim_at_once() -> None:
    order = _order()
    long = entry("long", 500, order=0)
    wait(order, long)
    dispatch(order, long)
    serve(order, long, 100, left_ms=400)
    come_back(order, long, 10_000)
    wait(order, entry("short", 5, at_ms=10_000, order=1))
    assert names(order, 10_000) == ["long", "short"]


def test_nobody_yields_to_a_claim_and_who_was_rescued_yields_to_nobody() -> None:
    order = _order()
    running, waiting = entry("running", 100, at_ms=5000, order=1), entry("waiting", 500, order=0)
    wait(order, running, waiting)
    dispatch(order, running, 100)
    assert order.rescued(2000 * MS) is waiting
    assert not order.yields(running, waiting, 0, 2000 * MS)

    order = _order()
    wait(order, entry("short", 5, at_ms=5000, order=1), waiting)
    dispatch(order, waiting, 5000)  # out of turn
    tiny = entry("tiny", 1, at_ms=5000, order=2)
    wait(order, tiny)
    assert not order.yields(waiting, tiny, 0, 5000 * MS)


def test_one_that_is_due_is_not_taken_back_before_anything_of_it_is_computed() -> None:
    """Found by ``tests.simulation``: its turn had come before its claim was served, again and again
    somebody shorter was sent in its place, and each time its claim was the youngest of all."""
    order = _order()
    long, tiny = entry("long", 500, order=0), entry("tiny", 1, at_ms=1999, order=1)
    wait(order, long)
    dispatch(order, long, 100)  # in its turn: due at 2000
    wait(order, tiny)
    assert order.yields(long, tiny, 0, 1999 * MS)
    assert not order.yields(long, tiny, 0, 2000 * MS)
    long.begun = True
    assert order.yields(long, tiny, 0, 2000 * MS), "at a chunk's border it makes way as ever"


# ── bounds ───────────────────────────────────────────────────────────────────────────────────────

SIZES_MS = (1, 5, 20, 100, 500, 2000)


@st.composite
def _arrivals(draw: st.DrawFn) -> list[Entry]:
    """Bursts of jobs, each burst of one size, class and tenant, so that the worst can be built."""
    entries: list[Entry] = []
    at_ms = 0
    for _ in range(draw(st.integers(1, 12))):
        at_ms += draw(st.sampled_from((0, 1, 50, 400, 3000, 20_000)))
        work_ms = draw(st.sampled_from(SIZES_MS))
        tenant, service_class = draw(st.sampled_from("uv")), draw(st.sampled_from(ServiceClass))
        apart_ms = draw(st.sampled_from((0, 1, 10, 100)))
        for _ in range(draw(st.integers(1, 25))):
            at_ms += apart_ms
            entries.append(
                entry(
                    f"r{len(entries)}",
                    work_ms,
                    at_ms=at_ms,
                    order=len(entries),
                    tenant=tenant,
                    service_class=service_class,
                )
            )
    return entries


def _assert_bounds_hold(served: list[Served], share: float, count: int) -> None:
    longest_ns = max(one.entry.work_ns for one in served)
    for one in served:
        if one.bound_ns is not None:
            assert one.began_ns <= one.bound_ns + longest_ns, f"{one.entry.id} starved"
    rescued = [one for one in served if one.rescued]
    for index, first in enumerate(rescued):
        until_ns = first.began_ns + WINDOW_NS
        spent_ns = sum(
            min(one.entry.work_ns, max(0, until_ns - one.began_ns)) for one in rescued[index:]
        )
        # Earned in the window, saved while a piece ran, and the one that overdraws.
        earned_ns = share * count * (WINDOW_NS + min(PIECE_MAX_NS, longest_ns))
        assert spent_ns <= earned_ns + longest_ns


@settings(deadline=None)
@given(
    arrivals=_arrivals(),
    count=st.sampled_from((1, 2, 4, 8)),
    share=st.sampled_from((0.05, 0.1, 0.5, 1.0)),
    after_ms=st.sampled_from((0.5, 100.0, 3000.0)),
    ratio=st.sampled_from((0.1, 2.0, 20.0)),
    gamma_per_s=st.sampled_from((0.002, 0.1, 20.0)),
)
@example(  # tiny claims among long pieces: credit must not be lost while no server is free
    arrivals=[
        entry(
            f"r{number}",
            5 if number % 2 else 2000,
            at_ms=number,
            order=number,
            service_class=ServiceClass.BATCH if number % 2 else ServiceClass.INTERACTIVE,
        )
        for number in range(60)
    ],
    count=2,
    share=0.1,
    after_ms=100.0,
    ratio=2.0,
    gamma_per_s=0.1,
)
def test_nobody_waits_beyond_the_bound_and_rescues_keep_to_their_share(
    arrivals: list[Entry],
    count: int,
    share: float,
    after_ms: float,
    ratio: float,
    gamma_per_s: float,
) -> None:
    order = _order(after_ms=after_ms, ratio=ratio, share=share, gamma_per_s=gamma_per_s)
    served = serve_all(order, arrivals, count)
    assert sorted(one.entry.id for one in served) == sorted(one.id for one in arrivals)
    _assert_bounds_hold(served, share, count)


def test_under_overload_rescues_take_their_share_and_no_more() -> None:
    """Four servers, twice too much work, jobs of at most a second: f + 1 % in every minute.

    It would be first come, first served without the cap: all wait longer than the second after
    which they have a claim.
    """
    chance = Random(1)
    count, share, at_ms = 4, 0.1, 0.0
    arrivals = []
    for number in range(3000):
        work_ms = chance.choice((20, 50, 100, 1000))
        at_ms += chance.expovariate(2 * count / 292.5)
        arrivals.append(entry(f"r{number}", work_ms, at_ms=int(at_ms), order=number))
    served = serve_all(_order(share=share, gamma_per_s=0.002), arrivals, count)
    rescued = [one for one in served if one.rescued]
    _assert_bounds_hold(served, share, count)
    assert len(rescued) > 20
    for first in rescued:
        until_ns = first.began_ns + WINDOW_NS
        spent_ns = sum(
            min(one.entry.work_ns, until_ns - one.began_ns)
            for one in rescued
            if first.began_ns <= one.began_ns < until_ns
        )
        assert spent_ns <= (share + 0.01) * count * WINDOW_NS


# ── nothing piles up ─────────────────────────────────────────────────────────────────────────────


def test_instants_of_those_who_were_served_in_turn_do_not_pile_up() -> None:
    rescue = _rescue()
    for number in range(20 * DEAD_CLAIMS_MAX):
        one = entry(f"r{number}", 1, at_ms=number)
        rescue.add(one)
        assert rescue.head(number * MS) is None
        rescue.remove(one.id)
    assert len(rescue._due) <= DEAD_CLAIMS_MAX


def test_claims_of_those_who_were_served_in_turn_do_not_pile_up() -> None:
    """The oldest claim waits for credit, and behind it others come and go."""
    rescue = _rescue(share=1e-9)
    debtor, oldest = entry("debtor", 1000), entry("oldest", 1, order=1)
    rescue.add(debtor)
    rescue.add(oldest)
    rescue.head(3 * S)
    rescue.pay(debtor)
    for number in range(20 * DEAD_CLAIMS_MAX):
        one = entry(f"r{number}", 1, order=number + 2)
        rescue.add(one)
        assert rescue.head(4 * S) is None
        assert rescue.bound_ns(one.id) is not None
        rescue.remove(one.id)
    assert len(rescue._line) <= DEAD_CLAIMS_MAX + 4
    rescue.remove(debtor.id)
    rescue.remove(oldest.id)
    assert rescue._claims == rescue._waiting == {}
    assert rescue._claimed_ns == 0
