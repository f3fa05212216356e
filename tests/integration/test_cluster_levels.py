"""The router's levels in a real cluster: prompts of many lengths, and a guess that was too good."""

import asyncio
import random

import httpx

from tests.integration.harness import Stream, TestCluster, stream_tokens, wait_for

LENGTHS = (20, 40, 90, 200, 450, 1000, 2000, 4000)
TOKENS = 2


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
                *(stream_tokens(cluster.url, prompt, TOKENS, client=client) for prompt in prompts)
            )

    streams = [*asyncio.run(a_mix()), *asyncio.run(a_mix())]
    assert [stream.error for stream in streams] == [None] * len(streams)
    counters = cluster.status()["counters"]
    used = {name for name, count in counters.items() if name.startswith("picks_level_") and count}
    assert len(used) >= 4, used
    assert counters["skips"] > 0
    assert counters["demotions"] > 0
    assert max(stream.timing["level"] for stream in streams if stream.timing) >= 3


def test_a_long_prompt_is_called_back_for_those_much_shorter(cluster: TestCluster) -> None:
    """Each longer than a chunk, so none goes ahead of a long one where it is. One that has come to
    its last chunks is left alone, so a round in which all arrive too late is repeated."""
    chance = random.Random(29)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[chance.randrange(20, 40_000) for _ in range(length)] for _ in range(count)]

    for _ in range(5):
        long_ones = prompts(6, 4000)
        streams = asyncio.run(_these_then_those(cluster, long_ones, prompts(4, 450)))
        assert [stream.error for stream in streams] == [None] * len(streams)
        back = [index for index, stream in enumerate(streams) if _preempted_count(stream)]
        if back:
            break
    assert back, "no long prompt was called back in any round"
    assert max(back) < len(long_ones), "one much shorter made way"
    assert cluster.status()["counters"]["preemptions"] >= len(back)
    for index in back:
        assert streams[index].tokens == cluster.tokens(long_ones[index], TOKENS)


async def _these_then_those(
    cluster: TestCluster, these: list[list[int]], those: list[list[int]]
) -> list[Stream]:
    """``those`` come once a chunk of ``these`` is computed."""
    steps = cluster.counter("prefill", "steps")
    async with httpx.AsyncClient(timeout=300) as client:
        first, second = (
            [stream_tokens(cluster.url, prompt, TOKENS, client=client) for prompt in prompts]
            for prompts in (these, those)
        )
        running = asyncio.gather(*first)
        await asyncio.to_thread(
            wait_for, "a chunk", lambda: cluster.counter("prefill", "steps") > steps
        )
        others = await asyncio.gather(*second)
        return [*await running, *others]


def _preempted_count(stream: Stream) -> int:
    assert stream.timing is not None
    return int(stream.timing["preempted_count"])
