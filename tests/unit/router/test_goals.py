"""γ follows the operator's goal, by shadows of the queue."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pdserve.clock import MS, S
from pdserve.router import goals
from pdserve.router.entry import ShadowJob
from pdserve.router.goals import (
    AIM,
    ARRIVALS_MIN,
    BIN_RATIO,
    GAMMA_MIN_PER_S,
    GAMMA_START_PER_S,
    GAMMAS_PER_S,
    LIMITS,
    OVERLOAD_RATIO,
    PERIOD_NS,
    STEP_MAX,
    WAITING_MAX,
    GoalControl,
    Histogram,
    Outcome,
    Shadow,
    choose,
)
from pdserve.router.levels import Ladder
from pdserve.router_config import RouterConfig

CONFIG = RouterConfig()
WORKERS = 4
LADDER = Ladder.of(CONFIG, 1.0)
FLAT = (0,) * len(LADDER.quanta_ns)

Arrival = tuple[int, int]
"""Instant and work, in nanoseconds."""


class Recorder(Histogram):
    """Keeps the times themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.times_ns: list[int] = []

    def add(self, time_ns: int) -> None:
        self.times_ns.append(time_ns)


def _times_ns(arrivals: Sequence[Arrival], workers: int, boosts_ns: Sequence[int]) -> list[int]:
    """Response times in a shadow, in ascending order."""
    shadow = Shadow(boosts_ns, 1)
    shadow.set_workers(workers)
    recorder = shadow.times = Recorder()
    for number, (at_ns, work_ns) in enumerate(arrivals):
        shadow.arrive(ShadowJob(at_ns, work_ns), number, LADDER.rung_of(work_ns))
    shadow.arrive(ShadowJob(10**18, 0), len(arrivals), 0)  # by then all are through
    return sorted(recorder.times_ns[:-1])


def _poisson(seed: int, *, load: float = 0.9) -> Iterator[Arrival]:
    """Arrivals that keep so much of four workers busy; one in twenty is long."""
    chance = Random(seed)
    sizes_ms = (20,) * 10 + (100,) * 9 + (2000,)
    gap_ms = sum(sizes_ms) / len(sizes_ms) / WORKERS / load
    at_ms = 0.0
    while True:
        at_ms += chance.expovariate(1 / gap_ms)
        yield round(at_ms * MS), chance.choice(sizes_ms) * MS


def _until(arrivals: Iterator[Arrival], until_ns: int) -> list[Arrival]:
    found = []
    for arrival in arrivals:
        if arrival[0] > until_ns:
            break
        found.append(arrival)
    return found


def _steer(control: GoalControl, arrivals: Sequence[Arrival]) -> None:
    """The controller sees all of them, and is ticked whenever it asked to be."""
    control.set_workers(WORKERS)
    for at_ns, work_ns in arrivals:
        while (due_ns := control.due_ns()) is not None and due_ns <= at_ns:
            control.tick(due_ns)
        control.arrived(at_ns, work_ns)


# ── shadows ──────────────────────────────────────────────────────────────────────────────────────


def _served_by_hand(
    arrivals: Sequence[Arrival], workers: int, boosts_ns: Sequence[int]
) -> list[int]:
    """As the definition says: whoever is free takes the least key of all that wait. Who comes at
    that very instant does not wait yet."""
    times: list[int] = []
    free = [0] * workers
    left = list(arrivals)
    while left:
        free.sort()
        now_ns = max(free[0], min(at_ns for at_ns, _ in left))

        def key(arrival: Arrival) -> int:  # at equal keys who came first
            at_ns, work_ns = arrival
            rung = min(bisect_left(LADDER.quanta_ns, work_ns), LADDER.last)
            return at_ns - boosts_ns[rung]

        waiting = [arrival for arrival in left if arrival[0] < now_ns]
        chosen = min(waiting or [arrival for arrival in left if arrival[0] == now_ns], key=key)
        free[0] = now_ns + chosen[1]
        times.append(free[0] - chosen[0])
        left.remove(chosen)
    return sorted(times)


@given(
    jobs=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 3000)), min_size=1, max_size=40),
    workers=st.integers(1, 5),
    gamma_per_s=st.sampled_from((0.002, 0.1, 1.0, 20.0)),
)
@example(jobs=[(1, 1), (1, 604), (1, 1), (48, 556), (255, 30), (300, 1), (1, 1299)], workers=2,
         gamma_per_s=1.0)  # fmt: skip
def test_a_shadow_is_the_queue_as_defined(
    jobs: list[tuple[int, int]], workers: int, gamma_per_s: float
) -> None:
    arrivals, at_ns = [], 0
    for gap_ms, work_ms in jobs:
        at_ns += gap_ms * MS
        arrivals.append((at_ns, work_ms * MS))
    boosts_ns = Ladder.of(CONFIG, gamma_per_s).boosts_ns
    by_hand = _served_by_hand(arrivals, workers, boosts_ns)
    assert _times_ns(arrivals, workers, boosts_ns) == by_hand


def test_a_shadow_without_boosts_is_first_come_first_served() -> None:
    assert _times_ns([(0, 9), (1, 5), (2, 1)], 1, FLAT) == [9, 13, 13]


def test_workers_come_and_go_in_a_shadow() -> None:
    shadow = Shadow(FLAT, 1)
    recorder = shadow.times = Recorder()
    shadow.arrive(ShadowJob(0, 100), 0, 0)
    shadow.arrive(ShadowJob(0, 100), 1, 0)
    assert len(shadow) == 1
    shadow.set_workers(2)  # it is busy as long as the other
    shadow.arrive(ShadowJob(100, 50), 2, 0)
    shadow.set_workers(1)
    shadow.arrive(ShadowJob(10**9, 1), 3, 0)
    assert recorder.times_ns == [100, 200, 50, 1]


# ── histogram ────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(0, 5 * 10**14), min_size=1, max_size=300), st.floats(0.01, 1.0))
def test_a_histogram_knows_a_quantile_as_well_as_its_bins_are_wide(
    times_ns: list[int], at: float
) -> None:
    histogram = Histogram()
    for time_ns in times_ns:
        histogram.add(time_ns)
    histogram.collect()
    assert histogram.count == len(times_ns)
    ordered = sorted(times_ns)
    # The least that so many are not above; a product of floats may miss it by one.
    rank = at * len(ordered)
    low, high = ordered[max(0, int(rank - 1e-6) - 1)], ordered[min(int(rank), len(ordered) - 1)]
    found_ns = histogram.quantile_s(at) * S
    assert max(low, MS) / BIN_RATIO**1.1 <= found_ns <= max(high, MS) * BIN_RATIO**1.1


def test_older_times_count_less() -> None:
    histogram = Histogram()
    for time_ms, fade in ((100, 0.25), (1000, 1.0)):
        for _ in range(100):
            histogram.add(time_ms * MS)
        histogram.collect()
        histogram.fade(fade)
    assert histogram.count == 125
    assert histogram.mean_s == pytest.approx((25 * 0.1 + 100) / 125)
    assert histogram.part_within(500 * MS) == 0.2


# ── choice ───────────────────────────────────────────────────────────────────────────────────────


def _outcome(
    gamma: float, mean: float, p99: float, within: float = 1.0, p999: float = 1000
) -> Outcome:
    return Outcome(gamma, mean, p99, p999, within)


FCFS = _outcome(0.0, 100, 1000, p999=2000)


def test_the_least_mean_of_those_that_keep_the_tail() -> None:
    tried = [_outcome(1, 50, 1020), _outcome(2, 60, AIM * 1000), _outcome(4, 70, 900)]
    assert choose("balanced", FCFS, tried) == 1
    assert choose("tail", FCFS, tried) == 2


def test_between_two_shadows_gamma_is_where_the_limit_is_met() -> None:
    tried = [_outcome(1, 50, 1180), _outcome(2, 60, 980), _outcome(4, 70, 900)]
    limit = AIM * 1050
    assert choose("balanced", FCFS, tried) == pytest.approx(2 * 0.5 ** ((limit - 980) / 200))
    tried[1] = _outcome(2, 60, 930)
    assert choose("tail", FCFS, tried) == pytest.approx(2 * 0.5**0.2)  # AIM is a fifth of the way


def test_who_waits_longest_counts_too() -> None:
    """A small γ lets the short ones pass, which makes even the 99th percentile better."""
    tried = [_outcome(1, 40, 500, p999=9000), _outcome(2, 60, 950, p999=2500)]
    assert choose("balanced", FCFS, tried) == 2


def test_the_best_tail_where_none_keeps_it() -> None:
    tried = [_outcome(1, 50, 3000), _outcome(2, 60, 2000), _outcome(4, 70, 2000)]
    assert choose("balanced", FCFS, tried) == 2


def test_the_most_within_the_objective() -> None:
    tried = [_outcome(1, 50, 9, 0.90), _outcome(2, 60, 9, 0.95), _outcome(4, 55, 9, 0.95)]
    assert choose("slo", FCFS, tried) == 4


# ── control ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("goal", ["balanced", "tail"])
def test_a_goal_keeps_its_tail_on_poisson_traffic_and_gains_in_the_mean(goal: str) -> None:
    """γ as found in fifteen minutes, on the fifteen minutes that follow: a tenth of slack, because
    a 99th percentile of another sample is another."""
    control = GoalControl(RouterConfig(goal=goal))  # type: ignore[arg-type]
    arrivals = _poisson(1)
    _steer(control, _until(arrivals, 900 * S))
    coming = _until(arrivals, 1800 * S)
    fcfs = _times_ns(coming, WORKERS, FLAT)
    ours = _times_ns(coming, WORKERS, Ladder.of(CONFIG, control.gamma_per_s).boosts_ns)
    for at, limit in zip((0.99, 0.999), LIMITS[goal], strict=True):
        place = int(at * len(coming))
        assert ours[place] <= 1.1 * limit * fcfs[place]
    assert sum(ours) < 0.9 * sum(fcfs)


def test_gamma_moves_by_one_step_at_most_towards_what_its_shadows_show() -> None:
    """Work without end, where everything but first come, first served is bad for the tail."""
    control = GoalControl(RouterConfig(goal="tail"))
    before, seen = control.gamma_per_s, [control.gamma_per_s]
    for number in range(2 * ARRIVALS_MIN):
        at_ns = number * S // 2
        control.arrived(at_ns, (4000 if number % 9 == 0 else 50) * MS)
        if control.tick(at_ns):
            assert 1 / STEP_MAX <= control.gamma_per_s / before <= STEP_MAX
            seen.append(control.gamma_per_s)
            before = control.gamma_per_s
        assert control.gamma_per_s == before
    assert len(set(seen)) > 2


def test_under_overload_gamma_becomes_the_least() -> None:
    """Four seconds of work in each second, from the first minutes on."""
    control = GoalControl(RouterConfig(goal="tail", rescue_after_ms=60_000))
    control.set_workers(1)
    seen = []
    for number in range(600):
        at_ns = number * S // 2
        control.arrived(at_ns, (9000 if number % 9 == 0 else 1000) * MS)
        if control.tick(at_ns):
            seen.append((at_ns // S, control.gamma_per_s))
    assert seen[0][0] >= OVERLOAD_RATIO * 60
    assert control.gamma_per_s == GAMMAS_PER_S[0]
    assert all(before / after <= STEP_MAX for (_, before), (_, after) in pairwise(seen))


def test_gamma_stays_where_there_is_too_little_to_learn_from() -> None:
    control = GoalControl(CONFIG)
    for number in range(ARRIVALS_MIN - 1):
        control.arrived(number * MS, 2000 * MS)
    assert control.due_ns() == PERIOD_NS
    assert not control.tick(PERIOD_NS - 1)
    assert not control.tick(PERIOD_NS)
    assert control.gamma_per_s == GAMMA_START_PER_S


def test_nothing_is_due_until_somebody_comes_again() -> None:
    control = GoalControl(CONFIG)
    control.arrived(0, 20 * MS)
    control.tick(PERIOD_NS)
    assert control.due_ns() is None
    assert not control.tick(10 * PERIOD_NS)
    control.arrived(20 * PERIOD_NS, 20 * MS)
    assert control.due_ns() == 21 * PERIOD_NS


@pytest.mark.parametrize(
    ("config", "gamma_per_s"),
    [
        (RouterConfig(goal="mean"), GAMMA_MIN_PER_S),
        (RouterConfig(gamma_per_s=3.0), 3.0),
        (RouterConfig(policy="fcfs"), GAMMA_START_PER_S),
    ],
)
def test_some_have_nothing_to_steer(config: RouterConfig, gamma_per_s: float) -> None:
    control = GoalControl(config)
    _steer(control, _until(_poisson(0), 60 * S))
    assert control.due_ns() is None
    assert not control.tick(10**6 * S)
    assert control.gamma_per_s == gamma_per_s


def test_an_objective_is_steered_to_as_well() -> None:
    """Half a second, where first come first served would be far too late for most."""
    arrivals = _until(_poisson(3, load=1.05), 300 * S)
    control = GoalControl(RouterConfig(goal="slo", ttft_slo_ms=500.0))
    _steer(control, arrivals)

    def within(boosts_ns: Sequence[int]) -> int:
        return sum(time_ns <= 500 * MS for time_ns in _times_ns(arrivals, WORKERS, boosts_ns))

    boosts_ns = Ladder.of(CONFIG, control.gamma_per_s).boosts_ns
    assert within(boosts_ns) > 2 * within(FLAT)


def test_what_the_shadows_hold_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goals, "WAITING_MAX", 50)
    control = GoalControl(CONFIG)
    for number in range(200):
        control.arrived(number, 10**6 * MS)
    assert WAITING_MAX > 50
    assert max(len(shadow) for shadow in control._all()) == 50


# ── servers in common ────────────────────────────────────────────────────────────────────────────

BURSTS = st.lists(
    st.tuples(st.sampled_from([0, 1, 5, 400, 3000]), st.sampled_from([10, 200, 900, 5000])),
    min_size=1,
    max_size=60,
)
"""Milliseconds since the one before, and of work."""


# Nobody waits in any of them, and they are busy until different instants.
BUSY_APART = [(0, 5000), (0, 900), (0, 5000), (0, 200), (5500, 10)]


@example([*BUSY_APART, (0, 5000), (0, 5000), (9000, 10)], 2, 2, 1)
@given(BURSTS, st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3]))
def test_shadows_that_share_servers_are_what_each_would_be_alone(
    bursts: list[tuple[int, int]], workers: int, later: int, every: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(goals, "MEET_EVERY", every)
        control = GoalControl(CONFIG)
        control.set_workers(workers)
        alone = [
            Shadow(FLAT, 1),
            *(Shadow(Ladder.of(CONFIG, g).boosts_ns, 1) for g in GAMMAS_PER_S),
        ]
        for shadow in alone:
            shadow.set_workers(workers)
        now_ns = 0
        for number, (gap_ms, work_ms) in enumerate(bursts):
            now_ns += gap_ms * MS
            if number == len(bursts) // 2:
                control.set_workers(later)
                for shadow in alone:
                    shadow.set_workers(later)
            control.arrived(now_ns, work_ms * MS)
            for shadow in alone:
                job = ShadowJob(now_ns, work_ms * MS)
                shadow.arrive(job, number, LADDER.rung_of(work_ms * MS))
            assert [len(shadow) for shadow in control._all()] == [len(shadow) for shadow in alone]
    for shadow, other in zip(control._all(), alone, strict=True):
        assert shadow.times._fresh == other.times._fresh
        assert shadow.times._total_s == other.times._total_s
        assert shadow.busy_ns(now_ns) == other.busy_ns(now_ns)


def test_who_has_less_to_do_when_its_turn_comes_is_served_in_less() -> None:
    """Somebody with the same prefix was computed while it waited."""
    control = GoalControl(CONFIG)
    assert control.arrived(0, 1000 * MS) is None, "it is served at once, everywhere"
    waiting = control.arrived(1 * MS, 1000 * MS)
    assert waiting is not None
    waiting.work_ns = 200 * MS
    control.arrived(10 * S, 1 * MS)
    for shadow in control._all():
        assert shadow.times._total_s == pytest.approx(1.0 + 1.199 + 0.001)


def test_shadows_share_servers_again_once_nobody_waits() -> None:
    control = GoalControl(CONFIG)
    assert control._are_alike
    control.arrived(0, 1000 * MS)
    control.arrived(0, 1000 * MS)  # one worker: somebody has to wait
    assert not control._are_alike
    for number in range(goals.MEET_EVERY):
        control.arrived((10 + number) * S, 10 * MS)
    assert control._are_alike
    assert len({id(shadow._free_ns) for shadow in control._all()}) == 1
