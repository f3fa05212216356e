"""Real signals against real workers under load: nobody loses, repeats or changes a token."""

import asyncio
import os
import random
import signal
from collections.abc import Callable

import httpx
import pytest

from tests.integration.harness import Stream, TestCluster, held, stream_tokens, wait_for

STREAMS = 12
OUTPUT_TOKENS = 120


def _prompts(seed: int, length: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(20, 40_000) for _ in range(length)] for _ in range(STREAMS)]


def _run(
    cluster: TestCluster,
    prompts: list[list[int]],
    *,
    at: int | None = None,
    strike: Callable[[], None] | None = None,
) -> list[Stream]:
    """All prompts at once, half of them seeded; ``strike`` when ``at`` tokens have come in all."""
    seen = 0

    def on_token(_: int) -> None:
        nonlocal seen
        seen += 1
        if seen == at and strike is not None:
            strike()

    async def all_of_them() -> list[Stream]:
        async with httpx.AsyncClient(timeout=300) as client:
            return await asyncio.gather(
                *(
                    stream_tokens(
                        cluster.url,
                        prompt,
                        OUTPUT_TOKENS,
                        client=client,
                        on_token=on_token,
                        temperature=0.8 if index % 2 else 0.0,
                        seed=index,
                        presence_penalty=0.5 if index % 3 == 0 else 0.0,
                    )
                    for index, prompt in enumerate(prompts)
                )
            )

    return asyncio.run(all_of_them())


@pytest.mark.parametrize(("role", "at"), [("decode", STREAMS * 20), ("prefill", 3)])
def test_a_killed_worker_costs_no_token(cluster: TestCluster, role: str, at: int) -> None:
    prompts = _prompts(seed=at, length=700)
    pid = cluster.pids(role)[0]
    struck = _run(cluster, prompts, at=at, strike=lambda: os.kill(pid, signal.SIGKILL))
    assert [stream.error for stream in struck] == [None] * STREAMS
    assert [len(stream.tokens) for stream in struck] == [OUTPUT_TOKENS] * STREAMS
    wait_for(
        f"a new {role} worker", lambda: len(cluster.pids(role)) == (2 if role == "decode" else 1)
    )
    assert pid not in cluster.pids(role)
    calm = _run(cluster, prompts)
    assert [stream.tokens for stream in struck] == [stream.tokens for stream in calm]


def test_cancelling_in_any_phase_gives_everything_back(cluster: TestCluster) -> None:
    wait_for("quiet", lambda: held(cluster) == 0)
    chance = random.Random(5)
    prompts = _prompts(seed=99, length=1200)

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
