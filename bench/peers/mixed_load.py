"""Short chats stream while long prompts keep arriving: the load that separate pools are for.

    mixed_load.py URL MODEL [--rate 1.0] [--seconds 60] [--long-share 0.2]
                            [--chat 64,64] [--long 1536,16] [--vocabulary 49000] [--seed 7]

Arrivals are Poisson, open-loop: a slow server gets no fewer requests. Prompts are random token ids
sent to /v1/completions, greedy and with ``ignore_eos``, so that every server does the same work.
Prints a JSON row per kind, with the time to the first token, the gaps between tokens and the whole
in milliseconds, and one row for everything. Needs aiohttp.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

REQUEST_TIMEOUT_S = 600


@dataclass(frozen=True)
class Lengths:
    prompt_tokens: int
    generated_tokens: int

    @staticmethod
    def parse(text: str) -> "Lengths":
        prompt, generated = text.split(",")
        return Lengths(int(prompt), int(generated))


@dataclass
class Outcome:
    kind: str
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    tokens: int = 0


def percentiles_ms(values_s: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values_s)
    if not ordered:
        return {}
    last = len(ordered) - 1
    return {
        f"p{percent}": round(1000 * ordered[min(last, percent * len(ordered) // 100)], 1)
        for percent in (50, 90, 99)
    }


class Load:
    """Sends requests to one server and remembers how each went."""

    def __init__(self, http: aiohttp.ClientSession, arguments: argparse.Namespace) -> None:
        self._http = http
        self._url = arguments.url.rstrip("/") + "/v1/completions"
        self._model = arguments.model
        self._vocabulary = arguments.vocabulary
        self._lengths = {"chat": arguments.chat, "long": arguments.long}
        self._chance = random.Random(arguments.seed)

    async def request(self, kind: str) -> Outcome:
        lengths: Lengths = self._lengths[kind]
        prompt = [
            self._chance.randrange(100, self._vocabulary) for _ in range(lengths.prompt_tokens)
        ]
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": lengths.generated_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        outcome = Outcome(kind)
        begun = last = time.perf_counter()
        async with self._http.post(self._url, json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data:") or b"[DONE]" in line:
                    continue
                if self._has_text(line, outcome):
                    now = time.perf_counter()
                    if outcome.ttft_s is None:
                        outcome.ttft_s = now - begun
                    else:
                        outcome.gaps_s.append(now - last)
                    last = now
        outcome.total_s = time.perf_counter() - begun
        if outcome.tokens != lengths.generated_tokens:
            sys.exit(f"asked for {lengths.generated_tokens} tokens, usage says {outcome.tokens}")
        return outcome

    @staticmethod
    def _has_text(line: bytes, outcome: Outcome) -> bool:
        """Whether a chunk brings a token: one without text must not pass for an early first one."""
        chunk = json.loads(line.removeprefix(b"data:"))
        if chunk.get("usage"):
            outcome.tokens = chunk["usage"]["completion_tokens"]
        return any(choice.get("text") for choice in chunk.get("choices", []))

    async def run(self, *, rate_per_s: float, seconds: float, long_share: float) -> list[Outcome]:
        """All outcomes, once the last one is there."""
        under_way: list[asyncio.Task[Outcome]] = []
        begun = time.perf_counter()
        due_s = 0.0
        while due_s < seconds:
            kind = "long" if self._chance.random() < long_share else "chat"
            under_way.append(asyncio.create_task(self.request(kind)))
            due_s += self._chance.expovariate(rate_per_s)
            await asyncio.sleep(max(0.0, begun + due_s - time.perf_counter()))
        return await asyncio.gather(*under_way)


def row_of(kind: str, outcomes: Sequence[Outcome]) -> dict[str, object]:
    return {
        "kind": kind,
        "requests": len(outcomes),
        "ttft_ms": percentiles_ms([o.ttft_s for o in outcomes if o.ttft_s is not None]),
        "itl_ms": percentiles_ms([gap for o in outcomes for gap in o.gaps_s]),
        "total_ms": percentiles_ms([o.total_s for o in outcomes]),
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--long-share", type=float, default=0.2)
    parser.add_argument("--chat", type=Lengths.parse, default=Lengths(64, 64))
    parser.add_argument("--long", type=Lengths.parse, default=Lengths(1536, 16))
    parser.add_argument("--vocabulary", type=int, default=49_000)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
        connector=aiohttp.TCPConnector(limit=0),
    ) as http:
        load = Load(http, arguments)
        await load.request("chat")  # warm-up
        begun = time.perf_counter()
        outcomes = await load.run(
            rate_per_s=arguments.rate, seconds=arguments.seconds, long_share=arguments.long_share
        )
        total_s = time.perf_counter() - begun
    for kind in ("chat", "long"):
        print(json.dumps(row_of(kind, [o for o in outcomes if o.kind == kind])))
    rate = sum(outcome.tokens for outcome in outcomes) / total_s
    print(json.dumps({"seconds": round(total_s, 1), "generated_tokens_per_s": round(rate, 1)}))


if __name__ == "__main__":
    asyncio.run(main())
