"""kill -9 of each process that is no worker, under load: streams end as if nothing had been.

Workers have the same test in tests/integration/test_cluster_faults.py. The gateway is the
exception: its clients' connections die with it, so what must hold is that nothing of them stays.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

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

PAUSE_S_MAX = 30.0
"""A new replica of Serve: noticed within its health period, then a process that imports torch and
loads the model. Two shared cores take most of this."""

GIVEN_BACK_S = 20.0
"""The grace of requests whose gateway is gone, twice."""


def _prompts() -> list[list[int]]:
    return random_prompts(STREAMS, seed=3, length=300)


@pytest.fixture(scope="module")
def expected(small_model: Path) -> list[list[int]]:
    """What the streams are when nobody strikes."""
    return tokens_alone(small_model, _prompts(), storm_samplings(STREAMS), OUTPUT_TOKENS)


def _serves(cluster: TestCluster) -> bool:
    try:
        return cluster.tokens(LATE, 2) != []
    except (httpx.HTTPError, OSError):
        return False


@pytest.mark.parametrize(
    "find",
    [lambda: replicas("router"), lambda: processes("pdserve.kvstore.node")],
    ids=["router", "store"],
)
def test_streams_go_on_where_they_were(
    cluster: TestCluster, expected: list[list[int]], find: Callable[[], list[int]]
) -> None:
    """Long enough that a successor comes while they run; one more begins while there is none."""
    calm_late = cluster.tokens(LATE, 20)
    (pid,) = find()
    late = threading.Thread(target=lambda: late_tokens.extend(cluster.tokens(LATE, 20)))
    late_tokens: list[int] = []

    def strike() -> None:
        os.kill(pid, signal.SIGKILL)
        late.start()

    struck = storm(cluster, _prompts(), OUTPUT_TOKENS, at=STRIKE_AT, strike=strike)
    assert [stream.error for stream in struck] == [None] * STREAMS
    assert [stream.tokens for stream in struck] == expected
    assert max(stream.pause_s for stream in struck) <= PAUSE_S_MAX
    late.join(PAUSE_S_MAX)
    assert late_tokens == calm_late
    wait_for("a successor", lambda: find() not in ([], [pid]))
    wait_until_equal("held at rest", lambda: held(cluster), 0)


def test_a_killed_gateway_leaves_nothing_behind_and_is_replaced(cluster: TestCluster) -> None:
    prompts = random_prompts(STREAMS, seed=4, length=300)
    before = cluster.tokens(prompts[0], 10)
    (pid,) = replicas("gateway")
    broken: list[Exception] = []

    def clients() -> None:
        try:
            storm(cluster, prompts, 4000, at=STRIKE_AT, strike=lambda: os.kill(pid, signal.SIGKILL))
        except httpx.HTTPError as error:
            broken.append(error)

    thread = threading.Thread(target=clients)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert len(broken) == 1, "the clients' connections were the gateway's"
    begun_s = time.monotonic()
    wait_for("a new gateway", lambda: _serves(cluster), timeout_s=PAUSE_S_MAX)
    left_s = GIVEN_BACK_S - (time.monotonic() - begun_s)
    wait_until_equal("held at rest", lambda: held(cluster), 0, timeout_s=max(1.0, left_s))
    assert pid not in replicas("gateway")
    assert cluster.tokens(prompts[0], 10) == before
