"""The router's levels in a real cluster: prompts of many lengths, and a guess that was too good."""

import asyncio
import random

import httpx

from tests.integration.harness import Stream, TestCluster, stream_tokens

LENGTHS = (20, 40, 90, 200, 450, 1000, 2000, 4000)


def test_prompts_of_many_lengths_use_many_levels(cluster: TestCluster) -> None:
    """The first estimates put everything into level 0: long prompts overrun it and are demoted.
    Once the speed is known, long prompts skip the levels that they would overrun anyway."""
    chance = random.Random(23)

    async def a_mix() -> list[Stream]:
        lengths = [length for length in LENGTHS for _ in range(4)]
        chance.shuffle(lengths)
        prompts = [[chance.randrange(20, 40_000) for _ in range(length)] for length in lengths]
        async with httpx.AsyncClient(timeout=300) as client:
            return await asyncio.gather(
                *(stream_tokens(cluster.url, prompt, 2, client=client) for prompt in prompts)
            )

    streams = [*asyncio.run(a_mix()), *asyncio.run(a_mix())]
    assert [stream.error for stream in streams] == [None] * len(streams)
    counters = cluster.status()["counters"]
    used = {name for name, count in counters.items() if name.startswith("picks_level_") and count}
    assert len(used) >= 4, used
    assert counters["skips"] > 0
    assert counters["demotions"] > 0
    assert counters["preemptions"] > 0
    assert max(stream.timing["level"] for stream in streams if stream.timing) >= 3
