"""Skip-join beside first come first served, in the real cluster with the real model, under bursts.

    python -m bench.live_scheduling [--quick] [--json FILE] [--seconds 180] [--seeds 3]
                [--utilisation 0.8] [--shorts 15] [--longs 3] [--short-tokens 64,128,192]
                [--long-tokens 1024,1536,2048] [--answer-tokens 4] [--work DIRECTORY]

One prefill and one decode worker. Every few seconds comes a burst: ``--longs`` long and
``--shorts`` short prompts of random lengths, in random order, within a fifth of a second. Bursts
are so far apart that prefill is busy for the part ``--utilisation`` of the time, by what each
length takes alone, which is measured first; the time between two varies by a quarter. Answers are
short, for this is about who is prefilled first.

*Slowdown* is the time to a request's first token over the time for a prompt of that length alone:
1 is ideal. Both orders get the same bursts, in turns; intervals are over stretches of time
(``intervals``). Long prompts pay for what short ones gain: rows of their own say how much.

The last rows are about a worker that is idle: what the router adds then (``router_latency``), and
how long requests that come one at a time are in the cluster's queue.
"""

import argparse
import functools
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.frame import Bar, Options, Row, at_most, row, run
from bench.http_load import ask, random_tokens
from bench.intervals import Floats, at_percentile, blocks, mean, ratio_interval
from bench.peers.mixed_load import Arrival, Lengths, Outcome, ttfts_s
from bench.router_latency import dispatch_ms
from bench.runs import Work, default_directory, take_turns
from bench.servers import Ours, serving

FCFS = Ours("disaggregated", "fcfs")
SKIP_JOIN = Ours("disaggregated", "skip_join")
FIRST_SEED = 1
BURST_SPREAD_S = 0.2
BURST_JITTER_RATIO = 0.25
ALONE_ROUNDS = 5
SINGLE_ROUNDS = 100
SINGLE_TOKENS = 64

AloneS = Mapping[int, float]  # prompt tokens → seconds to the first token on an idle cluster


@dataclass(frozen=True, slots=True)
class Bursts:
    """What comes in each burst, and how busy that keeps prefill."""

    shorts: int
    longs: int
    short_tokens: Sequence[int]
    long_tokens: Sequence[int]
    answer_tokens: int
    utilisation: float

    def lengths(self) -> list[int]:
        return sorted({*self.short_tokens, *self.long_tokens})

    def period_s(self, alone_s: AloneS) -> float:
        """Between two bursts, on average."""
        work_s = self.shorts * statistics.fmean(alone_s[tokens] for tokens in self.short_tokens)
        work_s += self.longs * statistics.fmean(alone_s[tokens] for tokens in self.long_tokens)
        return work_s / self.utilisation

    def arrivals(self, *, period_s: float, seconds: float, seed: int) -> list[Arrival]:
        chance = random.Random(seed)
        arrivals = []
        burst_s = 0.0
        while burst_s < seconds:
            for kind, count, lengths in (
                ("short", self.shorts, self.short_tokens),
                ("long", self.longs, self.long_tokens),
            ):
                for _ in range(count):
                    due_s = burst_s + chance.uniform(0, BURST_SPREAD_S)
                    work = Lengths(chance.choice(lengths), self.answer_tokens)
                    arrivals.append(Arrival(due_s, kind, work, chance.getrandbits(32)))
            burst_s += period_s * chance.uniform(1 - BURST_JITTER_RATIO, 1 + BURST_JITTER_RATIO)
        return sorted(arrivals, key=lambda arrival: arrival.due_s)


def measure(options: Options) -> Iterator[Row]:
    given = options.arguments
    work = Work(given.work)
    bursts = Bursts(
        given.shorts,
        given.longs,
        given.short_tokens,
        given.long_tokens,
        given.answer_tokens,
        given.utilisation,
    )
    alone, queue_ms = idle(work, bursts.lengths())
    for tokens, samples_s in alone.items():
        yield row(f"TTFT alone, {tokens} tokens", [s * 1000 for s in samples_s], "ms")
    alone_s = {tokens: statistics.median(samples_s) for tokens, samples_s in alone.items()}
    period_s = bursts.period_s(alone_s)
    yield row("time between bursts", [period_s], "s")
    runs: dict[Ours, list[Sequence[Outcome]]] = {FCFS: [], SKIP_JOIN: []}
    for index in range(given.seeds or (1 if options.quick else 3)):
        arrivals = bursts.arrivals(
            period_s=period_s,
            seconds=given.seconds or (40 if options.quick else 180),
            seed=FIRST_SEED + index,
        )
        for form in take_turns([FCFS, SKIP_JOIN], index):
            assert isinstance(form, Ours)
            runs[form].append(work.outcomes(form, arrivals))
    yield from rows_of(runs, alone_s)
    added_ms = dispatch_ms(options.rounds(1000))
    yield row("router in to dispatched, idle, p50", added_ms, "ms", bar=at_most(2))
    yield row("router in to dispatched, idle, p99", added_ms, "ms", at=0.99)
    yield row("in the queue, idle cluster, p50", queue_ms, "ms")


def rows_of(runs: Mapping[Ours, Sequence[Sequence[Outcome]]], alone_s: AloneS) -> Iterator[Row]:
    slowdowns = functools.partial(slowdown, alone_s)
    p50, p99 = at_percentile(0.5), at_percentile(0.99)
    both = functools.partial(beside_fcfs, runs)
    yield both("mean TTFT", ttft_ms, mean, "ms", at_most(0.6, of="ratio"))
    yield both("TTFT p50", ttft_ms, p50, "ms")
    yield both("TTFT p99", ttft_ms, p99, "ms")
    yield both("slowdown p99", slowdowns, p99, "×", at_most(0.5, of="ratio"))
    yield both("mean TTFT, short", functools.partial(of_kind, "short", ttft_ms), mean, "ms")
    yield both("mean TTFT, long", functools.partial(of_kind, "long", ttft_ms), mean, "ms")
    yield both("TTFT p99, long", functools.partial(of_kind, "long", ttft_ms), p99, "ms")


def beside_fcfs(
    runs: Mapping[Ours, Sequence[Sequence[Outcome]]],
    name: str,
    samples: Callable[[Outcome], Sequence[float]],
    statistic: Callable[[Floats], float],
    unit: str,
    bar: Bar | None = None,
) -> Row:
    ours, theirs = (blocks(runs[form], samples) for form in (SKIP_JOIN, FCFS))
    made = row(
        f"{name}, skip_join",
        [statistic(np.concatenate(ours))],
        unit,
        reference="fcfs",
        reference_samples=[statistic(np.concatenate(theirs))],
        bar=bar,
    )
    return replace(made, spread=None, ratio_interval=ratio_interval(ours, theirs, statistic))


def ttft_ms(outcome: Outcome) -> Sequence[float]:
    return [ttft_s * 1000 for ttft_s in ttfts_s([outcome])]


def slowdown(alone_s: AloneS, outcome: Outcome) -> Sequence[float]:
    return [ttft_s / alone_s[outcome.prompt_tokens] for ttft_s in ttfts_s([outcome])]


def of_kind(
    kind: str, samples: Callable[[Outcome], Sequence[float]], outcome: Outcome
) -> Sequence[float]:
    return samples(outcome) if outcome.kind == kind else []


def idle(work: Work, lengths: Sequence[int]) -> tuple[dict[int, list[float]], list[float]]:
    """From a cluster that has nothing else to do: each length's times to the first token, and
    for small prompts how many milliseconds each was in the router's queue."""

    def asked_alone() -> dict[str, list[Any]]:
        seeds = iter(range(ALONE_ROUNDS * len(lengths) + SINGLE_ROUNDS))
        with serving(SKIP_JOIN, work.log(SKIP_JOIN)) as target:

            def ttft_s(tokens: int) -> float:
                answer = ask(target.url, random_tokens(tokens, next(seeds)), 2)
                return answer.token_s[0] - answer.sent_s

            def queue_ms() -> float:
                answer = ask(target.url, random_tokens(SINGLE_TOKENS, next(seeds)), 2)
                return float(answer.timing["queue_ms"])

            return {
                "alone_s": [[ttft_s(tokens) for _ in range(ALONE_ROUNDS)] for tokens in lengths],
                "queue_ms": [queue_ms() for _ in range(SINGLE_ROUNDS)],
            }

    found = work.remembered(SKIP_JOIN, ["idle", list(lengths)], asked_alone)
    return dict(zip(lengths, found["alone_s"], strict=True)), found["queue_ms"]


def counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="of each run; 180, with --quick 40")
    parser.add_argument("--seeds", type=int, help="runs of each order; 3, with --quick 1")
    parser.add_argument("--utilisation", type=float, default=0.8)
    parser.add_argument("--shorts", type=int, default=15, help="in a burst")
    parser.add_argument("--longs", type=int, default=3, help="in a burst")
    parser.add_argument("--short-tokens", type=counts, default=[64, 128, 192])
    parser.add_argument("--long-tokens", type=counts, default=[1024, 1536, 2048])
    parser.add_argument("--answer-tokens", type=int, default=4)
    parser.add_argument("--work", type=Path, default=default_directory("live_scheduling"))


if __name__ == "__main__":
    run("live_scheduling", measure, add_arguments=add_arguments)
