"""Real signals against real workers under load: nobody loses, repeats or changes a token."""

import asyncio
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.integration.harness import (
    TestCluster,
    held,
    random_prompts,
    storm,
    stream_tokens,
    wait_for,
)

STREAMS = 12
OUTPUT_TOKENS = 120


@pytest.mark.parametrize(("role", "at"), [("decode", STREAMS * 20), ("prefill", 3)])
def test_a_killed_worker_costs_no_token(cluster: TestCluster, role: str, at: int) -> None:
    prompts = random_prompts(STREAMS, seed=at, length=700)
    pid = cluster.pids(role)[0]
    struck = storm(
        cluster, prompts, OUTPUT_TOKENS, at=at, strike=lambda: os.kill(pid, signal.SIGKILL)
    )
    assert [stream.error for stream in struck] == [None] * STREAMS
    assert [len(stream.tokens) for stream in struck] == [OUTPUT_TOKENS] * STREAMS
    wait_for(
        f"a new {role} worker", lambda: len(cluster.pids(role)) == (2 if role == "decode" else 1)
    )
    assert pid not in cluster.pids(role)
    calm = storm(cluster, prompts, OUTPUT_TOKENS)
    assert [stream.tokens for stream in struck] == [stream.tokens for stream in calm]


@pytest.mark.slow
def test_a_search_whose_worker_is_killed_finds_the_same_answers(cluster: TestCluster) -> None:
    fields = {"n": 2, "best_of": 8, "use_beam_search": True, "max_tokens": 600, "ignore_eos": True}

    def answers() -> list[str]:
        whole = cluster.complete(random_prompts(1, seed=6, length=45)[0], **fields)
        return [choice["text"] for choice in whole["choices"]]

    def searching() -> list[int]:
        """Workers that have it; a search counts as many sequences as it is wide."""
        return [w["pid"] for w in cluster.workers("decode") if w["running"] == 8]

    calm = answers()
    wait_for("quiet", lambda: held(cluster) == 0)
    with ThreadPoolExecutor(1) as pool:
        struck = pool.submit(answers)
        wait_for("the search to run", lambda: searching() != [])
        os.kill(searching()[0], signal.SIGKILL)
        assert not struck.done()
        assert struck.result(timeout=120) == calm
    wait_for("a new worker", lambda: len(cluster.pids("decode")) == 2)
    wait_for("everything to be given back", lambda: held(cluster) == 0)


def test_cancelling_in_any_phase_gives_everything_back(cluster: TestCluster) -> None:
    wait_for("quiet", lambda: held(cluster) == 0)
    chance = random.Random(5)
    prompts = random_prompts(STREAMS, seed=99, length=1200)

    async def walk_away(client: httpx.AsyncClient, prompt: list[int], after_s: float) -> None:
        with pytest.raises((TimeoutError, httpx.HTTPError)):
            async with asyncio.timeout(after_s):
                await stream_tokens(cluster.url, prompt, 4000, client=client)

    async def all_of_them() -> None:
        async with httpx.AsyncClient(timeout=300) as client:
            await asyncio.gather(
                *(walk_away(client, prompt, chance.uniform(0.01, 1.5)) for prompt in prompts)
            )

    asyncio.run(all_of_them())
    wait_for("everything to be given back", lambda: held(cluster) == 0, timeout_s=5)
