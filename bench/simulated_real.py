"""The simulator beside the real cluster: equal arrivals and policies, what it says and what came.

    python -m bench.simulated_real [--quick] [--json FILE] [--seconds 180] [--seeds 2] [--rate 1.2]
                [--learning-seconds 120] [--long-share 0.2] [--policies fcfs,skip_join,hrrn]
                [--profile FILE] [--mode aggregated] [--work DIRECTORY]

One worker that has the cores to itself; or, with ``--mode disaggregated``, a prefill and a decode
worker of one thread each, which share caches and memory, and two cores with all other processes:
of that the simulator knows a single factor, ``contention``. What work costs comes from ``pdserve
profile`` (first, unless ``--profile`` names one), with the same settings, and beside as many other
workers. Chats and long prompts arrive as in ``peers/mixed_load.py``. The simulator is given the
same arrivals, and what a lone small request takes beyond its prefill on the idle cluster: client,
HTTP, text, messages.

A profile is measured on an idle machine, each point at its best; in a cluster work takes longer,
for gateway, router and stores want the cores too. By how much is learned before each round of
policies, since a machine's own speed changes too: a load of its own (a seed that is not compared,
half the rate) runs on the real cluster, whose workers say how long they were in steps. *Slowdown*
is the factor with which the simulator is busy for as long under the same load. Neither policies nor
times to a first token take part in that.

Means are over all requests of all seeds. *Error* is that of the simulated mean, by the real one.
"""

import argparse
import dataclasses
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.frame import ROOT, Options, Row, at_most, row, run
from bench.http_load import ask, random_tokens
from bench.peers.mixed_load import CHAT, Arrival, Outcome, mixed
from bench.runs import Work, default_directory, driven, take_turns
from bench.servers import Ours, serving
from pdserve.clock import S
from pdserve.cluster.commands.simulate import settings_of
from pdserve.cluster.commands.status import fetch
from pdserve.cluster.profiles import Profile, read_profile
from pdserve.settings import from_tree
from pdserve.simulator.result import Result
from pdserve.simulator.run import simulate
from pdserve.simulator.traces import Trace, TraceRequest

ALONE_ROUNDS = 40
FIRST_SEED = 1
LEARNING_SEED = 1001
LEARNING_RATIO = 0.5
SLOWDOWNS = (0.5, 4.0)
SLOWDOWN_EXACT = 0.002
REPORTED_S = 2.0
"""Workers report at least once a second how long they were in steps."""
ERROR_PERCENT_MAX = 10
NEIGHBOURS = {"aggregated": 0, "disaggregated": 1}
ONE_THREAD = (("prefill.threads", "1"), ("decode.threads", "1"))


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """The load of one seed, and how slow the cluster was shortly before it came."""

    arrivals: Sequence[Arrival]
    slowdown: float


Means = tuple[float, float]  # of the time to the first token and of that per further token, seconds


def measure(options: Options) -> Iterator[Row]:
    given = options.arguments
    work = Work(given.work)
    threads = ONE_THREAD if given.mode == "disaggregated" else ()
    forms = [Ours(given.mode, policy, threads) for policy in given.policies]
    profile = read_profile(str(given.profile or _profiled(work, forms[0])))
    overhead_s = _overhead_s(work, forms[0], profile)
    yield row("client, HTTP, text and messages, of one request", [overhead_s * 1000], "ms")
    seconds = given.seconds or (60 if options.quick else 180)
    rounds: list[Round] = []
    came: dict[Ours, list[Outcome]] = {form: [] for form in forms}
    for index in range(given.seeds or (1 if options.quick else 2)):
        load = functools.partial(mixed, long_share=given.long_share)
        learning = load(
            rate_per_s=given.rate * LEARNING_RATIO,
            seconds=given.learning_seconds or (60 if options.quick else 120),
            seed=LEARNING_SEED + index,
        )
        busy_s = _busy_s(work, forms[0], learning)
        slowdown = _slowdown(busy_s, forms[0], learning, profile)
        arrivals = load(rate_per_s=given.rate, seconds=seconds, seed=FIRST_SEED + index)
        rounds.append(Round(arrivals, slowdown))
        for form in take_turns(forms, index):
            assert isinstance(form, Ours)
            came[form] += work.outcomes(form, arrivals)
    slowdowns = [each.slowdown for each in rounds]
    yield row("slowdown in the cluster, learned under another load", slowdowns, "×")
    real = {form.policy: _real(outcomes) for form, outcomes in came.items()}
    said = {form.policy: _simulated(form, rounds, profile, overhead_s) for form in forms}
    for policy in given.policies:
        for name, place in (("TTFT", 0), ("TPOT", 1)):
            simulated, measured = said[policy][place], real[policy][place]
            yield row(
                f"mean {name}, {policy}, simulated", [simulated * 1000], "ms",
                reference="real", reference_samples=[measured * 1000],
            )  # fmt: skip
            error = 100 * abs(simulated / measured - 1)
            yield row(f"mean {name}, {policy}, error", [error], "%", bar=at_most(ERROR_PERCENT_MAX))
    other = _ranked(said) != _ranked(real)
    yield row(f"another order of {len(forms)} policies", [float(other)], "", bar=at_most(0))


def _ranked(means: dict[str, Means]) -> list[str]:
    """Policies by mean time to the first token."""
    return sorted(means, key=lambda policy: means[policy][0])


def _real(outcomes: Sequence[Outcome]) -> Means:
    ttft_s = [one.ttft_s for one in outcomes if one.ttft_s is not None]
    tpot_s = [sum(one.gaps_s) / (one.tokens - 1) for one in outcomes if one.tokens > 1]
    return statistics.fmean(ttft_s), statistics.fmean(tpot_s)


def _simulated(form: Ours, rounds: Sequence[Round], profile: Profile, overhead_s: float) -> Means:
    results = [_played(form, each.arrivals, profile, each.slowdown) for each in rounds]
    ttft_s = np.concatenate([result.ttft_s for result in results])
    tpot_s = np.concatenate([result.tpot_s for result in results])
    return float(ttft_s.mean()) + overhead_s, float(np.nanmean(tpot_s))


def _played(form: Ours, arrivals: Sequence[Arrival], profile: Profile, slowdown: float) -> Result:
    config = from_tree({"router": {"policy": form.policy, "mode": form.mode}})
    settings = settings_of(config, profile)
    return simulate(_trace(arrivals), replace(settings, slowdown=slowdown))


def _busy_s(work: Work, form: Ours, arrivals: Sequence[Arrival]) -> float:
    """For how long the real workers were in steps, together."""

    def busy_s() -> float:
        with serving(form, work.log(form)) as target:
            before_us = _step_us(target.url)
            driven(form, target, arrivals)
            return (_step_us(target.url) - before_us) / 1e6

    about = ["busy", [dataclasses.asdict(arrival) for arrival in arrivals]]
    found: float = work.remembered(form, about, busy_s)
    return found


def _step_us(url: str) -> int:
    time.sleep(REPORTED_S)
    return sum(worker["counters"]["step_us_total"] for worker in fetch(url)["workers"])


def _slowdown(busy_s: float, form: Ours, arrivals: Sequence[Arrival], profile: Profile) -> float:
    """With which the simulated workers are busy for as long: found by bisection. They are busy for
    longer the slower they are, though less so where more of them share a step."""
    low, high = SLOWDOWNS
    while high - low > SLOWDOWN_EXACT:
        middle = (low + high) / 2
        result = _played(form, arrivals, profile, middle)
        if result.counters["simulated_busy_us"] / 1e6 < busy_s:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _trace(arrivals: Sequence[Arrival]) -> Trace:
    requests = tuple(
        TraceRequest(
            round((arrival.due_s - arrivals[0].due_s) * S),
            arrival.lengths.prompt_tokens,
            arrival.lengths.generated_tokens,
        )
        for arrival in arrivals
    )
    return Trace(requests, 16, "mixed load")


def _overhead_s(work: Work, form: Ours, profile: Profile) -> float:
    """What a lone chat waits beyond its prefill."""
    tokens = CHAT.prompt_tokens

    def alone_s() -> list[float]:
        with serving(form, work.log(form)) as target:
            answers = [ask(target.url, random_tokens(tokens, n), 2) for n in range(ALONE_ROUNDS)]
        return [answer.token_s[0] - answer.sent_s for answer in answers]

    found: list[float] = work.remembered(form, ["alone", tokens], alone_s)
    return max(0.0, statistics.median(found) - profile.costs.prefill_ns(tokens) / S)


def _profiled(work: Work, form: Ours) -> Path:
    """What ``pdserve profile`` writes here, measured once."""
    file = work.directory / f"{form.mode}.profile.yaml"
    command = profile_command(form)

    def measured() -> str:
        subprocess.run([*command, f"--out={file}"], cwd=ROOT, check=True, stdout=sys.stderr)
        return file.read_text()

    file.write_text(work.remembered(form, ["profile", command[1:]], measured))
    return file


def profile_command(form: Ours) -> list[str]:
    """Measures a worker of the cluster that ``form`` starts."""
    neighbours = f"--neighbours={NEIGHBOURS[form.mode]}"
    return [sys.executable, "-m", "pdserve.cluster.cli", "profile", neighbours, *form.options]


def policies(text: str) -> list[str]:
    return text.split(",")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="of each run; 180, with --quick 60")
    parser.add_argument("--seeds", type=int, help="runs of each policy; 2, with --quick 1")
    parser.add_argument("--rate", type=float, default=1.2, help="requests per second")
    parser.add_argument(
        "--learning-seconds", type=float, help="before each round; 120, with --quick 60"
    )
    parser.add_argument("--long-share", type=float, default=0.2)
    parser.add_argument("--policies", type=policies, default=["fcfs", "skip_join", "hrrn"])
    parser.add_argument("--mode", choices=["aggregated", "disaggregated"], default="aggregated")
    parser.add_argument("--profile", type=Path, help="instead of measuring one")
    parser.add_argument("--work", type=Path, default=default_directory("simulated_real"))


if __name__ == "__main__":
    run("simulated_real", measure, add_arguments=add_arguments)
