"""A bad network between hosts, under load of every kind: F11. What one host sends another is lost,
late, twice and out of order; clients are as near to the gateway as ever."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import load, rows
from tests.hosts.cluster import DECODE, HEAD, PREFILL, HostedCluster, hosted, hosted_settings
from tests.hosts.links import Link
from tests.hosts.namespaces import network
from tests.integration.harness import end_ray, held, wait_until_equal

CLIENTS = 4
REQUESTS = 56
SEED = 11
START_S = 150.0
QUIET_S = 120.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LINKS = {
    "1 % lost": Link(loss_ratio=0.01),
    "5 % lost": Link(loss_ratio=0.05),
    "10 % lost": Link(loss_ratio=0.1),
    "50 to 500 ms late": Link(delay_ms=50, jitter_ms=450),
    "5 % twice, out of order, 1 % lost": Link(
        delay_ms=5, jitter_ms=20, duplicate_ratio=0.05, loss_ratio=0.01
    ),
}


@pytest.fixture(scope="module")
def hosts(small_model: Path) -> Iterator[HostedCluster]:
    end_ray()  # what else runs would take the processors of three more
    with (
        network([HEAD, PREFILL, DECODE], seed=SEED) as made,
        hosted(made, hosted_settings(small_model, made)) as cluster,
    ):
        cluster.wait_until_it_serves(within_s=START_S)
        yield cluster
        made.heal()


_calm: list[load.Answer] = []


@pytest.mark.parametrize("name", LINKS)
def test_every_packet_may_be_lost_or_late(hosts: HostedCluster, name: str) -> None:
    asks = load.mixed(REQUESTS, seed=SEED)
    if not _calm:
        _calm.extend(load.run(hosts.url, asks, clients=CLIENTS))
    hosts.network.everywhere(LINKS[name])
    try:
        answers = load.run(hosts.url, asks, clients=CLIENTS)
    finally:
        hosts.network.heal()
    assert load.differences(asks, answers, _calm) == []
    wait_until_equal("held at rest", lambda: held(hosts.served), 0, timeout_s=QUIET_S)
    rows.enter(
        "F11",
        f"between hosts: {name}",
        f"{CLIENTS} clients, {REQUESTS} requests",
        load.told_of(answers),
        seed=SEED,
        whole=REQUESTS,
    )
