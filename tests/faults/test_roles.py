"""Every role killed, stopped or told to leave, alone and in pairs, under load of every kind: F1 to
F6, F10, F19, F24."""

import functools
import itertools
import os
import random
import signal
import time
from dataclasses import dataclass

import pytest

from pdserve.cluster.kv_master import master_report, masters_in
from pdserve.cluster.kv_stores import stores_of
from tests.faults import load
from tests.faults.fortress import (
    CLIENTS,
    REPLACED_S,
    ROLES,
    SEED,
    SILENCE_MS,
    Calm,
    Stops,
    add_row,
    wait_until_whole,
)
from tests.integration.harness import TestCluster, gone, wait_for, wait_until_equal

STRIKES = (0.3, 0.5)  # of all events: when the first and when the second fault of a pair strikes
STOPPED_S = 5.0
STOPPED_LONG_S = 30.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILL, LEAVE, STOP = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP


@dataclass(frozen=True, slots=True)
class Blow:
    by: signal.Signals
    role: str

    def __str__(self) -> str:
        return f"{self.by.name} of {self.role}"


@dataclass(frozen=True, slots=True)
class Fault:
    """What strikes, one after the other."""

    number: str  # in the table of faults
    blows: tuple[Blow, ...]

    def __str__(self) -> str:
        return "-".join([self.number, *(f"{blow.by.name}-{blow.role}" for blow in self.blows)])

    @property
    def has_whole_load(self) -> bool:
        """As the peer had whose figures are beside ours."""
        return self.number in KILLED and len(self.blows) == 1

    @property
    def what(self) -> str:
        return " and ".join(map(str, self.blows))


KILLED = {"F2": "prefill", "F3": "decode", "F4": "router", "F5": "gateway", "F6": "store"}
STOPPED_PAIRS = [
    ("prefill", "decode"),
    ("decode", "store"),
    ("store", "router"),
    ("router", "prefill"),
    ("gateway", "router"),
]
FAULTS = [
    *(Fault(number, (Blow(KILL, role),)) for number, role in KILLED.items()),
    Fault("F4", (Blow(KILL, "standby"),)),
    Fault("F6", (Blow(KILL, "master"),)),
    *(Fault("F10", (Blow(STOP, role),)) for role in ROLES if role != "router"),
    *(Fault("F19", (Blow(LEAVE, role),)) for role in ("prefill", "decode", "router", "gateway")),
    *(
        Fault("F24", (Blow(KILL, one), Blow(KILL, other)))
        for one, other in itertools.combinations(KILLED.values(), 2)
    ),
    *(Fault("F24", (Blow(KILL, one), Blow(STOP, other))) for one, other in STOPPED_PAIRS),
]


def test_nobody_strikes(fortress: TestCluster, calm: Calm) -> None:
    answers = load.run(fortress.url, calm.asks, clients=CLIENTS)
    assert load.differences(calm.asks, answers, calm.answers) == []
    wait_until_whole(fortress)
    add_row("F1", "none", calm, answers)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_process_ends_or_stops(
    fortress: TestCluster, calm: Calm, stops: Stops, fault: Fault
) -> None:
    calm = calm if fault.has_whole_load else calm.beginning()
    chance = random.Random(SEED)
    victims = [chance.choice(ROLES[blow.role](fortress)) for blow in fault.blows]
    strikes = [
        (
            round(calm.events * share),
            functools.partial(stops.stop, victim, STOPPED_S)
            if blow.by is STOP
            else functools.partial(os.kill, victim, blow.by),
        )
        for share, blow, victim in zip(STRIKES, fault.blows, victims, strict=False)
    ]
    answers = load.run(fortress.url, calm.asks, clients=CLIENTS, strikes=strikes)
    assert load.differences(calm.asks, answers, calm.answers) == []
    stops.wait()
    ended = [
        victim for blow, victim in zip(fault.blows, victims, strict=True) if blow.by is not STOP
    ]
    wait_until_equal(
        "who still lives", lambda: [p for p in ended if not gone(p)], [], timeout_s=REPLACED_S
    )
    wait_until_whole(fortress)
    add_row(fault.number, fault.what, calm, answers, note=_index(fortress, fault))


def _index(cluster: TestCluster, fault: Fault) -> str:
    """Both masters die; their successors ask every store node what it holds."""
    if all(blow.role != "master" for blow in fault.blows):
        return ""
    with stores_of(cluster.url, ()) as stores:
        masters = masters_in(store.admin.report() for store in stores)
        assert masters

        def is_whole() -> bool:
            report = master_report(masters)
            return report is not None and report.is_whole and report.blocks > 0

        wait_for("a whole index", is_whole, timeout_s=REPLACED_S)
        for pid in ROLES["master"](cluster):
            os.kill(pid, KILL)
        begun_s = time.monotonic()
        wait_for("a whole index again", is_whole, timeout_s=REPLACED_S)
        took_s = time.monotonic() - begun_s
    wait_until_whole(cluster)
    return f"both killed: index whole after {took_s:.1f} s"


def test_the_router_is_stopped_and_goes_on(
    fortress: TestCluster, some_calm: Calm, stops: Stops
) -> None:
    """Twice as long as silence is borne: it comes back deposed, and nobody listens to it."""
    before = fortress.status()["router"]
    stopped_s = 2 * SILENCE_MS / 1000
    strikes = [(some_calm.events // 4, lambda: stops.stop(before["pid"], stopped_s))]
    answers = load.run(fortress.url, some_calm.asks, clients=CLIENTS, strikes=strikes)
    stops.wait()
    assert load.differences(some_calm.asks, answers, some_calm.answers) == []
    wait_until_whole(fortress)
    assert fortress.status()["router"]["epoch"] > before["epoch"]
    add_row("F10", f"SIGSTOP of router for {stopped_s:g} s", some_calm, answers)


def test_a_gateway_is_stopped_for_long(
    fortress: TestCluster, some_calm: Calm, stops: Stops
) -> None:
    """Its streams stand still, with no more kept of them than a bound says, and then go on."""
    victim = random.Random(SEED).choice(ROLES["gateway"](fortress))
    strikes = [(some_calm.events // 4, lambda: stops.stop(victim, STOPPED_LONG_S))]
    answers = load.run(fortress.url, some_calm.asks, clients=CLIENTS, strikes=strikes)
    stops.wait()
    assert load.differences(some_calm.asks, answers, some_calm.answers) == []
    wait_until_whole(fortress)
    add_row("F10", f"SIGSTOP of gateway for {STOPPED_LONG_S:g} s", some_calm, answers)
