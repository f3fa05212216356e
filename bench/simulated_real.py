"""The simulator beside the real cluster: equal arrivals and policies, what it says and what came.

    python -m bench.simulated_real [--quick] [--json FILE] [--seconds 180] [--seeds 2] [--rate 1.2]
                [--learning-seconds 90] [--long-share 0.2] [--policies fcfs,skip_join,hrrn]
                [--profile FILE] [--mode aggregated] [--work DIRECTORY]

One worker that has the cores to itself; or, with ``--mode disaggregated``, a prefill and a decode
worker of one thread each, which share caches and memory, and two cores with all other processes:
of that the simulator knows a single factor, ``contention``. What work costs comes from ``pdserve
profile`` (first, unless ``--profile`` names one), with the same settings, and beside as many other
workers. Chats and long prompts arrive as in ``peers/mixed_load.py``. The simulator is given the
same arrivals, and what a lone small request takes beyond its prefill on the idle cluster: client,
HTTP, text, messages.

A profile is measured on an idle machine, each point at its best; in a cluster work takes longer,
for gateway, router and stores want the cores too, and more so for each step that says tokens. By
how much is learned before each round of policies, since a machine's own speed changes too: chats
alone and then long prompts alone (of seeds that are not compared, at the rate that each has in the
mixed load) run on the real cluster, whose workers say how long they were in steps. The two
*slowdowns*, of prefills and of decode steps, are the factors with which the simulator is busy for
as long under the same two loads. Neither policies nor times to a first token take part in that, nor
do loads in which the two meet.

Means are over all requests of all seeds. *Error* is that of the simulated mean, by the real one.
"""

import argparse
import dataclasses
import itertools
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
LEARNING_ROUNDS = 3
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
    profile: Profile


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
        learning = learning_loads(
            given.rate,
            given.long_share,
            seconds=given.learning_seconds or (30 if options.quick else 90),
            seed=LEARNING_SEED + index,
        )
        busy_s = _busy_s(work, forms[0], learning)
        arrivals = mixed(
            rate_per_s=given.rate,
            seconds=seconds,
            seed=FIRST_SEED + index,
            long_share=given.long_share,
        )
        rounds.append(Round(arrivals, slowed(profile, forms[0], learning, busy_s)))
        for form in take_turns(forms, index):
            assert isinstance(form, Ours)
            came[form] += work.outcomes(form, arrivals)
    for name in ("prefill_slowdown", "decode_slowdown"):
        factors = [getattr(each.profile, name) for each in rounds]
        yield row(f"{name}, learned under other loads", factors, "×")
    real = {form.policy: _real(outcomes) for form, outcomes in came.items()}
    said = {form.policy: _simulated(form, rounds, overhead_s) for form in forms}
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


def learning_loads(
    rate_per_s: float, long_share: float, *, seconds: float, seed: int
) -> list[list[Arrival]]:
    """Chats alone, and long prompts alone."""
    chats_per_s, longs_per_s = rate_per_s * (1 - long_share), rate_per_s * long_share
    return [
        mixed(rate_per_s=chats_per_s, seconds=seconds, seed=seed, long_share=0.0),
        mixed(rate_per_s=longs_per_s, seconds=seconds, seed=seed, long_share=1.0),
    ]


def slowed(
    profile: Profile, form: Ours, loads: Sequence[Sequence[Arrival]], busy_s: Sequence[float]
) -> Profile:
    """With the slowdowns with which workers are busy for as long under each of the two loads. Each
    is found given the other; since chats hardly prefill and long prompts hardly decode, a few
    rounds of that settle both."""
    (chats, longs), (chats_s, longs_s) = loads, busy_s
    for _ in range(LEARNING_ROUNDS):
        profile = _slowed(profile, "decode_slowdown", form, chats, chats_s)
        profile = _slowed(profile, "prefill_slowdown", form, longs, longs_s)
    return profile


def _slowed(
    profile: Profile, factor: str, form: Ours, arrivals: Sequence[Arrival], busy_s: float
) -> Profile:
    """By bisection. Workers are busy for longer the slower they are, though less so where more of
    what they do shares a step."""
    low, high = SLOWDOWNS
    while high - low > SLOWDOWN_EXACT:
        middle = (low + high) / 2
        tried = replace(profile, **{factor: middle})  # type: ignore[arg-type]
        if _played(form, arrivals, tried).counters["simulated_busy_us"] / 1e6 < busy_s:
            low = middle
        else:
            high = middle
    return replace(profile, **{factor: (low + high) / 2})  # type: ignore[arg-type]


def _simulated(form: Ours, rounds: Sequence[Round], overhead_s: float) -> Means:
    results = [_played(form, each.arrivals, each.profile) for each in rounds]
    ttft_s = np.concatenate([result.ttft_s for result in results])
    tpot_s = np.concatenate([result.tpot_s for result in results])
    return float(ttft_s.mean()) + overhead_s, float(np.nanmean(tpot_s))


def _played(form: Ours, arrivals: Sequence[Arrival], profile: Profile) -> Result:
    config = from_tree({"router": {"policy": form.policy, "mode": form.mode}})
    return simulate(_trace(arrivals), settings_of(config, profile))


def _busy_s(work: Work, form: Ours, loads: Sequence[Sequence[Arrival]]) -> list[float]:
    """For how long the real workers were in steps, together, under one load after the other."""

    def busy_s() -> list[float]:
        with serving(form, work.log(form)) as target:
            at_us = [_step_us(target.url)]
            for arrivals in loads:
                driven(form, target, arrivals)
                at_us.append(_step_us(target.url))
            return [(end - begin) / 1e6 for begin, end in itertools.pairwise(at_us)]

    about = ["busy", [[dataclasses.asdict(arrival) for arrival in load] for load in loads]]
    found: list[float] = work.remembered(form, about, busy_s)
    return found


def _step_us(url: str) -> int:
    time.sleep(REPORTED_S)
    return sum(worker["counters"]["step_us_total"] for worker in fetch(url)["workers"])


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
        "--learning-seconds",
        type=float,
        help="of each of two loads before a round; 90, with --quick 30",
    )
    parser.add_argument("--long-share", type=float, default=0.2)
    parser.add_argument("--policies", type=policies, default=["fcfs", "skip_join", "hrrn"])
    parser.add_argument("--mode", choices=["aggregated", "disaggregated"], default="aggregated")
    parser.add_argument("--profile", type=Path, help="instead of measuring one")
    parser.add_argument("--work", type=Path, default=default_directory("simulated_real"))


if __name__ == "__main__":
    run("simulated_real", measure, add_arguments=add_arguments)
