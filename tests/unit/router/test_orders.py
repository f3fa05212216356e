"""Orders with one key: who goes first, and what every order keeps to."""

import random
from dataclasses import fields
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.clock import MS
from pdserve.messages import ServiceClass
from pdserve.router.entry import Entry
from pdserve.router.orders import heap, mlfq
from pdserve.router.orders.base import Order
from pdserve.router.orders.heap import KeyedHeap
from pdserve.router.orders.static import AgedPrefix
from pdserve.router.orders.table import order_of
from pdserve.router.places import DEAD_PLACES_MAX
from pdserve.router_config import QueuePolicy, RouterConfig
from tests.unit.router.entries import (
    COSTS,
    contents,
    dispatch,
    entry,
    names,
    wait,
)

BASELINES: list[QueuePolicy] = [
    policy for policy in get_args(QueuePolicy) if policy not in ("skip_join", "fcfs")
]


def order(policy: QueuePolicy, **changes: float) -> Order:
    return order_of(RouterConfig(policy=policy, **changes), COSTS)  # type: ignore[arg-type]


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────


def test_raw_shortest_first_does_not_know_what_is_cached() -> None:
    warm = entry("warm", 10, cached_tokens=90, order=0)
    cold = entry("cold", 50, order=1)
    raw, uncached = order("sjf_raw"), order("sjf")
    wait(raw, warm, cold)
    wait(uncached, warm, cold)
    assert names(raw) == ["cold", "warm"]
    assert names(uncached) == ["warm", "cold"]


def test_with_ageing_nobody_passes_who_comes_later_than_the_ratio_times_the_work() -> None:
    aging = order("sjf_aging", rescue_ratio=20.0)
    wait(aging, entry("long", 100, order=0))  # 20 times 100 ms is 2 s
    wait(aging, entry("sooner", 1, at_ms=1979, order=1), entry("later", 1, at_ms=1981, order=2))
    assert names(aging) == ["sooner", "long", "later"]


def test_the_earliest_deadline_goes_first() -> None:
    edf = order("edf")
    wait(edf, entry("a", 1, deadline_ms=300), entry("b", 9, deadline_ms=200, order=1))
    assert names(edf) == ["b", "a"]


def test_the_highest_response_ratio_changes_with_time() -> None:
    hrrn = order("hrrn")
    wait(hrrn, entry("long", 100), entry("short", 10, at_ms=900, order=1))
    assert names(hrrn, at_ms=950) == ["long", "short"]  # 9.5 against 5
    assert names(hrrn, at_ms=1100) == ["short", "long"]  # 20 against 11


def test_the_longest_cached_prefix_goes_first() -> None:
    lpm = order("lpm")
    wait(lpm, entry("cold", 10), entry("warm", 50, cached_tokens=30, order=1))
    assert names(lpm) == ["warm", "cold"]


def test_who_was_passed_over_often_enough_goes_before_a_long_prefix() -> None:
    lpm = AgedPrefix(tokens_per_pass=10)
    wait(lpm, entry("cold", 10))
    for index in range(3):
        warm = entry(f"warm{index}", 1, cached_tokens=25, order=index + 1)
        wait(lpm, warm)
        assert names(lpm) == [warm.id, "cold"]
        dispatch(lpm, warm)
    wait(lpm, entry("warm3", 1, cached_tokens=25, order=4))
    assert names(lpm) == ["cold", "warm3"]  # 30 against 25


def test_weight_counts_as_that_much_less_work() -> None:
    wspt = order("wspt")
    wait(wspt, entry("batch", 60, service_class=ServiceClass.BATCH))
    wait(wspt, entry("chat", 100, order=1, service_class=ServiceClass.INTERACTIVE))
    assert names(wspt) == ["chat", "batch"]


def test_equal_keys_go_in_the_order_of_arrival() -> None:
    for policy in BASELINES:
        waiting = order(policy)
        wait(waiting, *(entry(name, 10, order=i) for i, name in enumerate("dacb")))
        assert names(waiting)[:1] == ["d"], policy


def test_work_that_changed_while_waiting_counts_as_it_is_now() -> None:
    sjf = order("sjf")
    a, b = entry("a", 10), entry("b", 20, order=1)
    wait(sjf, a, b)
    b.work_ns = 5 * MS
    sjf.refresh(b, 0)
    assert names(sjf) == ["b", "a"]


def test_only_remaining_work_makes_a_running_one_yield_and_by_more_than_the_margin() -> None:
    srpt = order("srpt")
    running, waiting = entry("running", 100), entry("waiting", 60, order=1)
    assert srpt.preempts
    assert srpt.yields(running, waiting, 39 * MS, 0)
    assert not srpt.yields(running, waiting, 40 * MS, 0)
    for policy in BASELINES:
        if policy not in ("srpt", "mlfq", "fastserve", "fastserve_released"):
            assert not order(policy).preempts
            assert not order(policy).yields(running, waiting, 0, 0)


def test_our_own_orders_are_not_built_here() -> None:
    with pytest.raises(AssertionError, match="skip_join is built"):
        order("skip_join")


# ── the heap ─────────────────────────────────────────────────────────────────────────────────────


def test_nobody_waits_twice_and_nobody_leaves_twice() -> None:
    for policy in BASELINES:
        waiting, one = order(policy), entry("one", 1)
        wait(waiting, one)
        with pytest.raises(AssertionError, match="one waits already"):
            waiting.push(one, 0)
        with pytest.raises(AssertionError, match="one waits, it cannot be forgotten"):
            waiting.forget(one)
        waiting.remove(one)
        with pytest.raises(AssertionError, match="one does not wait"):
            waiting.remove(one)
        assert names(waiting) == []


def test_the_dead_are_cleared_away_when_there_are_many() -> None:
    queue: KeyedHeap[float] = KeyedHeap()
    entries = [entry(str(index), 1, order=index) for index in range(200)]
    for index, one in enumerate(entries):
        queue.push(one, float(index))
    for one in entries[1:]:  # never the top
        queue.remove(one)
        queue.check()
    assert len(queue._heap) <= 1 + 1 + DEAD_PLACES_MAX
    assert list(queue) == entries[:1]


def test_the_first_of_many_is_found_without_looking_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0
    is_live = KeyedHeap._is_live

    def counted(queue: KeyedHeap[float], place: tuple[float, int, int, Entry]) -> bool:
        nonlocal looks
        looks += 1
        return is_live(queue, place)

    monkeypatch.setattr(heap.KeyedHeap, "_is_live", counted)
    queue: KeyedHeap[float] = KeyedHeap()
    shuffled = random.Random(1).sample(range(2000), 2000)
    for index in shuffled:
        queue.push(entry(str(index), 1, order=index), float(index))
    looks = 0
    first = [one for one, _ in zip(queue, range(8), strict=False)]
    assert [one.order for one in first] == list(range(8))
    assert looks <= 9


# ── what every order keeps to ────────────────────────────────────────────────────────────────────


class Life:
    """Entries through an order in any sequence of what can happen to them."""

    def __init__(self, subject: Order) -> None:
        self.order = subject
        self.waiting: dict[int, Entry] = {}
        self.running: dict[int, Entry] = {}
        self.now_ns = 0
        self._count = 0

    def step(self, number: int, action: int, amount: int) -> None:
        self.now_ns += amount * 50 * MS
        if number in self.waiting:
            self._waits(number, self.waiting[number], action, amount)
        elif number in self.running:
            self._runs(number, self.running[number], action, amount)
        else:
            self._arrives(number, amount)

    def _arrives(self, number: int, amount: int) -> None:
        self._count += 1
        at_ms = self.now_ns // MS
        one = entry(f"{number}", 1 + amount * 20, order=self._count, at_ms=at_ms)
        self.order.push(one, self.now_ns)
        self.waiting[number] = one

    def _waits(self, number: int, one: Entry, action: int, amount: int) -> None:
        if action == 0:
            one.work_ns, one.uncached_tokens = (1 + amount) * MS, 1 + amount
            self.order.refresh(one, self.now_ns)
            return
        del self.waiting[number]
        if action == 1:
            self.order.remove(one)
            self.order.forget(one)
        else:
            self.order.dispatched(one, self.now_ns)
            self.order.remove(one)
            self.running[number] = one

    def _runs(self, number: int, one: Entry, action: int, amount: int) -> None:
        if action == 0:
            one.work_ns = max(1, one.work_ns - amount * MS)
            self.order.served(one, amount * 1000, self.now_ns)
            return
        del self.running[number]
        if action == 1:
            self.order.forget(one)
        else:
            one.queued_at_ns = self.now_ns
            self.order.push(one, self.now_ns)
            self.waiting[number] = one

    def check(self) -> None:
        self.order.check()
        ranked = list(self.order.ranked(self.now_ns))
        assert {id(one) for one in ranked} == {id(one) for one in self.waiting.values()}
        assert len(ranked) == len(self.order) == sum(self.order.lengths()) == len(self.waiting)
        keys = [(self.order.key_ns(one, self.now_ns), one.order) for one in ranked]
        assert keys == sorted(keys)
        for one in [*self.waiting.values(), *self.running.values()]:
            assert (one.id in self.order) == (one in ranked)

    def end(self) -> None:
        for one in self.waiting.values():
            self.order.remove(one)
        for one in [*self.waiting.values(), *self.running.values()]:
            self.order.forget(one)
        left = [part for part in contents(self.order) if isinstance(part, str | Entry)]
        assert left == []


@pytest.mark.parametrize("policy", BASELINES)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 9)), max_size=40))
def test_who_waits_is_ranked_once_by_its_key_and_nobody_is_remembered(
    policy: QueuePolicy, steps: list[tuple[int, int, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlfq, "RELEASED_SWEEP_EVERY", 5)
        subject = order(policy, rescue_after_ms=400.0, gamma_per_s=0.5)
        if policy == "fastserve_released":  # which shows one at a time by D10
            switches = {field.name: True for field in fields(mlfq.Defects)}
            defects = mlfq.Defects(**{**switches, "head_of_line": False})
            subject = mlfq.released(RouterConfig(), COSTS, defects)
        life = Life(subject)
        for step in steps:
            life.step(*step)
            life.check()
        life.end()
