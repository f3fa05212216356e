"""Pools that grow and shrink under load: by Serve's autoscaling, and by `serve deploy`."""

import asyncio
import random
import threading
from pathlib import Path

import httpx
import pytest

from tests.integration.deployed import deployed
from tests.integration.harness import (
    Stream,
    TestCluster,
    held,
    random_prompts,
    settings,
    storm,
    stream_tokens,
    wait_for,
    wait_until_equal,
)

SCALE_S_MAX = 120.0
"""For a worker to start or to leave, on a machine that does much else."""


def _prompt(seed: int, length: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(20, 40_000) for _ in range(length)]


class Load:
    """Streams that keep coming until told to stop; every one is kept."""

    def __init__(self, url: str, *, at_once: int, output_tokens: int) -> None:
        self.url = url
        self.at_once = at_once
        self.output_tokens = output_tokens
        self.done: list[tuple[int, Stream]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(120)
        assert not self._thread.is_alive()

    async def _run(self) -> None:
        async with httpx.AsyncClient(
            timeout=300, limits=httpx.Limits(max_connections=512)
        ) as client:
            await asyncio.gather(*(self._one_by_one(client, lane) for lane in range(self.at_once)))

    async def _one_by_one(self, client: httpx.AsyncClient, lane: int) -> None:
        number = lane
        while not self._stop.is_set():
            stream = await stream_tokens(
                self.url, _prompt(number, 80), self.output_tokens, client=client
            )
            self.done.append((number, stream))
            number += self.at_once


def test_a_burst_brings_a_second_decode_worker_and_silence_takes_it_away(
    careless_cluster: TestCluster,
) -> None:
    cluster = careless_cluster
    with Load(cluster.url, at_once=24, output_tokens=200) as load:
        wait_for(
            "a second decode worker",
            lambda: len(cluster.pids("decode")) == 2,
            timeout_s=SCALE_S_MAX,
        )
    wait_for(
        "one decode worker again",
        lambda: len(cluster.pids("decode")) == 1,
        timeout_s=SCALE_S_MAX,
    )
    assert load.done
    _assert_all_whole(load)


@pytest.mark.slow
def test_serve_deploy_from_one_to_three_to_one_under_load(small_model: Path) -> None:
    config = settings(
        small_model,
        model={"dtype": "float32"},
        decode={"replicas": 1, "replicas_max": 1, "threads": 1, "pool_blocks": 512},
    )
    with deployed(config, by_command=True) as cluster:
        with Load(cluster.url, at_once=12, output_tokens=200) as load:
            for count in (3, 1):
                cluster.deploy(decode_replicas=count)
                wait_for(
                    f"{count} decode workers",
                    lambda count=count: len(cluster.pids("decode")) == count,  # type: ignore[misc]
                )
            already = len(load.done)
            wait_for("more streams to end", lambda: len(load.done) > already + 12)
        _assert_all_whole(load)
        sample = load.done[:: max(1, len(load.done) // 20)]
        for number, stream in sample:
            assert stream.tokens == cluster.tokens(_prompt(number, 80), 200)


def _assert_all_whole(load: Load) -> None:
    """No failed request, no gap, no duplicate: each stream has all its tokens, and no more."""
    assert [stream.error for _, stream in load.done if stream.error] == []
    assert {len(stream.tokens) for _, stream in load.done} == {load.output_tokens}


@pytest.mark.slow
def test_a_decode_worker_that_leaves_hands_its_streams_over(small_model: Path) -> None:
    """They go on at the other worker from where they were, and nothing is computed again."""
    config = settings(
        small_model,
        model={"dtype": "float32"},
        decode={"replicas": 1, "replicas_max": 1, "threads": 1, "pool_blocks": 512},
    )
    with deployed(config) as cluster:
        cluster.deploy(decode_replicas=2)
        wait_for("two decode workers", lambda: len(cluster.pids("decode")) == 2)
        prompts = random_prompts(4, seed=7, length=300)
        calm = storm(cluster, prompts, 1600)
        before = cluster.status()["counters"]
        shrinking = threading.Thread(target=lambda: cluster.deploy(decode_replicas=1))
        struck = storm(cluster, prompts, 1600, at=40, strike=shrinking.start)
        shrinking.join(60)
        assert [stream.error for stream in struck] == [None] * len(prompts)
        assert [stream.tokens for stream in struck] == [stream.tokens for stream in calm]
        wait_for("one decode worker", lambda: len(cluster.pids("decode")) == 1)
        wait_until_equal("held at rest", lambda: held(cluster), 0)
        after = cluster.status()["counters"]
        assert after.get("parks", 0) > before.get("parks", 0), "it left while it had streams"
        assert after["resumes"] == after["parks"]
        assert after.get("lost", 0) == before.get("lost", 0), "no new attempt was needed"
