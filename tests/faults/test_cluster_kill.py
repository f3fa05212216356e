"""kill -9 of each process that is no worker, under load: streams end as if nothing had been.

Workers have the same test in tests/integration/test_cluster_faults.py, and all of them, with more
load and in pairs, in test_roles.py. A gateway's clients lose their connections with it, and have
the rest of their answers from the next one.
"""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import load
from tests.integration.harness import (
    TestCluster,
    held,
    processes,
    random_prompts,
    replicas,
    storm,
    storm_samplings,
    wait_for,
    wait_until_equal,
)
from tests.models.alone import tokens_alone

STREAMS = 4
OUTPUT_TOKENS = 1600
STRIKE_AT = STREAMS * 20
LATE = [100, 200, 300]

PATIENCE_S = 200.0
"""For a new replica of Serve: noticed within its health period, then a process that imports torch
and loads the model, on two cores that others use too; and for the grace of requests whose gateway
is gone."""


def _prompts() -> list[list[int]]:
    return random_prompts(STREAMS, seed=3, length=300)


@pytest.fixture(scope="module")
def expected(small_model: Path) -> list[list[int]]:
    """What the streams are when nobody strikes."""
    return tokens_alone(small_model, _prompts(), storm_samplings(STREAMS), OUTPUT_TOKENS)


def _leader(cluster: TestCluster) -> int:
    pid: int = cluster.status()["router"]["pid"]
    return pid


def _store(_: TestCluster) -> int:
    return next(iter(processes("pdserve.kvstore.node")), 0)


@pytest.mark.parametrize("find", [_leader, _store], ids=["router", "store"])
def test_streams_go_on_where_they_were(
    cluster: TestCluster, expected: list[list[int]], find: Callable[[TestCluster], int]
) -> None:
    """Long enough that a successor comes while they run; one more begins while there is none."""
    calm_late = cluster.tokens(LATE, 20)
    pid = find(cluster)
    late = threading.Thread(target=lambda: late_tokens.extend(cluster.tokens(LATE, 20)))
    late_tokens: list[int] = []

    def strike() -> None:
        os.kill(pid, signal.SIGKILL)
        late.start()

    struck = storm(cluster, _prompts(), OUTPUT_TOKENS, at=STRIKE_AT, strike=strike)
    assert [stream.error for stream in struck] == [None] * STREAMS
    assert [stream.tokens for stream in struck] == expected
    late.join(PATIENCE_S)
    assert late_tokens == calm_late
    wait_for("a successor", lambda: find(cluster) not in (0, pid), timeout_s=PATIENCE_S)
    wait_for(
        "a standby again",
        lambda: cluster.status()["router"]["standbys"] == 1,
        timeout_s=PATIENCE_S,
    )
    wait_until_equal("held at rest", lambda: held(cluster), 0, timeout_s=PATIENCE_S)


@pytest.mark.slow
def test_the_clients_of_a_killed_gateway_have_the_rest_from_the_next_one(
    cluster: TestCluster,
) -> None:
    """Every kind of answer, broken in the middle; and of the old gateway nothing stays."""
    asks = load.mixed(len(load.KINDS), seed=4, output_tokens=200)
    calm = load.run(cluster.url, asks, clients=len(asks))
    (pid,) = replicas("gateway")
    strikes = [(STRIKE_AT, lambda: os.kill(pid, signal.SIGKILL))]
    struck = load.run(cluster.url, asks, clients=len(asks), strikes=strikes)
    assert load.differences(asks, struck, calm) == []
    assert sum(answer.resumed_count > 0 for answer in struck) >= 3, "there was something to resume"
    assert replicas("gateway") not in ([], [pid])
    wait_until_equal("held at rest", lambda: held(cluster), 0, timeout_s=PATIENCE_S)
