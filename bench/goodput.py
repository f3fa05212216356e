"""Goodput: how many requests per second a server takes while 90 % of them get what was promised.

    python -m bench.goodput [--quick] [--json FILE] [--seconds 60] [--long-shares 0,0.2]
                            [--ttft-ms 1000] [--long-ttft-ms 5000] [--tpot-ms 60]
                            [--vllm 512,128,fcfs] [--tuning-seconds 120] [--work DIRECTORY]

A request is *good* when its first token comes within the limit for its kind and its further tokens
come, on average, within ``--tpot-ms`` each. A chat's first token may take several times what it
takes alone on two cores (about 0.1 s), a long prompt's too (about 1.5 s), and a reader follows 17
tokens a second with ease. A request that is refused, or fails, is not good.

The rate is searched: doubled or halved until it is known between two, then bisected until they are
5 % apart. Each try lasts for ``--seconds``, or until 30 requests are expected, and is a load of its
own (``peers/mixed_load.py``) on the form's warm server, one form after the other; all have the same
kinds and lengths in the same order, only faster or slower, and prompts that the server has not seen
before. A rate is given up when it fails twice.

It is measured for every mode of ours, with skip-join, and for the setting of vLLM with most good
requests under a load of another seed; and for several shares of long prompts, since where there are
none, there is little that disaggregation could keep apart: the last row of each says whether it
pays.
"""

import argparse
import asyncio
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from bench.frame import Options, Row, row, run, skipped
from bench.mixed_load import vllm_setting
from bench.peers.mixed_load import Arrival, Outcome, drive, mixed
from bench.runs import Work, default_directory
from bench.servers import Form, Ours, Vllm, serving, vllm_missing
from bench.tuning import ALL_SETTINGS, FEW_SETTINGS, TUNING_SEED, chat_ttft_s_p90, try_all

MODES = [
    Ours("disaggregated", "skip_join"),
    Ours("aggregated", "skip_join"),
    Ours("auto", "skip_join"),
]
SEED = 1
GOOD_RATIO = 0.9
FIRST_RATE_PER_S = 1.0
PRECISION_RATIO = 1.05
TRIES_MAX = 10
REQUESTS_MIN = 30  # of a try: among fewer, one that is not good decides
ATTEMPTS = 2  # at a rate, before it is given up: a moment's trouble of the machine says nothing
TUNING_RATE_PER_S = 1.6
REQUEST_S_MAX = 60.0  # whoever waits longer has missed every target, and keeps the next try waiting


@dataclass(frozen=True, slots=True)
class Targets:
    ttft_ms: float
    long_ttft_ms: float
    tpot_ms: float

    def good(self, outcome: Outcome) -> bool:
        if outcome.error or outcome.ttft_s is None:
            return False
        limit_ms = self.long_ttft_ms if outcome.kind == "long" else self.ttft_ms
        rest_ms = sum(outcome.gaps_s) * 1000
        return outcome.ttft_s * 1000 <= limit_ms and rest_ms <= self.tpot_ms * max(
            0, outcome.tokens - 1
        )

    def good_ratio(self, outcomes: Sequence[Outcome]) -> float:
        return sum(map(self.good, outcomes)) / len(outcomes)


def highest_rate(holds: Callable[[float], bool]) -> float:
    """The highest rate per second that is known to hold; 0 when none was found.

    Taken for granted: what holds at a rate holds at every lower one.
    """
    good, bad = 0.0, math.inf
    rate = FIRST_RATE_PER_S
    for _ in range(TRIES_MAX):
        if holds(rate):
            good = rate
        else:
            bad = rate
        if bad <= good * PRECISION_RATIO:
            break
        if math.isinf(bad):
            rate = good * 2
        elif good == 0:
            rate = bad / 2
        else:
            rate = math.sqrt(good * bad)
    return good


def measure(options: Options) -> Iterator[Row]:
    given = options.arguments
    work = Work(given.work)
    targets = Targets(given.ttft_ms, given.long_ttft_ms, given.tpot_ms)
    missing = vllm_missing()
    peer = None if missing else given.vllm or best_vllm(work, targets, options)
    for long_share in given.long_shares or ([0.2] if options.quick else [0.0, 0.2]):
        rate_of = functools.partial(goodput, work, targets, long_share, options)
        title = f"goodput, {long_share:.0%} long"
        peer_rate = None if peer is None else rate_of(peer)
        rates = {}
        for form in MODES:
            rates[form.mode] = rate_of(form)
            yield row(
                f"{title}, {form.mode}",
                [rates[form.mode]],
                "req/s",
                reference="" if peer is None else peer.name,
                reference_samples=[] if peer_rate is None else [peer_rate],
            )
        apart, together = rates["disaggregated"], rates["aggregated"]
        pays = apart > together * PRECISION_RATIO
        yield row(
            f"{title}, apart: {'pays' if pays else 'does not pay'} here",
            [apart],
            "req/s",
            reference="aggregated",
            reference_samples=[together],
        )
    if missing:
        yield skipped("goodput beside vLLM", "req/s", missing)


def goodput(work: Work, targets: Targets, long_share: float, options: Options, form: Form) -> float:
    seconds = options.arguments.seconds or (20 if options.quick else 60)

    def search() -> float:
        tries = itertools.count()
        with serving(form, work.log(form)) as target:

            def holds_once(rate_per_s: float) -> bool:
                lasts_s = max(seconds, REQUESTS_MIN / rate_per_s)
                arrivals = unseen(
                    mixed(rate_per_s=rate_per_s, seconds=lasts_s, seed=SEED, long_share=long_share),
                    next(tries),
                )
                outcomes = asyncio.run(drive(target, arrivals, timeout_s=REQUEST_S_MAX))
                return targets.good_ratio(outcomes) >= GOOD_RATIO

            def holds(rate_per_s: float) -> bool:
                return any(holds_once(rate_per_s) for _ in range(ATTEMPTS))

            return highest_rate(holds)

    about = ["goodput", astuple(targets), long_share, seconds, REQUESTS_MIN, ATTEMPTS]
    rate: float = work.remembered(form, about, search)
    return rate


def unseen(arrivals: Sequence[Arrival], number: int) -> list[Arrival]:
    """The same load with other prompts in each try: a server may have kept those of the last."""
    return [replace(arrival, seed=arrival.seed ^ (number + 1) << 32) for arrival in arrivals]


def best_vllm(work: Work, targets: Targets, options: Options) -> Vllm:
    """Most good requests; among equals, the shortest wait of chats."""
    arrivals = mixed(
        rate_per_s=TUNING_RATE_PER_S,
        seconds=options.arguments.tuning_seconds or (30 if options.quick else 120),
        seed=TUNING_SEED,
    )
    tried = try_all(work, FEW_SETTINGS if options.quick else ALL_SETTINGS, arrivals)
    return tried.best(lambda outcomes: (-targets.good_ratio(outcomes), chat_ttft_s_p90(outcomes)))


def shares(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="of each try at least; 60, with --quick 20")
    parser.add_argument("--long-shares", type=shares, help="0,0.2, with --quick 0.2")
    parser.add_argument("--ttft-ms", type=float, default=1000.0, help="for chats")
    parser.add_argument("--long-ttft-ms", type=float, default=5000.0, help="for long prompts")
    parser.add_argument("--tpot-ms", type=float, default=60.0)
    parser.add_argument("--vllm", type=vllm_setting, help="compare with this setting, try none")
    parser.add_argument("--tuning-seconds", type=float, help="per setting; 120, with --quick 30")
    parser.add_argument("--work", type=Path, default=default_directory("mixed_load"))


if __name__ == "__main__":
    run("goodput", measure, add_arguments=add_arguments)
