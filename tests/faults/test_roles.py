"""Every role killed, stopped or told to leave, alone and in pairs, under load of every kind: F1 to
F6, F10 of the router, F19, F24.

One cluster for all: two of each role but the store, which is one per host. Its first run without a
fault says what the answers are.
"""

import functools
import itertools
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import load, rows
from tests.integration.harness import (
    TestCluster,
    gone,
    held,
    processes,
    replicas,
    settings,
    shared,
    wait_for,
    wait_until_equal,
)

CLIENTS = 8
REQUESTS = CLIENTS * int(os.environ.get("FAULTS_REQUESTS_PER_CLIENT", "100"))
SEED = 6
STRIKES = (0.3, 0.5)  # of all events: when the first and when the second fault of a pair strikes
REPLACED_S = 120.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Victims = Callable[[TestCluster], list[int]]

ROLES: dict[str, Victims] = {
    "prefill": lambda cluster: cluster.pids("prefill"),
    "decode": lambda cluster: cluster.pids("decode"),
    "router": lambda cluster: [cluster.status()["router"]["pid"]],
    "standby": lambda cluster: [
        pid for pid in replicas("router") if pid != cluster.status()["router"]["pid"]
    ],
    "gateway": lambda _: replicas("gateway"),
    "store": lambda _: processes("pdserve.kvstore.node"),
}
REPLICAS = {"prefill": 2, "decode": 2, "router": 2, "gateway": 2}


@dataclass(frozen=True, slots=True)
class Fault:
    """What strikes, one after the other."""

    number: str  # in the table of faults
    roles: tuple[str, ...]
    by: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        return f"{self.number}-{self.by.name}-{'-'.join(self.roles)}"

    @property
    def what(self) -> str:
        return f"{self.by.name} of {' and '.join(self.roles)}"


KILLED = {"F2": "prefill", "F3": "decode", "F4": "router", "F5": "gateway", "F6": "store"}
PAIRS = list(itertools.combinations(KILLED.values(), 2))
FAULTS = [
    *(Fault(number, (role,)) for number, role in KILLED.items()),
    Fault("F4", ("standby",)),
    *(Fault("F19", (role,), signal.SIGTERM) for role in ("prefill", "decode", "router", "gateway")),
    *(Fault("F24", pair) for pair in PAIRS),
]


@pytest.fixture
def fortress(small_model: Path, cluster_port: int) -> TestCluster:
    pool = {"replicas": 2, "replicas_max": 2, "threads": 1, "pool_blocks": 512, "cpus": 0.1}
    return shared(
        settings(
            small_model,
            model={"dtype": "float32"},
            prefill=pool | {"chunk_tokens": 128},
            decode=pool,
            router={
                "replicas": 2,
                "router_silence_ms": 5_000,
                "first_quantum_ms": 1.0,
                "prefill_tokens_per_s": 5_000_000,
            },
            gateway={"replicas": 2, "http_port": cluster_port},
        )
    )


@dataclass(frozen=True, slots=True)
class Calm:
    asks: list[load.Ask]
    answers: list[load.Answer]
    events: int


_calm: list[Calm] = []


@pytest.fixture
def calm(fortress: TestCluster) -> Calm:
    """The load without a fault, once a run."""
    if not _calm:
        asks = load.mixed(REQUESTS, seed=SEED)
        wait_until_whole(fortress)
        answers = load.run(fortress.url, asks, clients=CLIENTS)
        assert [answer.error for answer in answers if answer.error] == []
        # There are fewer events than tokens: those that are ready at once come in one.
        tokens = sum(len(c["tokens"]) for answer in answers for c in answer.choices.values())
        _calm.append(Calm(asks, answers, tokens // 2))
    return _calm[0]


def wait_until_whole(cluster: TestCluster) -> None:
    """Every role has its replicas, and nothing is held."""

    def counts() -> dict[str, int]:
        status = cluster.status()
        found = {role: len(cluster.pids(role)) for role in ("prefill", "decode")}
        return found | {
            "router": 1 + status["router"]["standbys"],
            "gateway": len(replicas("gateway")),
        }

    def is_whole() -> bool:
        try:
            return counts() == REPLICAS
        except OSError:  # the gateway that was asked is no more
            return False

    wait_for("every role to be whole", is_whole, timeout_s=REPLACED_S)
    wait_until_equal("held at rest", lambda: held(cluster), 0, timeout_s=REPLACED_S)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if not gone(pid)]


def add_row(fault: str, what: str, calm: Calm, answers: list[load.Answer]) -> None:
    """After a load that was answered as it must be."""
    resumed = sum(answer.resumed_count > 0 for answer in answers)
    pause_s = max(answer.pause_s for answer in answers)
    rows.add(
        rows.Row(
            fault=fault,
            what=what,
            load=f"{CLIENTS} clients, {len(calm.asks)} requests",
            identical=len(answers) - len(load.differences(calm.asks, answers, calm.answers)),
            asked=len(answers),
            note=f"pause {pause_s:.1f} s" + (f", {resumed} streams resumed" if resumed else ""),
            seed=SEED,
        )
    )


def test_nobody_strikes(fortress: TestCluster, calm: Calm) -> None:
    answers = load.run(fortress.url, calm.asks, clients=CLIENTS)
    assert load.differences(calm.asks, answers, calm.answers) == []
    wait_until_whole(fortress)
    add_row("F1", "none", calm, answers)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_process_ends(fortress: TestCluster, calm: Calm, fault: Fault) -> None:
    chance = random.Random(SEED)
    wait_until_whole(fortress)
    victims = [chance.choice(ROLES[role](fortress)) for role in fault.roles]
    strikes = [
        (round(calm.events * share), functools.partial(os.kill, victim, fault.by))
        for share, victim in zip(STRIKES, victims, strict=False)
    ]
    answers = load.run(fortress.url, calm.asks, clients=CLIENTS, strikes=strikes)
    assert load.differences(calm.asks, answers, calm.answers) == []
    wait_until_equal("who still lives", lambda: alive(victims), [], timeout_s=REPLACED_S)
    wait_until_whole(fortress)
    add_row(fault.number, fault.what, calm, answers)


def test_the_router_is_stopped_and_goes_on(fortress: TestCluster, calm: Calm) -> None:
    """Twice as long as silence is borne: it comes back deposed, and nobody listens to it."""
    wait_until_whole(fortress)
    before = fortress.status()["router"]
    stopped_s = 2 * fortress.config.router.router_silence_ms / 1000
    waking = threading.Timer(stopped_s, lambda: os.kill(before["pid"], signal.SIGCONT))

    def strike() -> None:
        os.kill(before["pid"], signal.SIGSTOP)
        waking.start()

    strikes = [(calm.events // 4, strike)]
    answers = load.run(fortress.url, calm.asks, clients=CLIENTS, strikes=strikes)
    waking.join()
    assert load.differences(calm.asks, answers, calm.answers) == []
    wait_until_whole(fortress)
    after = fortress.status()["router"]
    assert after["epoch"] > before["epoch"]
    what = f"SIGSTOP of the router for {stopped_s:g} s"
    add_row("F10", what, calm, answers)
