"""The autoscaler on a real cluster: sleep and waking, scaling under load, and what it says."""

import asyncio
import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pdserve.cluster.commands.autoscaler import render
from pdserve.cluster.http_client import post_json
from pdserve.errors import PdserveError
from tests.integration.harness import (
    TestCluster,
    assign_role,
    held,
    random_prompts,
    running,
    settings,
    storm,
    stream_tokens,
    wait_for,
    wait_until_equal,
)

pytestmark = pytest.mark.slow

START_S_MAX = 180.0
"""Of a worker on a machine that does much else."""


def told(cluster: TestCluster) -> dict[str, Any]:
    with urllib.request.urlopen(f"{cluster.url}/cluster/autoscaling", timeout=10) as answer:
        said: dict[str, Any] = json.load(answer)
        return said


def test_pools_sleep_when_nobody_comes_and_the_first_request_wakes_them(small_model: Path) -> None:
    config = settings(
        small_model,
        model={"dtype": "float32"},
        prefill={"replicas": 0, "replicas_max": 1},
        decode={"replicas": 0, "replicas_max": 1},
        autoscaling={"zero_delay_s": 5.0, "downscale_delay_s": 2.0, "metrics_interval_s": 0.5},
    )
    prompt = random_prompts(1, seed=3, length=120)[0]
    with running(config) as cluster:
        before = cluster.tokens(prompt, 12)
        for _ in range(2):
            wait_for(
                "both pools to sleep",
                lambda: not cluster.pids("prefill") and not cluster.pids("decode"),
                timeout_s=START_S_MAX,
            )
            stream = asyncio.run(stream_tokens(cluster.url, prompt, 12))
            assert stream.error is None
            assert stream.tokens == before
        changes = [(one["pool"], one["wanted"]) for one in told(cluster)["changes"]]
        assert [count for pool, count in changes if pool == "decode"][:2] == [0, 1]
        assert [count for pool, count in changes if pool == "prefill"][:2] == [0, 1]
        wait_until_equal("held at rest", lambda: held(cluster), 0, timeout_s=60)


def test_a_pool_that_shrinks_under_load_loses_no_stream(small_model: Path) -> None:
    """A burst brings a second decode worker; it leaves while four long streams go on."""
    config = settings(
        small_model,
        model={"dtype": "float32"},
        decode={"replicas": 1, "replicas_max": 2, "running_max": 8},
        autoscaling={
            "upscale_delay_s": 0.5,
            "downscale_delay_s": 2.0,
            "metrics_interval_s": 0.5,
            "kv_pressure_ratio": 1.0,
        },
    )
    prompts = random_prompts(4, seed=5, length=120)
    burst = random_prompts(24, seed=6, length=80)
    with running(config) as cluster, _repeated(cluster, prompts, 600) as steady:
        while len(cluster.pids("decode")) < 2:
            assert [stream.error for stream in storm(cluster, burst, 200) if stream.error] == []
        wait_for("one decode worker again", lambda: len(cluster.pids("decode")) == 1, timeout_s=300)
        assert cluster.status()["counters"].get("lost", 0) == 0
        rounds = len(steady)
        wait_for("another round of streams", lambda: len(steady) > rounds + 1, timeout_s=300)
    for streams in steady:
        assert [stream.error for stream in streams] == [None] * len(prompts)
        assert [s.tokens for s in streams] == [s.tokens for s in steady[0]]
        assert {len(s.tokens) for s in streams} == {600}


@contextmanager
def _repeated(cluster: TestCluster, prompts: list[list[int]], count: int) -> Iterator[list[Any]]:
    """The same prompts over and over; all rounds, once it has ended."""
    rounds: list[Any] = []
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            rounds.append(storm(cluster, prompts, count))

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield rounds
    finally:
        stop.set()
        thread.join(300)
        assert not thread.is_alive()


def test_a_worker_takes_another_role_under_load_and_gives_it_back(cluster: TestCluster) -> None:
    prompts = random_prompts(6, seed=11, length=200)
    calm = storm(cluster, prompts, 160)
    before = cluster.status()["counters"]
    worker = cluster.workers("decode")[0]["worker"]
    try:
        struck = storm(
            cluster, prompts, 160, at=40, strike=lambda: assign_role(cluster, worker, "prefill")
        )
        assert [stream.error for stream in struck] == [None] * len(prompts)
        assert [stream.tokens for stream in struck] == [stream.tokens for stream in calm]
        assert len(cluster.workers("prefill")) == 2
        # Whoever prefills, the answers are the same.
        again = storm(
            cluster, prompts, 160, at=40, strike=lambda: assign_role(cluster, worker, "decode")
        )
        assert [stream.tokens for stream in again] == [stream.tokens for stream in calm]
    finally:
        assign_role(cluster, worker, "decode")
    assert len(cluster.workers("decode")) == 2
    after = cluster.status()["counters"]
    assert after.get("lost", 0) == before.get("lost", 0), "nobody began anew"
    wait_until_equal("held at rest", lambda: held(cluster), 0, timeout_s=60)


def test_a_role_that_cannot_be_is_refused_with_the_reason(cluster: TestCluster) -> None:
    only = cluster.workers("prefill")[0]["worker"]
    with pytest.raises(PdserveError, match="is the only worker that prefills"):
        assign_role(cluster, only, "decode")
    with pytest.raises(PdserveError, match="must be one of prefill, decode, both"):
        assign_role(cluster, only, "router")
    with pytest.raises(PdserveError, match="worker: is missing"):
        post_json(cluster.url, "/cluster/role", {"role": "decode"})


def test_the_autoscaler_says_what_it_sees_and_why_it_leaves_things_as_they_are(
    cluster: TestCluster,
) -> None:
    wait_for("a first decision", lambda: len(told(cluster)["latest"]) == 2)
    said = told(cluster)
    assert [(pool["pool"], pool["wanted"]) for pool in said["pools"]] == [
        ("prefill", 1),
        ("decode", 2),
    ]
    assert all(one["why"] for one in said["latest"])
    shown = StringIO()
    Console(file=shown, width=200).print(render(said))
    assert "no changes so far" in shown.getvalue()
