"""The same multiples of capacity against a small real cluster, over HTTP.

One prefill and one decode worker with the default model, on Ray as `pdserve serve` starts them; the
clients are this process. A prompt takes workers a hundred times as long as it takes a client to
send it, so that ten times what workers can do is little for one process; a row says whether it was.

*Capacity* is what as many clients as keep it busy get through, each asking again when it has its
answer. The loads are open: arrivals do not wait for answers.
"""

import asyncio
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from bench.frame import Row, at_least, at_most, row
from pdserve.cluster.local import local_cluster
from pdserve.config import ModelConfig
from tests.integration.harness import random_prompts, settings

LOADS = (1, 2, 5, 10)
PROMPT_TOKENS = 600
ANSWER_TOKENS = 4
TTFT_MAX_MS = 3000.0
CLOSED_CLIENTS = 8
SPAN_S = 30.0
LATE_MAX = 1.1
"""Times the span that asking may take: beyond, less was offered than is said."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int  # 0: the connection broke
    elapsed_s: float
    hint_s: float | None


@dataclass(frozen=True, slots=True)
class Offered:
    answers: list[Answer]
    asking_s: float  # from before the first to after the last

    @property
    def goodput_per_s(self) -> float:
        good = (a.status == 200 and 1000 * a.elapsed_s <= 2 * TTFT_MAX_MS for a in self.answers)
        return sum(good) / self.asking_s


async def _ask(client: httpx.AsyncClient, url: str, prompt: list[int]) -> Answer:
    body = {
        "prompt": prompt,
        "max_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
        "service_tier": "priority",
    }
    begun_s = time.perf_counter()
    try:
        answer = await client.post(f"{url}/v1/completions", json=body)
    except httpx.HTTPError:
        return Answer(0, time.perf_counter() - begun_s, None)
    hint = answer.headers.get("retry-after")
    elapsed_s = time.perf_counter() - begun_s
    return Answer(answer.status_code, elapsed_s, None if hint is None else float(hint))


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None))


async def _closed(url: str, span_s: float, seed: int) -> float:
    """Answers per second."""
    ends_s = time.perf_counter() + span_s
    done = 0

    async def ask_again_and_again(client: httpx.AsyncClient, number: int) -> None:
        nonlocal done
        while time.perf_counter() < ends_s:
            prompt = random_prompts(1, seed=seed + number + 1000 * done, length=PROMPT_TOKENS)[0]
            answer = await _ask(client, url, prompt)
            done += answer.status == 200

    async with _client() as client:
        await asyncio.gather(*(ask_again_and_again(client, n) for n in range(CLOSED_CLIENTS)))
    return done / span_s


async def _open(url: str, per_s: float, span_s: float, seed: int) -> Offered:
    chance = random.Random(seed)
    count = max(1, round(per_s * span_s))
    prompts = random_prompts(count, seed=seed, length=PROMPT_TOKENS)
    async with _client() as client, asyncio.TaskGroup() as group:
        asked = []
        begun_s = due_s = time.perf_counter()
        for prompt in prompts:
            due_s += chance.expovariate(per_s)
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            asked.append(group.create_task(_ask(client, url, prompt)))
        asking_s = time.perf_counter() - begun_s
    return Offered([each.result() for each in asked], asking_s)


def live_rows(*, quick: bool) -> Iterator[Row]:
    span_s = SPAN_S / 2 if quick else SPAN_S
    config = settings(
        ModelConfig().source,
        prefill={"pool_blocks": 2000},
        decode={"pool_blocks": 2000},
        router={"ttft_max_ms": {"interactive": TTFT_MAX_MS}},
        gateway={"grpc_port": -1},
    )
    with local_cluster(config) as cluster:
        asyncio.run(_closed(cluster.http, 3.0, seed=1))  # costs are learned
        capacity = asyncio.run(_closed(cluster.http, span_s / 2, seed=2))
        yield Row("live: capacity, closed loop", capacity, "1/s")
        found = {
            times: asyncio.run(_open(cluster.http, times * capacity, span_s, seed=times))
            for times in LOADS
        }
    yield from _judged(found, span_s)


def _judged(found: dict[int, Offered], span_s: float) -> Iterator[Row]:
    asking = found[10].asking_s / span_s
    yield row(
        "live: time that asking took at 10x, of its span", [asking], "×", bar=at_most(LATE_MAX)
    )
    goodput = {times: offered.goodput_per_s for times, offered in found.items()}
    peak = max(goodput.values())
    for times, value in goodput.items():
        yield row(
            f"live: goodput at {times}x",
            [value],
            "1/s",
            reference="its peak",
            reference_samples=[peak],
            bar=at_least(0.9, of="ratio"),
        )
    shed = [a for a in found[10].answers if a.status == 503]
    if shed:
        waits_ms = [1000 * a.elapsed_s for a in shed]
        name = "live: 99th percentile of a refusal at 10x"
        yield row(name, waits_ms, "ms", bar=at_most(50), at=0.99)
        longest_s = max(a.hint_s or math.inf for a in shed)
        yield row("live: longest hint to come back", [longest_s], "s", bar=at_most(120))
    others = sum(a.status not in (200, 503) for offered in found.values() for a in offered.answers)
    yield row("live: answered neither 200 nor 503", [others], "times", bar=at_most(0))
