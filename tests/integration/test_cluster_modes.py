"""Workers that do both, alone or beside workers that do one thing: the same tokens either way."""

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import httpx

from tests.integration.harness import Stream, TestCluster, running, settings, stream_tokens

OUTPUT_TOKENS = 24


def _prompts() -> list[list[int]]:
    chance = random.Random(41)
    lengths = [8, 20, 40, 90, 200, 450, 900] * 3
    return [[chance.randrange(20, 40_000) for _ in range(length)] for length in lengths]


def _served(cluster: TestCluster) -> list[Stream]:
    """A first half that decodes while the second arrives; some ask for a short answer only."""

    async def ask() -> list[Stream]:
        async with httpx.AsyncClient(timeout=300) as client:
            begun = asyncio.Event()

            async def one(index: int, prompt: list[int]) -> Stream:
                if index % 2:
                    await begun.wait()
                count = 4 if index % 3 == 0 else OUTPUT_TOKENS
                return await stream_tokens(
                    cluster.url,
                    prompt,
                    count,
                    client=client,
                    on_token=lambda _: begun.set(),
                    pdserve={"why": True},
                )

            return await asyncio.gather(*(one(i, p) for i, p in enumerate(_prompts())))

    streams = asyncio.run(ask())
    assert [stream.error for stream in streams] == [None] * len(streams)
    return streams


def _searched(cluster: TestCluster) -> list[str]:
    """The answers of a beam search, best first."""
    answer = cluster.complete(
        _prompts()[4], n=3, best_of=4, use_beam_search=True, max_tokens=16, ignore_eos=True
    )
    return [choice["text"] for choice in answer["choices"]]


def _routes(streams: list[Stream]) -> set[tuple[str, str]]:
    """The roles of who prefilled and who decoded, at the last decision."""
    found = set()
    for stream in streams:
        assert stream.timing is not None
        decisions: list[dict[str, Any]] = stream.timing["decisions"]
        last = decisions[-1]
        assert last["reason"]
        found.add((last["prefill_worker"].split("-")[0], last["decode_worker"].split("-")[0]))
    return found


def _config(small_model: Path, mode: str, **router: object) -> Any:
    return settings(
        small_model,
        model={"dtype": "float32"},
        router={"mode": mode, **router},
        decode={"replicas": 2, "threads": 1, "pool_blocks": 512},
    )


def test_one_pool_that_does_everything_and_two_that_help_each_other(small_model: Path) -> None:
    with running(_config(small_model, "aggregated")) as cluster:
        aggregated = _served(cluster)
        searched = _searched(cluster)
        assert _routes(aggregated) == {("decode", "decode")}
        assert cluster.workers("prefill") == []
        assert cluster.counter("decode", "prompt_tokens_computed") >= sum(map(len, _prompts())) // 2
    with running(_config(small_model, "auto")) as cluster:
        auto = _served(cluster)
        assert _searched(cluster) == searched
        routes = _routes(auto)
        assert ("prefill", "decode") in routes, "nothing was handed over"
        assert routes & {("decode", "decode"), ("prefill", "prefill")}, "nobody did both"
    assert [stream.tokens for stream in auto] == [stream.tokens for stream in aggregated]


def test_a_worker_alone_has_its_cores(small_model: Path) -> None:
    """A compute thread on each that stays there; see ADR 8."""
    config = settings(small_model, router={"mode": "aggregated"}, decode={"threads": 0})
    with running(config) as cluster:
        assert len(cluster.tokens([1, 2, 3], 2)) == 2
        (pid,) = cluster.pids("decode")
        threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
        allowed = [os.sched_getaffinity(thread) for thread in threads]
    assert sorted(min(cores) for cores in allowed if len(cores) == 1) == sorted(
        os.sched_getaffinity(0)
    )
