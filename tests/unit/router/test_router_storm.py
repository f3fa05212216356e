"""Long random runs of the fake cluster, weighted so that work gets done and everything happens.

Where ``test_router_machine`` finds the shortest way to break a promise, this one makes sure that
the promises were put to the test: every counter that stands for a way through the core has moved.
"""

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from pdserve.messages import Role
from tests.unit.router.fake_cluster import FakeCluster

STEPS = 2500
SEEDS = range(4)
ALL_WAYS = {
    "finished", "refused", "lost", "cancelled", "skips", "demotions", "promotions", "preemptions",
    "handed_back", "parks", "resumes", "deadlines_passed", "worker_failures", "stale_events",
}  # fmt: skip


def _storm(seed: int) -> Counter[str]:
    chance = Random(seed)
    cluster = FakeCluster()
    for role in (*Role, *Role):
        cluster.join(role)
    acts = list(WEIGHTS)
    for act in chance.choices(acts, weights=[WEIGHTS[act] for act in acts], k=STEPS):
        act(cluster, chance)
        cluster.check()
    cluster.settle()
    return cluster.core.state.counters


def _submit(cluster: FakeCluster, chance: Random) -> None:
    cluster.submit(
        chance.choice((5, 32, 70, 300)),
        chance.choice((1, 3, 60)),
        chance.choice("ab"),
        chance.choice((30, 10**6, 10**6, 10**6)),
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
    cluster.pass_time(chance.choice((1, 5)))


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
def counters() -> Counter[str]:
    return sum((_storm(seed) for seed in SEEDS), Counter[str]())


def test_every_way_through_the_core_was_taken_and_every_promise_held(
    counters: Counter[str],
) -> None:
    assert sorted(way for way in ALL_WAYS if counters[way] == 0) == []


def test_most_requests_are_finished_in_spite_of_everything(counters: Counter[str]) -> None:
    assert counters["finished"] > counters["arrived"] / 2
