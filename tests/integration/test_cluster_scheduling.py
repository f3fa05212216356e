"""Preemption, parking and offload in a real cluster, with the real model where time matters."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from pdserve.messages import Sampling
from tests.integration.harness import (
    Stream,
    TestCluster,
    assign_role,
    running,
    settings,
    stream_tokens,
    wait_for,
)
from tests.models.alone import tokens_alone

LONG_TOKENS = 1500
SHORT_TOKENS = 32
SHORT_COUNT = 8
CHUNK_TOKENS = 128
PARKED_TOKENS = 1600


def _prompt(seed: int, length: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(20, 40_000) for _ in range(length)]


def test_short_prompts_overtake_a_running_long_one(real_cluster: TestCluster) -> None:
    _assert_overtaken(real_cluster, workers=1, short_tokens=SHORT_TOKENS)


@pytest.mark.slow
def test_a_preempted_prompt_goes_on_at_whichever_worker_is_free(default_model: Path) -> None:
    config = settings(
        default_model,
        prefill={
            "replicas": 2,
            "replicas_max": 2,
            "chunk_tokens": CHUNK_TOKENS,
            "threads": 2,
            "pool_blocks": 256,
        },
        decode={"threads": 1, "pool_blocks": 512},
        store={"arena_bytes": 256 << 20},
        router={"prefill_tokens_per_s": 1000},
    )
    with running(config) as cluster:  # what fits into a chunk goes ahead, and nobody has to leave
        _assert_overtaken(cluster, workers=2, short_tokens=CHUNK_TOKENS + SHORT_TOKENS)


def _assert_overtaken(cluster: TestCluster, *, workers: int, short_tokens: int) -> None:
    """As many long prompts as workers, and eight short ones after two chunks of each."""
    asyncio.run(stream_tokens(cluster.url, _prompt(0, 40), 2))
    before = cluster.counter("prefill", "prompt_tokens_computed")
    steps = cluster.counter("prefill", "steps")
    long, shorts, order = asyncio.run(
        _long_then_shorts(cluster, short_tokens, crowd=workers, after_steps=steps + 2 * workers)
    )
    assert long.error is None
    assert all(short.error is None for short in shorts)
    assert order[-1] == "long", f"first tokens came as {order}"
    assert long.timing is not None
    counters = cluster.status()["counters"]
    if workers == 1:  # where it could go on nowhere else it keeps its place
        assert long.timing["preempted_count"] == 0
    else:
        assert long.timing["preempted_count"] >= 1
        assert counters["preemptions"] >= 1
    computed = cluster.counter("prefill", "prompt_tokens_computed") - before
    tokens = LONG_TOKENS * workers + SHORT_COUNT * short_tokens
    assert computed == tokens, "every prompt token is computed exactly once"
    alone = cluster.tokens(_prompt(2, LONG_TOKENS), 4)
    assert long.tokens == alone


async def _long_then_shorts(
    cluster: TestCluster, short_tokens: int, *, crowd: int, after_steps: int
) -> tuple[Stream, list[Stream], list[str]]:
    """``crowd`` long prompts, and after two chunks eight short ones; the order of first tokens."""
    order: list[str] = []

    def arrival(name: str) -> Callable[[int], None]:
        return lambda count: order.append(name) if count == 1 else None

    async with httpx.AsyncClient(timeout=300) as client:
        longs = [
            asyncio.create_task(
                stream_tokens(
                    cluster.url,
                    _prompt(2 + index, LONG_TOKENS),
                    4,
                    client=client,
                    on_token=arrival("long"),
                )
            )
            for index in range(crowd)
        ]
        await asyncio.to_thread(
            wait_for, "two chunks", lambda: cluster.counter("prefill", "steps") >= after_steps
        )
        shorts = await asyncio.gather(
            *(
                stream_tokens(
                    cluster.url,
                    _prompt(100 + index, short_tokens),
                    4,
                    client=client,
                    on_token=arrival("short"),
                )
                for index in range(SHORT_COUNT)
            )
        )
        finished = await asyncio.gather(*longs)
    preempted = [long for long in finished if long.timing and long.timing["preempted_count"]]
    return (preempted or finished)[0], list(shorts), order


def test_streams_that_do_not_fit_are_parked_and_resume_on_another_worker(
    cluster: TestCluster, small_model: Path
) -> None:
    """Six streams that grow to 107 blocks each; a pool of 512 holds four of them to their end. The
    other worker prefills until two have had to go."""
    prompts = [_prompt(seed, 100) for seed in range(6)]
    samplings = [Sampling(temperature=0.7 if index % 2 else 0.0) for index in range(6)]
    expected = tokens_alone(small_model, prompts, samplings, PARKED_TOKENS)

    async def all_of_them() -> list[Stream]:
        async with httpx.AsyncClient(timeout=300) as client:
            return await asyncio.gather(
                *(
                    stream_tokens(
                        cluster.url,
                        prompt,
                        PARKED_TOKENS,
                        client=client,
                        temperature=sampling.temperature,
                        seed=index,
                    )
                    for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
                )
            )

    def decode_of(worker: str, name: str) -> int:
        (found,) = [one for one in cluster.status()["workers"] if one["worker"] == worker]
        count: int = found["counters"].get(name, 0)
        return count

    async def while_the_other_comes_back() -> list[Stream]:
        streams = asyncio.create_task(all_of_them())
        await asyncio.to_thread(
            wait_for, "two parked streams", lambda: decode_of(crowded, "parked") >= parked + 2
        )
        await asyncio.to_thread(assign_role, cluster, other, "decode")
        return await streams

    crowded, other = (one["worker"] for one in cluster.workers("decode"))
    parked, resumed = decode_of(crowded, "parked"), decode_of(other, "resumed")
    assign_role(cluster, other, "prefill")
    try:
        streams = asyncio.run(while_the_other_comes_back())
    finally:
        assign_role(cluster, other, "decode")
    assert [stream.error for stream in streams] == [None] * 6
    assert decode_of(other, "resumed") >= resumed + 2
    assert [stream.tokens for stream in streams] == expected


def test_prefixes_come_back_from_host_memory(cluster: TestCluster) -> None:
    """Read one after the other, 960 blocks leave a pool of 512 before their turn comes again."""
    prompts = [_prompt(seed, 640) for seed in range(700, 724)]
    _assert_come_back(cluster, prompts)


@pytest.mark.slow
def test_prefixes_of_the_real_model_come_back_from_host_memory(default_model: Path) -> None:
    """The workers' pools hold a tenth of the working set."""
    blocks = 40 * 1000 // 16
    config = settings(
        default_model,
        prefill={"threads": 2, "pool_blocks": blocks // 10},
        decode={"threads": 1, "pool_blocks": blocks // 10},
        store={"arena_bytes": int(blocks * 1.3) * 368_640},
    )
    with running(config) as cluster:
        _assert_come_back(cluster, [_prompt(seed, 1000) for seed in range(40)])


def _assert_come_back(cluster: TestCluster, prompts: list[list[int]]) -> None:
    """The second round's KV comes from the store, and gives the same tokens."""

    def ask_all() -> tuple[list[list[int]], int, int]:
        computed = cluster.counter("prefill", "prompt_tokens_computed")
        restored = cluster.counter("prefill", "prompt_tokens_cached_store")
        answers = [cluster.tokens(prompt, 2) for prompt in prompts]
        wait_for("reports", lambda: all(w["running"] == 0 for w in cluster.workers("prefill")))
        return (
            answers,
            cluster.counter("prefill", "prompt_tokens_computed") - computed,
            cluster.counter("prefill", "prompt_tokens_cached_store") - restored,
        )

    tokens = sum(map(len, prompts))
    first, first_computed, _ = ask_all()
    second, second_computed, from_store = ask_all()
    assert first == second
    assert first_computed == tokens
    assert from_store >= 0.95 * (tokens - 16 * len(prompts))
    assert second_computed <= 0.05 * tokens
