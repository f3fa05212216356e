"""The cluster that most faults strike: two of each role but the store, which is one per host.

Its first run without a fault says what the answers are. Its processes believe in a wall clock that
tests can set (``jumping/sitecustomize.py``).
"""

import atexit
import contextlib
import functools
import os
import signal
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import load, rows
from tests.integration.harness import (
    TestCluster,
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
FEW = 64  # requests
SEED = 6
REPLACED_S = 120.0
SILENCE_MS = 5_000
"""After which a router that says nothing is succeeded."""

JUMPING = Path(__file__).parent / "jumping"
OFFSET_NS = Path(tempfile.gettempdir()) / f"pdserve-test-clock-{os.getpid()}"
"""How far the cluster's wall clock is ahead."""
atexit.register(functools.partial(OFFSET_NS.unlink, missing_ok=True))

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
    "master": lambda _: processes("pdserve.kvstore.masters.process"),
}
REPLICAS = {"prefill": 2, "decode": 2, "router": 2, "gateway": 2, "store": 1, "master": 2}


@pytest.fixture
def fortress(small_model: Path, cluster_port: int) -> TestCluster:
    pool = {"replicas": 2, "replicas_max": 2, "threads": 1, "pool_blocks": 512, "cpus": 0.1}
    config = settings(
        small_model,
        model={"dtype": "float32"},
        prefill=pool | {"chunk_tokens": 128},
        decode=pool,
        router={
            "replicas": 2,
            "router_silence_ms": SILENCE_MS,
            "first_quantum_ms": 1.0,
            "prefill_tokens_per_s": 5_000_000,
        },
        gateway={"replicas": 2, "http_port": cluster_port},
        store={"arena_bytes": 128 << 20, "master": "on"},
    )
    set_clock(0)
    path = os.pathsep.join([str(JUMPING), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": path, "PDSERVE_TEST_CLOCK": str(OFFSET_NS)}
    return shared(config, environment=environment)


def set_clock(ahead_s: float) -> None:
    """The wall clock of every process of the fortress, from now on."""
    # In place: its processes have the file in their memory.
    descriptor = os.open(OFFSET_NS, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, struct.pack("=q", round(ahead_s * 1e9)), 0)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Calm:
    asks: list[load.Ask]
    answers: list[load.Answer]

    @property
    def events(self) -> int:
        """About so many: fewer than tokens, since those that are ready at once come in one."""
        return sum(len(c["tokens"]) for each in self.answers for c in each.choices.values()) // 2

    def beginning(self) -> "Calm":
        """A quarter of the load, where that is enough of one."""
        count = max(len(self.asks) // 4, FEW)
        return Calm(self.asks[:count], self.answers[:count])


_calm: list[Calm] = []


@pytest.fixture
def calm(fortress: TestCluster) -> Calm:
    """The load without a fault, once a run; and the cluster is whole before each test."""
    wait_until_whole(fortress)
    if not _calm:
        asks = load.mixed(REQUESTS, seed=SEED)
        answers = load.run(fortress.url, asks, clients=CLIENTS)
        assert [answer.error for answer in answers if answer.error] == []
        _calm.append(Calm(asks, answers))
    return _calm[0]


@pytest.fixture
def some_calm(calm: Calm) -> Calm:
    """For the many faults whose single ones have had the whole load."""
    return calm.beginning()


def wait_until_whole(cluster: TestCluster) -> None:
    """Every role has its replicas, and nothing is held."""

    def counts() -> dict[str, int]:
        status = cluster.status()
        found = {role: len(ROLES[role](cluster)) for role in REPLICAS if role != "router"}
        return found | {"router": 1 + status["router"]["standbys"]}

    def is_whole() -> bool:
        try:
            return counts() == REPLICAS
        except OSError:  # the gateway that was asked is no more
            return False

    wait_for("every role to be whole", is_whole, timeout_s=REPLACED_S)
    wait_until_equal("held at rest", lambda: held(cluster), 0, timeout_s=REPLACED_S)


class Stops:
    """SIGSTOP, and SIGCONT after a while; whoever is still stopped at the end goes on too."""

    def __init__(self) -> None:
        self._timers: list[threading.Timer] = []
        self._stopped: set[int] = set()

    def stop(self, pid: int, span_s: float) -> None:
        os.kill(pid, signal.SIGSTOP)
        self._stopped.add(pid)
        self._timers.append(threading.Timer(span_s, functools.partial(self._go_on, pid)))
        self._timers[-1].start()

    def wait(self) -> None:
        for timer in self._timers:
            timer.join()

    def end(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for pid in sorted(self._stopped):
            self._go_on(pid)

    def _go_on(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # somebody has ended it meanwhile
            os.kill(pid, signal.SIGCONT)
        self._stopped.discard(pid)


@pytest.fixture
def stops() -> Iterator[Stops]:
    made = Stops()
    yield made
    made.end()


def add_row(
    fault: str, what: str, calm: Calm, answers: list[load.Answer], *, note: str = ""
) -> None:
    """After a load that was answered as it must be."""
    rounds = len(answers) // len(calm.asks)
    wrong = load.differences(calm.asks * rounds, answers, calm.answers * rounds)
    assert wrong == []
    rows.add(
        rows.Row(
            fault=fault,
            what=what,
            load=f"{CLIENTS} clients, {len(answers)} requests",
            identical=len(answers) - len(wrong),
            asked=len(answers),
            note="; ".join(filter(None, [load.told_of(answers), note])),
            seed=SEED,
        )
    )
