"""Placements on arrival, each by the figures that its rule is about."""

from collections import Counter
from collections.abc import Sequence
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.clock import MS, S
from pdserve.ids import RequestId, WorkerId
from pdserve.router import bindings
from pdserve.router.bindings import Binding, Candidate, Stale, binding_of
from pdserve.router.costs import believed
from pdserve.router_config import Placement

COSTS = believed(1000)  # a token is a millisecond; hand-off 1 ms + 23 µs per token
ARRIVING = [name for name in get_args(Placement) if name != "late"]


def candidate(
    name: str,
    *,
    queued_requests: int = 0,
    queued_ms: int = 0,
    uncached: int = 100,
    cached: int = 0,
    decode_blocks: int = 0,
) -> Candidate:
    return Candidate(
        WorkerId(name), queued_requests, queued_ms * MS, uncached, cached, uncached * MS,
        decode_blocks,
    )  # fmt: skip


def binding(name: str, **options: int) -> Binding:
    found = binding_of(name, COSTS, **options)
    assert found is not None
    return found


def chosen(name: str, *candidates: Candidate) -> str:
    return binding(name).choose(RequestId("r"), candidates, 0)


def choices(subject: Binding, count: int, *candidates: Candidate) -> list[str]:
    return [subject.choose(RequestId(f"r{i}"), candidates, 0) for i in range(count)]


def test_late_is_no_placement_on_arrival() -> None:
    assert binding_of("late", COSTS) is None


@pytest.mark.parametrize("name", ARRIVING)
def test_the_only_one_there_is_chosen(name: str) -> None:
    assert chosen(name, candidate("p0")) == "p0"


@pytest.mark.parametrize("name", [n for n in ARRIVING if n not in ("random", "two_choices")])
def test_ties_go_to_the_lower_id(name: str) -> None:
    assert chosen(name, candidate("p1"), candidate("p0"), candidate("p2")) == "p0"


@pytest.mark.parametrize("name", ARRIVING)
@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_the_order_of_the_candidates_does_not_matter(
    name: str, order: list[int], loads: list[int]
) -> None:
    there = [
        candidate(f"p{i}", queued_requests=load, queued_ms=50 * load, cached=30 * load)
        for i, load in enumerate(loads)
    ]
    assert chosen(name, *there) == chosen(name, *(there[index] for index in order))


def test_random_is_even_and_the_same_for_the_same_request() -> None:
    workers = [candidate(f"p{i}") for i in range(4)]
    counts = Counter(choices(binding("random"), 2000, *workers))
    assert choices(binding("random"), 50, *workers) == choices(binding("random"), 50, *workers)
    assert len(counts) == 4
    assert max(counts.values()) < 1.2 * min(counts.values())


def test_round_robin_goes_on_where_it_was_when_workers_come_and_go() -> None:
    subject, (a, b, c) = binding("round_robin"), [candidate(name) for name in "abc"]
    assert choices(subject, 4, a, b, c) == ["a", "b", "c", "a"]
    assert choices(subject, 2, a, c) == ["c", "a"]
    assert choices(subject, 2, c, b) == ["b", "c"]


def test_least_requests_counts_heads_and_least_work_their_time() -> None:
    few_long = candidate("few", queued_requests=1, queued_ms=900)
    many_short = candidate("many", queued_requests=5, queued_ms=50)
    assert chosen("least_requests", few_long, many_short) == "few"
    assert chosen("least_work", few_long, many_short) == "many"


def test_a_cached_prefix_outweighs_as_much_queued_work() -> None:
    warm = candidate("warm", queued_ms=80, uncached=10, cached=90)
    assert chosen("least_work", candidate("cold"), warm) == "warm"  # 90 against 100 ms


def test_two_choices_draws_two_different_ones_and_takes_the_better() -> None:
    idle, busy = candidate("idle"), candidate("busy", queued_ms=500)
    assert set(choices(binding("two_choices"), 20, idle, busy)) == {"idle"}
    others = [candidate(f"p{i}", queued_ms=500) for i in range(7)]
    share = Counter(choices(binding("two_choices"), 2000, idle, *others))["idle"] / 2000
    assert share == pytest.approx(2 / 8, abs=0.03)


def test_mooncake_fetches_a_much_longer_prefix_and_counts_the_fetch() -> None:
    holder = candidate("holder", queued_ms=300, uncached=100, cached=900)
    idle = candidate("idle", uncached=1000)
    # Idle: fetch of 900 tokens 22 ms + 100 ms of prefill, against 300 + 100 ms.
    assert chosen("mooncake", holder, idle) == "idle"
    assert chosen("least_work", holder, idle) == "holder"


def test_mooncake_recomputes_where_the_prefix_elsewhere_is_not_much_longer() -> None:
    holder = candidate("holder", queued_ms=420, uncached=100, cached=900)
    half = candidate("half", uncached=550, cached=450)  # exactly half: no fetch, 550 ms
    assert chosen("mooncake", holder, half) == "holder"
    less = candidate("less", uncached=551, cached=449)
    assert chosen("mooncake", holder, less) == "less"


def test_dynamo_adds_prefill_and_decode_in_blocks() -> None:
    prefills = candidate("prefills", queued_ms=320)  # 20 blocks of 16
    decodes = candidate("decodes", decode_blocks=21)
    assert chosen("dynamo", prefills, decodes) == "prefills"
    coarse = binding("dynamo", block_tokens=8)  # 40 blocks
    assert coarse.choose(RequestId("r"), [prefills, decodes], 0) == "decodes"


def test_lmetric_multiplies() -> None:
    one_long = candidate("one", queued_requests=1, queued_ms=300)  # 400 · 2
    three_short = candidate("three", queued_requests=3, queued_ms=50)  # 150 · 4
    assert chosen("lmetric", one_long, three_short) == "three"
    assert chosen("lmetric", one_long, candidate("many", queued_requests=8)) == "one"  # 100 · 9


def test_preble_exploits_a_prefix_of_more_than_half_and_else_explores() -> None:
    subject = binding("preble")
    cold = candidate("cold", uncached=100)
    assert choices(subject, 1, candidate("warm", uncached=49, cached=51), cold) == ["warm"]
    # Half is not enough, and warm has 49 ms of load by now: 50 + 49 < 100.
    half = candidate("warm", uncached=50, cached=50)
    assert choices(subject, 1, half, cold) == ["warm"]
    assert choices(subject, 1, half, cold) == ["cold"]  # 99 + 50 > 100


def test_preble_forgets_after_three_minutes() -> None:
    subject, (a, b) = binding("preble"), [candidate("a"), candidate("b", uncached=101)]
    assert subject.choose(RequestId("r0"), [a, b], 0) == "a"
    assert subject.choose(RequestId("r1"), [a, b], 180 * S) == "b"
    assert subject.choose(RequestId("r2"), [a, b], 180 * S + 1) == "a"


def test_preble_gives_prefixes_away_when_one_worker_has_far_more_to_do() -> None:
    subject = binding("preble")
    warm, cold = candidate("warm", uncached=10, cached=90), candidate("cold")
    went = choices(subject, 60, warm, cold)
    assert set(went[: bindings.PREBLE_IMBALANCE_LEAST]) == {"warm"}
    assert "cold" in went[bindings.PREBLE_IMBALANCE_LEAST :]


def test_preble_remembers_no_more_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "PREBLE_WINDOW_MAX", 10)
    subject = bindings.Preble()
    choices(subject, 50, candidate("a"), candidate("b", uncached=0))
    assert len(subject._window) == 10
    assert sum(subject._loads_ns.values()) == sum(bound.work_ns for bound in subject._window)


class Recorded:
    """Chooses the first and remembers what it was shown."""

    def __init__(self) -> None:
        self.shown: list[Candidate] = []

    def choose(self, request: RequestId, candidates: Sequence[Candidate], now_ns: int) -> WorkerId:
        self.shown = list(candidates)
        return candidates[0].worker


def test_stale_loads_are_those_of_the_last_refresh_but_the_prompt_is_known_at_once() -> None:
    inner = Recorded()
    stale = Stale(inner, 200 * MS)
    before = candidate("p0", queued_requests=1, queued_ms=10, decode_blocks=3)
    now = candidate("p0", queued_requests=7, queued_ms=70, decode_blocks=9, uncached=5, cached=95)
    stale.choose(RequestId("r0"), [before], 0)
    stale.choose(RequestId("r1"), [now], 199 * MS)
    mixed = candidate("p0", queued_requests=1, queued_ms=10, decode_blocks=3, uncached=5, cached=95)
    assert inner.shown == [mixed]
    stale.choose(RequestId("r2"), [now], 200 * MS)
    assert inner.shown == [now]


def test_a_worker_that_came_since_the_last_refresh_is_seen_as_it_was_then() -> None:
    inner = Recorded()
    stale = Stale(inner, 200 * MS)
    stale.choose(RequestId("r0"), [candidate("p0")], 0)
    stale.choose(RequestId("r1"), [candidate("p1", queued_ms=5)], 10 * MS)
    stale.choose(RequestId("r2"), [candidate("p1", queued_ms=50)], 20 * MS)
    assert inner.shown == [candidate("p1", queued_ms=5)]


def test_stale_news_make_all_run_to_one_worker() -> None:
    def spread(stale_ns: int) -> Counter[str]:
        subject, queued_ms = binding("least_work", stale_ns=stale_ns), {"p0": 0, "p1": 0}
        went: Counter[str] = Counter()
        for index in range(10):
            there = [candidate(name, queued_ms=ms) for name, ms in queued_ms.items()]
            worker = subject.choose(RequestId(f"r{index}"), there, index * MS)
            queued_ms[worker] += 100
            went[worker] += 1
        return went

    assert spread(0) == {"p0": 5, "p1": 5}
    assert spread(200 * MS) == {"p0": 10}
