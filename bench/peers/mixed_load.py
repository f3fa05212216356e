"""Short chats stream while long prompts keep arriving: the load that separate pools are for.

    mixed_load.py URL MODEL [--rate 1.0] [--seconds 60] [--long-share 0.2]
                            [--chat 64,64] [--long 1536,16] [--vocabulary 49000] [--seed 7]

Arrivals are Poisson, open-loop: a slow server gets no fewer requests. Prompts are random token ids
sent to /v1/completions, greedy and with ``ignore_eos``, so that every server does the same work.
Prints a JSON row per kind, with the time to the first token, the gaps between tokens and the whole
in milliseconds, and one row for everything. Needs aiohttp.

The whole load is planned before the clock starts (``mixed``: the same seed, the same arrivals and
prompts), then sent to a server (``drive``), which only notes when each line of an answer came; what
the lines say is read afterwards (``outcome_of``). A token's time is that of the chunk that brought
its text: what a reader sees. How many tokens there were is what the server's usage says.
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import aiohttp

REQUEST_TIMEOUT_S = 600
VOCABULARY = 49_000
FIRST_ORDINARY_TOKEN = 100
URGENT_KIND = "chat"


@dataclass(frozen=True)
class Lengths:
    prompt_tokens: int
    generated_tokens: int

    @staticmethod
    def parse(text: str) -> "Lengths":
        prompt, generated = text.split(",")
        return Lengths(int(prompt), int(generated))


CHAT = Lengths(64, 64)
LONG = Lengths(1536, 16)


@dataclass(frozen=True)
class Arrival:
    due_s: float  # after the load began
    kind: str
    lengths: Lengths
    seed: int  # of the prompt's tokens


@dataclass(frozen=True)
class Outcome:
    """What became of an arrival. With an ``error`` the other figures say how far it came.

    To random tokens a model may answer in special tokens alone, which no server puts into text. An
    answer like that has no time to its first text, and is no error.
    """

    kind: str
    due_s: float
    prompt_tokens: int
    ttft_s: float | None  # to the first text; None: there was none
    gaps_s: Sequence[float]
    ended_s: float  # after the load began
    tokens: int
    error: str = ""


@dataclass(frozen=True)
class Target:
    """A server that speaks OpenAI's protocol."""

    url: str
    model: str
    vocabulary: int = VOCABULARY
    chats_first: bool = False  # whether requests name a priority, as vLLM understands it


def mixed(
    *,
    rate_per_s: float,
    seconds: float,
    seed: int,
    long_share: float = 0.2,
    chat: Lengths = CHAT,
    long: Lengths = LONG,
) -> list[Arrival]:
    """The arrivals of ``seconds``; the first one comes at once."""
    chance = random.Random(seed)
    arrivals = []
    due_s = 0.0
    while due_s < seconds:
        kind, lengths = ("long", long) if chance.random() < long_share else ("chat", chat)
        arrivals.append(Arrival(due_s, kind, lengths, chance.getrandbits(32)))
        due_s += chance.expovariate(rate_per_s)
    return arrivals


def body_of(arrival: Arrival, target: Target) -> bytes:
    chance = random.Random(arrival.seed)
    tokens = range(FIRST_ORDINARY_TOKEN, target.vocabulary)
    body: dict[str, object] = {
        "model": target.model,
        "prompt": chance.choices(tokens, k=arrival.lengths.prompt_tokens),
        "max_tokens": arrival.lengths.generated_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.chats_first:
        body["priority"] = 0 if arrival.kind == URGENT_KIND else 1
    return json.dumps(body).encode()


async def drive(
    target: Target, arrivals: Sequence[Arrival], *, timeout_s: float = REQUEST_TIMEOUT_S
) -> list[Outcome]:
    """Sends each arrival when it is due; all outcomes, once the last one is there."""
    bodies = [body_of(arrival, target) for arrival in arrivals]
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        connector=aiohttp.TCPConnector(limit=0),
        headers={"content-type": "application/json"},
    ) as http:
        under_way = []
        begun_s = time.perf_counter()
        for arrival, body in zip(arrivals, bodies, strict=True):
            await asyncio.sleep(max(0.0, begun_s + arrival.due_s - time.perf_counter()))
            under_way.append(asyncio.create_task(_request(http, target, arrival, body, begun_s)))
        return await asyncio.gather(*under_way)


async def _request(
    http: aiohttp.ClientSession, target: Target, arrival: Arrival, body: bytes, begun_s: float
) -> Outcome:
    lines: list[tuple[float, bytes]] = []
    trouble = ""
    sent_s = time.perf_counter()
    try:
        async with http.post(target.url.rstrip("/") + "/v1/completions", data=body) as response:
            async for line in response.content:
                lines.append((time.perf_counter(), line))
            if response.status != 200:
                trouble = f"{response.status}: {b''.join(line for _, line in lines).decode()}"
    except (aiohttp.ClientError, TimeoutError) as error:
        trouble = repr(error)
    return outcome_of(arrival, lines, sent_s=sent_s, begun_s=begun_s, trouble=trouble)


def outcome_of(
    arrival: Arrival,
    lines: Sequence[tuple[float, bytes]],
    *,
    sent_s: float,
    begun_s: float,
    trouble: str = "",
) -> Outcome:
    """An outcome from the lines of a stream, each with the time at which it came."""
    text_s: list[float] = []
    tokens = 0
    for at_s, line in lines:
        if trouble or not line.startswith(b"data:") or b"[DONE]" in line:
            continue
        chunk = json.loads(line.removeprefix(b"data:"))
        if "error" in chunk:
            trouble = json.dumps(chunk["error"])
        if chunk.get("usage"):
            tokens = chunk["usage"]["completion_tokens"]
        # One without text must not pass for an early first token.
        if any(choice.get("text") for choice in chunk.get("choices", [])):
            text_s.append(at_s)
    wanted = arrival.lengths.generated_tokens
    if not trouble and tokens != wanted:
        trouble = f"asked for {wanted} tokens, usage says {tokens}"
    return Outcome(
        kind=arrival.kind,
        due_s=arrival.due_s,
        prompt_tokens=arrival.lengths.prompt_tokens,
        ttft_s=text_s[0] - sent_s if text_s else None,
        gaps_s=[after - before for before, after in itertools.pairwise(text_s)],
        ended_s=(lines[-1][0] if lines else sent_s) - begun_s,
        tokens=tokens,
        error=trouble,
    )


def tokens_per_s(outcomes: Sequence[Outcome]) -> float:
    """Generated tokens over the time from the first arrival to the last answer's end."""
    return sum(outcome.tokens for outcome in outcomes) / max(o.ended_s for o in outcomes)


def ttfts_s(outcomes: Iterable[Outcome]) -> list[float]:
    """Of those that brought text."""
    return [outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None]


def percentiles_ms(values_s: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values_s)
    if not ordered:
        return {}
    last = len(ordered) - 1
    return {
        f"p{percent}": round(1000 * ordered[min(last, percent * len(ordered) // 100)], 1)
        for percent in (50, 90, 99)
    }


def row_of(kind: str, outcomes: Sequence[Outcome]) -> dict[str, object]:
    return {
        "kind": kind,
        "requests": len(outcomes),
        "ttft_ms": percentiles_ms(ttfts_s(outcomes)),
        "itl_ms": percentiles_ms([gap for o in outcomes for gap in o.gaps_s]),
        "total_ms": percentiles_ms([(o.ttft_s or 0.0) + sum(o.gaps_s) for o in outcomes]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--long-share", type=float, default=0.2)
    parser.add_argument("--chat", type=Lengths.parse, default=CHAT)
    parser.add_argument("--long", type=Lengths.parse, default=LONG)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    target = Target(arguments.url, arguments.model, arguments.vocabulary)
    arrivals = mixed(
        rate_per_s=arguments.rate,
        seconds=arguments.seconds,
        seed=arguments.seed,
        long_share=arguments.long_share,
        chat=arguments.chat,
        long=arguments.long,
    )
    outcomes = asyncio.run(drive(target, [Arrival(0.0, "chat", arguments.chat, seed=0)]))  # warm-up
    if not outcomes[0].error:
        outcomes = asyncio.run(drive(target, arrivals))
    if errors := [outcome.error for outcome in outcomes if outcome.error]:
        sys.exit(f"{len(errors)} of {len(outcomes)} requests failed; the first: {errors[0]}")
    for kind in ("chat", "long"):
        print(json.dumps(row_of(kind, [o for o in outcomes if o.kind == kind])))
    seconds = round(max(outcome.ended_s for outcome in outcomes), 1)
    rate = round(tokens_per_s(outcomes), 1)
    print(json.dumps({"seconds": seconds, "generated_tokens_per_s": rate}))


if __name__ == "__main__":
    main()
