"""Prefill and decode really are apart: who computed what, what moved, and in which process."""

import asyncio
import random

import httpx

from tests.integration.harness import Stream, TestCluster, stream_tokens, wait_until_equal

PROMPTS = 100
OUTPUT_TOKENS = 8


def test_every_prompt_token_is_prefill_s_and_every_block_moves_once(cluster: TestCluster) -> None:
    chance = random.Random(17)
    lengths = [chance.randrange(33, 1501) for _ in range(PROMPTS)]
    prompts = [[chance.randrange(20, 40_000) for _ in range(length)] for length in lengths]
    before = {role: _counters(cluster, role) for role in ("prefill", "decode")}

    async def all_of_them() -> list[Stream]:
        async with httpx.AsyncClient(timeout=300) as client:
            at_once = asyncio.Semaphore(8)

            async def one(prompt: list[int]) -> Stream:
                async with at_once:
                    return await stream_tokens(cluster.url, prompt, OUTPUT_TOKENS, client=client)

            return await asyncio.gather(*map(one, prompts))

    streams = asyncio.run(all_of_them())
    assert all(len(stream.tokens) == OUTPUT_TOKENS for stream in streams)
    assert all(stream.cached_tokens == 0 for stream in streams)

    blocks = sum(-(-length // 16) for length in lengths)
    block_bytes = 2 * 2 * 2 * 16 * 16 * 4  # layers, k and v, heads, tokens, dim, float32
    expected = {
        ("prefill", "prompt_tokens_computed"): sum(lengths),
        ("prefill", "tokens_generated"): PROMPTS,
        ("prefill", "blocks written"): blocks,
        ("prefill", "bytes of a block pushed"): block_bytes,
        ("decode", "bytes_restored"): blocks * block_bytes,
        ("decode", "tokens_generated"): PROMPTS * (OUTPUT_TOKENS - 1),
    }

    def counted() -> dict[tuple[str, str], int]:
        pushed = _delta(cluster, before, "prefill", "blocks_pushed")
        put = _delta(cluster, before, "prefill", "blocks_put")  # of prompts that were preempted
        return {name: _delta(cluster, before, *name) for name in expected} | {
            ("prefill", "blocks written"): pushed + put,
            ("prefill", "bytes of a block pushed"): (
                _delta(cluster, before, "prefill", "bytes_pushed") // max(pushed, 1)
            ),
        }

    wait_until_equal("what the workers report", counted, expected)
    assert _delta(cluster, before, "decode", "prompt_tokens_computed") <= PROMPTS
    pids = cluster.pids("prefill") + cluster.pids("decode")
    assert len(set(pids)) == 3


def _counters(cluster: TestCluster, role: str) -> dict[str, int]:
    names = {name for worker in cluster.workers(role) for name in worker["counters"]}
    return {name: cluster.counter(role, name) for name in names}


def _delta(cluster: TestCluster, before: dict[str, dict[str, int]], role: str, name: str) -> int:
    return cluster.counter(role, name) - before[role].get(name, 0)
