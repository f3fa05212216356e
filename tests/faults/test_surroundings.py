"""What is around the processes: descriptors (F13), the wall clock (F15), and roles that change
(F20), under load of every kind."""

import contextlib
import resource
import threading
import time
from collections.abc import Iterator

import pytest

from pdserve.cluster.http_client import post_json
from tests.faults import load
from tests.faults.fortress import (
    CLIENTS,
    ROLES,
    Calm,
    add_row,
    set_clock,
    wait_until_whole,
)
from tests.integration.harness import TestCluster, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHORT_S = 5.0
HOUR_S = 3600.0
ROUND_S = 300.0


class Descriptors:
    """Of other processes, as many as they have open, until they are given back."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._before = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids}

    def take(self) -> None:
        for pid, (_, hard) in self._before.items():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, hard))  # those open stay open

    def give_back(self) -> None:
        for pid, limits in self._before.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("role", ["gateway", "store"])
def test_descriptors_run_out(fortress: TestCluster, some_calm: Calm, role: str) -> None:
    """Nobody can connect for a while. Who was connected goes on; nobody ends."""
    victims = ROLES[role](fortress)
    descriptors = Descriptors(victims)
    giving_back = threading.Timer(SHORT_S, descriptors.give_back)

    def strike() -> None:
        descriptors.take()
        giving_back.start()

    try:
        answers = load.run(
            fortress.url,
            some_calm.asks,
            clients=CLIENTS,
            strikes=[(round(some_calm.events * 0.3), strike)],
            keeps_connections=False,
        )
        giving_back.join()
    finally:
        giving_back.cancel()
        descriptors.give_back()
    assert load.differences(some_calm.asks, answers, some_calm.answers) == []
    assert ROLES[role](fortress) == victims
    wait_until_whole(fortress)
    what = f"{role}: no descriptor is left for {SHORT_S:g} s"
    add_row("F13", what, some_calm, answers, note="a connection for each request")


@pytest.fixture
def clock() -> Iterator[None]:
    yield
    set_clock(0)


@pytest.mark.usefixtures("clock")
def test_the_wall_clock_jumps(fortress: TestCluster, some_calm: Calm) -> None:
    """An hour ahead, then an hour behind, while every request has a deadline in minutes."""
    strikes = [
        (round(some_calm.events * 0.2), lambda: set_clock(HOUR_S)),
        (round(some_calm.events * 0.6), lambda: set_clock(-HOUR_S)),
    ]
    answers = load.run(fortress.url, some_calm.asks, clients=CLIENTS, strikes=strikes)
    assert load.differences(some_calm.asks, answers, some_calm.answers) == []
    assert fortress.complete([5, 6, 7], max_tokens=1)["created"] < time.time() - HOUR_S / 2
    wait_until_whole(fortress)
    add_row("F15", "the wall clock an hour ahead, then an hour behind", some_calm, answers)


def test_a_worker_changes_its_role_and_back(fortress: TestCluster, some_calm: Calm) -> None:
    """Without a new process, and while it has work of the role it leaves."""
    before = fortress.status()["counters"].get("lost", 0)
    worker = fortress.workers("decode")[0]["worker"]
    with load.Endless(fortress.url, some_calm.asks, clients=CLIENTS) as endless:
        for role, count in (("prefill", 1), ("decode", 2)):
            post_json(fortress.url, "/cluster/role", {"worker": worker, "role": role})
            wait_for(
                f"{count} decode workers",
                lambda count=count: len(fortress.workers("decode")) == count,  # type: ignore[misc]
            )
            already = len(endless.answers)
            wait_for(
                "a round",
                lambda already=already: len(endless.answers) > already,  # type: ignore[misc]
                timeout_s=ROUND_S,
            )
    answers = endless.answers
    rounds = len(answers) // len(some_calm.asks)
    assert load.differences(some_calm.asks * rounds, answers, some_calm.answers * rounds) == []
    assert fortress.status()["counters"].get("lost", 0) == before, "nobody began anew"
    wait_until_whole(fortress)
    add_row("F20", "a decode worker prefills for a while", some_calm, answers)
