"""Chats beside long prompts: our cluster in five forms, and the best that vLLM's CPU build can do.

    python -m bench.mixed_load [--quick] [--seconds 300] [--seeds 3] [--rate 1.6] [--json FILE]
                               [--only ours|vllm|headline] [--headline "aggregated skip_join"]
                               [--vllm 512,128,fcfs] [--tuning-seconds 120] [--work DIRECTORY]

The load is that of ``peers/mixed_load.py``: 80 % chats (64 tokens in, 64 out) and 20 % long prompts
(1,536 in, 16 out), Poisson, random token ids, greedy, no end before the last token, bf16 on both
sides. Ours: one worker per pool, {aggregated, disaggregated} × {fcfs, skip_join}, so that the share
of each step shows; and once more with the file's own weights of 4 bits. The bars are for the form
that ``--headline`` names; ``--only headline`` measures no other beside vLLM.

*The peer* is the best of vLLM over chunk budget {default, 256, 512} × long-prefill threshold
{0, 64, 128} × {fcfs, priority with chats first}, chosen by the 90th percentile of the chats' time
to first token under a load of another seed; a row shows what each setting reached there. ``--vllm``
names one instead.

One server runs at a time, since they share the cores. For each seed every form has its turn; who
begins changes from seed to seed. Starting and warming up lie outside of the measure. Seeds are
pooled; behind each ratio stands its 95 % interval (``intervals``). On two cores all of it takes
about two and a half hours, one of them for the choice of the peer. Results of pieces are kept in
``--work``: an interrupted run goes on where it was (``runs``).

*Throughput* is all generated tokens, as usage counts them, over the time from the first arrival to
the last answer's end. Below saturation every server delivers what arrives, and what is left of a
difference is how long the last answer took: its ratio is compared at two digits.
"""

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.frame import Bar, Options, Row, at_least, at_most, row, run, skipped
from bench.intervals import Floats, at_percentile, blocks, ratio_interval
from bench.peers.mixed_load import Outcome, mixed, tokens_per_s, ttfts_s
from bench.runs import Work, default_directory, take_turns
from bench.servers import Form, Ours, Vllm, vllm_missing
from bench.tuning import ALL_SETTINGS, FEW_SETTINGS, TUNING_SEED, chat_ttft_s_p90, try_all

OURS = [
    Ours("aggregated", "fcfs"),
    Ours("aggregated", "skip_join"),
    Ours("disaggregated", "fcfs"),
    Ours("disaggregated", "skip_join"),
    Ours("aggregated", "skip_join", quantization="file"),
]
HEADLINE = OURS[1].name
FIRST_SEED = 1
THROUGHPUT_BAR = at_least(1.0, of="ratio")

Runs = Mapping[Form, Sequence[Sequence[Outcome]]]  # of each form one run per seed


@dataclass(frozen=True, slots=True)
class Measure:
    name: str
    samples_ms: Callable[[Outcome], Iterable[float]]
    at: float
    bar: Bar | None = None


def ttft_ms(kind: str, outcome: Outcome) -> Iterator[float]:
    if outcome.kind == kind:
        yield from (ttft * 1000 for ttft in ttfts_s([outcome]))


def gaps_ms(kind: str, outcome: Outcome) -> Iterator[float]:
    if outcome.kind == kind:
        yield from (gap * 1000 for gap in outcome.gaps_s)


CHAT_TTFT_MS = functools.partial(ttft_ms, "chat")
CHAT_GAPS_MS = functools.partial(gaps_ms, "chat")
LONG_TTFT_MS = functools.partial(ttft_ms, "long")

MEASURES = [
    Measure("chat TTFT p50", CHAT_TTFT_MS, 0.5),
    Measure("chat TTFT p90", CHAT_TTFT_MS, 0.9, at_most(0.6, of="ratio")),
    Measure("chat gaps p50", CHAT_GAPS_MS, 0.5),
    Measure("chat gaps p99", CHAT_GAPS_MS, 0.99, at_most(0.35, of="ratio")),
    Measure("long TTFT p90", LONG_TTFT_MS, 0.9, at_most(1.2, of="ratio")),
]


def measure(options: Options) -> Iterator[Row]:
    given = options.arguments
    work = Work(given.work)
    missing = vllm_missing() if given.only != "ours" else "--only ours"
    peer = None
    if not missing:
        peer = given.vllm
        if peer is None:
            peer, rows = tuned(work, options)
            yield from rows
    forms: list[Form] = [*ours_of(given), *([peer] if peer else [])]
    if forms:
        runs = all_runs(work, forms, options)
        headline = None if peer is None else given.headline
        for form in forms:
            if form is not peer or len(forms) == 1:
                yield from rows_of(form, runs, peer, with_bars=form.name == headline)
    if missing:
        yield skipped("all of it beside vLLM", "", missing)


def ours_of(given: argparse.Namespace) -> list[Ours]:
    if given.only == "headline":
        return [form for form in OURS if form.name == given.headline]
    return OURS if given.only != "vllm" else []


def tuned(work: Work, options: Options) -> tuple[Vllm, list[Row]]:
    """The best of vLLM's settings, and what each reached."""
    given = options.arguments
    arrivals = mixed(
        rate_per_s=given.rate,
        seconds=given.tuning_seconds or (30 if options.quick else 120),
        seed=TUNING_SEED,
    )
    tried = try_all(work, FEW_SETTINGS if options.quick else ALL_SETTINGS, arrivals)
    rows = [
        row(f"choice: {setting.name}, chat TTFT p90", samples(CHAT_TTFT_MS, [run]), "ms", at=0.9)
        for setting, run in tried.outcomes.items()
    ]
    rows += [
        skipped(f"choice: {setting.name}", "ms", reason.splitlines()[0])
        for setting, reason in tried.failed.items()
    ]
    return tried.best(lambda outcomes: (chat_ttft_s_p90(outcomes),)), rows


def all_runs(work: Work, forms: Sequence[Form], options: Options) -> Runs:
    given = options.arguments
    seconds = given.seconds or (40 if options.quick else 300)
    runs: dict[Form, list[Sequence[Outcome]]] = {form: [] for form in forms}
    for index in range(given.seeds or (1 if options.quick else 3)):
        arrivals = mixed(rate_per_s=given.rate, seconds=seconds, seed=FIRST_SEED + index)
        for form in take_turns(forms, index):
            runs[form].append(work.outcomes(form, arrivals))
    return runs


def rows_of(form: Form, runs: Runs, peer: Vllm | None, *, with_bars: bool) -> Iterator[Row]:
    against = None if form is peer else peer
    for one in MEASURES:
        yield compared(one, form, runs, against, with_bar=with_bars)
    yield throughput(form, runs, against, with_bar=with_bars)


def compared(one: Measure, form: Form, runs: Runs, peer: Vllm | None, *, with_bar: bool) -> Row:
    made = row(
        f"{one.name}, {form.name}",
        samples(one.samples_ms, runs[form]),
        "ms",
        reference="" if peer is None else f"{peer.name}",
        reference_samples=() if peer is None else samples(one.samples_ms, runs[peer]),
        bar=one.bar if with_bar else None,
        at=one.at,
    )
    if peer is None:
        return made
    ours, theirs = (blocks(runs[which], one.samples_ms) for which in (form, peer))
    return replace(made, ratio_interval=ratio_interval(ours, theirs, at_percentile(one.at)))


def throughput(form: Form, runs: Runs, peer: Vllm | None, *, with_bar: bool) -> Row:
    made = row(
        f"generated tokens, {form.name}",
        [tokens_per_s(one) for one in runs[form]],
        "tokens/s",
        reference="" if peer is None else peer.name,
        reference_samples=() if peer is None else [tokens_per_s(one) for one in runs[peer]],
    )
    if peer is None:
        return made
    ours, theirs = ([tokens_and_seconds(one) for one in runs[which]] for which in (form, peer))
    made = replace(made, ratio_interval=ratio_interval(ours, theirs, pooled_rate))
    if not with_bar:
        return made
    assert made.ratio is not None
    holds = THROUGHPUT_BAR.holds(made.ratio, round(made.ratio, 2))
    return replace(made, bar=THROUGHPUT_BAR.text(made.unit), holds=holds)


def samples(
    of: Callable[[Outcome], Iterable[float]], runs: Sequence[Sequence[Outcome]]
) -> list[float]:
    """Of all runs together."""
    return [value for outcomes in runs for outcome in outcomes for value in of(outcome)]


def tokens_and_seconds(outcomes: Sequence[Outcome]) -> Floats:
    """One row: a run as a block of its own."""
    tokens = sum(outcome.tokens for outcome in outcomes)
    return np.array([[tokens, max(outcome.ended_s for outcome in outcomes)]], dtype=np.float64)


def pooled_rate(runs: Floats) -> float:
    tokens, seconds = runs.sum(axis=0)
    return float(tokens / seconds)


def vllm_setting(text: str) -> Vllm:
    """From the three parts of its name: ``512,128,fcfs``, ``default,0,priority``."""
    try:
        budget, threshold, policy = text.replace("/", ",").split(",")
        chats_first = {"fcfs": False, "priority": True}[policy]
        return Vllm(None if budget == "default" else int(budget), int(threshold), chats_first)
    except (ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not BUDGET,THRESHOLD,POLICY with fcfs or priority, like 512,128,fcfs"
        ) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="of each run; 300, with --quick 40")
    parser.add_argument("--seeds", type=int, help="runs of each form; 3, with --quick 1")
    parser.add_argument("--rate", type=float, default=1.6, help="requests per second")
    parser.add_argument("--only", choices=("ours", "vllm", "headline"))
    parser.add_argument("--headline", choices=[form.name for form in OURS], default=HEADLINE)
    parser.add_argument("--vllm", type=vllm_setting, help="compare with this setting, try none")
    parser.add_argument("--tuning-seconds", type=float, help="per setting; 120, with --quick 30")
    parser.add_argument("--work", type=Path, default=default_directory("mixed_load"))


if __name__ == "__main__":
    run("mixed_load", measure, add_arguments=add_arguments)
