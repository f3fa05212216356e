"""Long random runs of the fake cluster, weighted so that work gets done and everything happens.

Where ``test_router_machine`` finds the shortest way to break a promise, this one makes sure that
the promises were put to the test: every counter that stands for a way through the core has moved.
"""

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from pdserve.messages import Role, ServiceClass
from tests.unit.router.fake_cluster import FakeCluster

STEPS = 1200
CALM, PRESSED = 15, 70
"""How often somebody submits, among a thousand steps: most can be served, or most are refused."""

STORMS: list[dict[str, object]] = [
    {},
    {"decode_policy": "mlfq"},
    {"decode_policy": "oracle", "policy": "srpt"},
    {"mode": "aggregated"},
    {"mode": "aggregated", "placement": "least_work", "decode_policy": "mlfq"},
    {"mode": "auto"},
    {"mode": "auto", "decode_policy": "oracle", "ttft_slo_ms": 400.0},
    {"placement": "two_choices"},
    {"placement": "mooncake", "policy": "fcfs"},
]
ALL_WAYS = {
    "finished", "refused", "lost", "cancelled", "skips", "demotions", "promotions", "preemptions",
    "handed_back", "parks", "resumes", "deadlines_passed", "worker_failures", "stale_events",
    "rescues", "shed", "swaps",
}  # fmt: skip


def _storm(seed: int, settings: dict[str, object], submits: int) -> Counter[str]:
    chance = Random(seed)
    cluster = FakeCluster(**settings)
    for role in (*Role, *Role):
        cluster.join(role)
    weights = WEIGHTS | {_submit: submits}
    for act in chance.choices(list(weights), weights=list(weights.values()), k=STEPS):
        act(cluster, chance)
        cluster.check()
    cluster.settle()
    return cluster.core.state.counters


def _submit(cluster: FakeCluster, chance: Random) -> None:
    cluster.submit(
        chance.choice((5, 32, 70, 150, 300, 450)),
        chance.choice((1, 3, 60, 200)),
        chance.choice("ab"),
        chance.choice((30, 10**6, 10**6, 10**6)),
        tenant=chance.choice("uv"),
        service_class=chance.choice(list(ServiceClass)),
    )


def _work(cluster: FakeCluster, chance: Random) -> None:
    worker = _any_worker(cluster, chance)
    for act in (cluster.obey, cluster.work, cluster.hear):
        if chance.random() < 0.7:
            act(worker)


def _trouble(cluster: FakeCluster, chance: Random) -> None:
    if len(cluster.workers) > 3:
        kind = chance.choice((cluster.kill, cluster.drain, cluster.reconnect, cluster.fail))
        kind(_any_worker(cluster, chance))
    else:
        cluster.join(chance.choice(list(Role)))


def _join(cluster: FakeCluster, chance: Random) -> None:
    if len(cluster.workers) < 5:
        cluster.join(chance.choice(list(Role)))


def _cancel(cluster: FakeCluster, chance: Random) -> None:
    if cluster.wanted:
        cluster.cancel(chance.choice(sorted(cluster.wanted)))


def _submit_again(cluster: FakeCluster, chance: Random) -> None:
    if cluster.lost:
        cluster.submit_again()


def _pass_time(cluster: FakeCluster, chance: Random) -> None:
    cluster.pass_time(chance.choice((1, 5, 40)))


def _any_worker(cluster: FakeCluster, chance: Random) -> str:
    return chance.choice(sorted(cluster.workers))


WEIGHTS: dict[Callable[[FakeCluster, Random], None], int] = {
    _work: 800,
    _submit: 30,
    _submit_again: 50,
    _pass_time: 50,
    _cancel: 5,
    _join: 20,
    _trouble: 8,
}


@pytest.fixture(scope="module")
def calm() -> Counter[str]:
    storms = (_storm(seed, settings, CALM) for seed, settings in enumerate(STORMS))
    return sum(storms, Counter[str]())


@pytest.fixture(scope="module")
def pressed() -> Counter[str]:
    storms = (_storm(seed, settings, PRESSED) for seed, settings in enumerate(STORMS))
    return sum(storms, Counter[str]())


def test_every_way_through_the_core_was_taken_and_every_promise_held(
    calm: Counter[str], pressed: Counter[str]
) -> None:
    assert sorted(way for way in ALL_WAYS if not (calm + pressed)[way]) == []


def test_most_requests_are_finished_in_spite_of_everything(calm: Counter[str]) -> None:
    """Of those that somebody still wants."""
    unwanted = calm["cancelled"] + calm["deadlines_passed"]
    assert calm["finished"] > (calm["arrived"] - unwanted) / 2


def test_under_pressure_most_are_refused_and_most_of_the_others_finished(
    pressed: Counter[str],
) -> None:
    assert pressed["refused"] > pressed["arrived"] / 2
    assert pressed["finished"] > (pressed["arrived"] - pressed["refused"]) / 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
@pytest.mark.parametrize("submits", [CALM, PRESSED])
@pytest.mark.parametrize("settings", STORMS, ids=str)
def test_it_holds_in_many_storms(settings: dict[str, object], submits: int, seed: int) -> None:
    counters = _storm(seed, settings, submits)
    assert counters["finished"] > 0
