"""Every figure we state of the router: distance to the oracle, baselines, fairness, speed.

    python -m bench.scheduling [--quick] [--trace FILE …] [--only SECTION …] [--seeds 5]

Simulated with the production core on public traces. All ratios are taken per seed, between runs
with the same arrivals; the value is their median over the seeds, and the interval is that of a
bootstrap over seeds and stretches of the trace. Bars are stated for the two traces that come with
the repository; another trace of a known format can be named and is measured in the same way.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.frame import ROOT, Bar, Options, Row, at_least, at_most, run
from bench.scheduling_cells import POLICIES, Cell, Figures, measure_all
from bench.scheduling_decode import decode_rows
from bench.scheduling_fairness import fairness_rows
from bench.scheduling_speed import speed_rows

TRACES = (
    ROOT / "bench/traces/conversation_trace.jsonl",
    ROOT / "bench/traces/AzureLLMInferenceTrace_code.csv",
)
CONVERSATION, CODE = (trace.stem for trace in TRACES)

BASELINES = (
    "fcfs", "hrrn", "lpm", "lpm, ageing", "sjf, ageing", "wspt", "γ-boost", "mlfq", "fastserve",
    "fastserve, released",
)  # fmt: skip
OURS = tuple(policy for policy in POLICIES if policy.startswith("ours"))
RHOS = (0.7, 0.9, 1.0)
RHO = 0.9
TOLERANCE = 1.02
DRAWS = 400

Runs = dict[Cell, Figures]


class Study:
    """The runs of the queueing tables, and ratios between them."""

    def __init__(
        self, traces: Sequence[Path], *, seeds: Sequence[int], rhos: Sequence[float]
    ) -> None:
        self.traces, self.seeds, self.rhos = traces, seeds, rhos
        policies = {*BASELINES, *OURS, "sjf", "srpt, oracle"}
        cells = [
            Cell(trace, rho, policy, seed)
            for trace in traces
            for rho in rhos
            for policy in sorted(policies)
            for seed in seeds
        ]
        at_rho = [cell for cell in cells if cell.rho == RHO and cell.policy == "ours, mean"]
        cells += [replace(cell, sigma=0.7) for cell in at_rho]
        self.runs: Runs = measure_all(cells)

    def ratio(
        self,
        trace: Path,
        rho: float,
        policy: str,
        over: str,
        figure: Callable[[Figures], float],
        *,
        sigma: float = 0.0,
    ) -> list[float]:
        """Per seed."""
        return [
            figure(self.runs[Cell(trace, rho, policy, seed, sigma=sigma)])
            / figure(self.runs[Cell(trace, rho, over, seed)])
            for seed in self.seeds
        ]

    def interval(self, trace: Path, rho: float, policy: str, over: str) -> tuple[float, float]:
        """Of the ratio of means, with 95 %: seeds and tenths of the trace drawn again."""
        chance = np.random.default_rng(0)
        ours = np.array([self.runs[Cell(trace, rho, policy, s)].blocks for s in self.seeds])
        theirs = np.array([self.runs[Cell(trace, rho, over, s)].blocks for s in self.seeds])
        ratios = []
        for _ in range(DRAWS):
            seeds = chance.integers(len(self.seeds), size=len(self.seeds))
            tenths = chance.integers(ours.shape[1], size=ours.shape[1])
            drawn = np.ix_(seeds, tenths)
            ratios.append(ours[drawn].mean() / theirs[drawn].mean())
        low, high = np.quantile(ratios, [0.025, 0.975])
        return float(low), float(high)


def mean(figures: Figures) -> float:
    return figures.mean


def p50(figures: Figures) -> float:
    return figures.p50


def p99(figures: Figures) -> float:
    return figures.p99


def slowdown(figures: Figures) -> float:
    return figures.slowdown_p99


def worst(figures: Figures) -> float:
    return figures.worst


def _ratio_row(
    study: Study,
    trace: Path,
    what: str,
    policy: str,
    over: str,
    figure: Callable[[Figures], float],
    bar: Bar | None,
    *,
    rho: float = RHO,
    sigma: float = 0.0,
) -> Row:
    ratios = study.ratio(trace, rho, policy, over, figure, sigma=sigma)
    ratio = statistics.median(ratios)
    own = [figure(study.runs[Cell(trace, rho, policy, s, sigma=sigma)]) for s in study.seeds]
    their = [figure(study.runs[Cell(trace, rho, over, s)]) for s in study.seeds]
    value = statistics.median(own)
    return Row(
        name=f"{_short(trace)} {what}, {policy}",
        value=value,
        unit="×" if figure is slowdown else "s",
        reference=over,
        reference_value=statistics.median(their),
        ratio=ratio,
        bar="" if bar is None else bar.text(""),
        holds=None if bar is None else bar.holds(value, ratio),
        spread=(min(own), max(own)),
        ratio_interval=study.interval(trace, rho, policy, over)
        if figure is mean and sigma == 0.0
        else None,
    )


def _short(trace: Path) -> str:
    return {CONVERSATION: "conv", CODE: "code"}.get(trace.stem, trace.stem)


# ── the queueing tables ──────────────────────────────────────────────────────────────────────────

MEAN_BARS = {CONVERSATION: 0.26, CODE: 0.40}
MLFQ_BARS = {CONVERSATION: 0.85, CODE: 0.45}
P50_BARS = {CONVERSATION: 0.22, CODE: 0.05}
BALANCED_BARS = {CONVERSATION: 0.36, CODE: 0.78}
TAIL_BARS = {CONVERSATION: 0.66, CODE: 0.90}


def _bar(bars: dict[str, float], trace: Path) -> Bar | None:
    limit = bars.get(trace.stem)
    return None if limit is None else at_most(limit, of="ratio")


def queue_rows(study: Study) -> Iterator[Row]:
    for trace in study.traces:
        known = trace.stem in MEAN_BARS

        def compared(
            what: str,
            policy: str,
            over: str,
            figure: Callable[[Figures], float],
            bar: Bar | None,
            trace: Path = trace,
        ) -> Row:
            return _ratio_row(study, trace, what, policy, over, figure, bar)

        oracle = "srpt, oracle"
        yield compared("mean", "ours, mean", oracle, mean, at_most(1.15, of="ratio"))
        yield compared("mean", "ours, mean, no preemption", oracle, mean, at_most(1.40, of="ratio"))
        yield compared("mean", "ours, mean", "fcfs", mean, _bar(MEAN_BARS, trace))
        yield compared("p50", "ours, mean", "fcfs", p50, _bar(P50_BARS, trace))
        bar: Bar | None = at_most(0.25, of="ratio")
        yield compared("p99 slowdown", "ours, mean", "fcfs", slowdown, bar)
        yield compared("mean", "ours, mean", "mlfq", mean, _bar(MLFQ_BARS, trace))
        bar = at_most(1.05, of="ratio") if known else None
        yield compared("p99", "ours, balanced", "fcfs", p99, bar)
        yield compared("mean", "ours, balanced", "fcfs", mean, _bar(BALANCED_BARS, trace))
        bar = at_most(1.35, of="ratio") if known else None
        yield compared("worst wait", "ours, balanced", "fcfs", worst, bar)
        bar = at_most(1.0, of="ratio") if known else None
        yield compared("p99", "ours, tail", "fcfs", p99, bar)
        yield compared("mean", "ours, tail", "fcfs", mean, _bar(TAIL_BARS, trace))
        yield _ratio_row(
            study, trace, "mean, sizes wrong by σ = 0.7", "ours, mean", "ours, mean", mean,
            at_most(1.30, of="ratio"), sigma=0.7,
        )  # fmt: skip
        for policy in (*BASELINES[1:], "sjf", oracle):
            yield compared("mean", policy, "fcfs", mean, None)
            yield compared("p99", policy, "fcfs", p99, None)
        yield from _hygiene_rows(study, trace)


def _hygiene_rows(study: Study, trace: Path) -> Iterator[Row]:
    runs = [study.runs[Cell(trace, RHO, "ours, mean", seed)] for seed in study.seeds]
    figures: list[tuple[str, str, list[float], Bar]] = [
        ("preemptions per request, mean", "", [r.preempted_mean for r in runs], at_most(0.15)),
        ("preemptions per request, p99", "", [r.preempted_p99 for r in runs], at_most(2)),
        ("tokens computed again", "%", [100 * r.tokens_again for r in runs], at_most(1)),
    ]
    for what, unit, values, bar in figures:
        value = statistics.median(values)
        yield Row(
            f"{_short(trace)} {what}", value, unit, bar=bar.text(unit), holds=bar.holds(value, None)
        )


def dominance_rows(study: Study) -> Iterator[Row]:
    """In how many cells some setting of ours is as good in the mean and in the tail."""
    won = {rival: _cells_won(study, rival, lambda ratio: ratio <= TOLERANCE) for rival in BASELINES}
    for rival, wins in won.items():
        yield _share_row(f"mean and p99 no worse than {rival}", wins, at_least(90))
    together = [win for wins in won.values() for win in wins]
    yield _share_row("mean and p99 no worse than each of these", together, at_least(90))
    for rival in ("sjf, ageing", "γ-boost"):
        wins = _cells_won(study, rival, lambda ratio: ratio < 1)
        yield _share_row(f"mean and p99 better than {rival}", wins, at_least(90))


def _cells_won(study: Study, rival: str, is_good: Callable[[float], bool]) -> list[bool]:
    """Of each trace and load, whether one setting of ours has a good mean and a good tail."""
    return [
        any(
            all(
                is_good(statistics.median(study.ratio(trace, rho, ours, rival, figure)))
                for figure in (mean, p99)
            )
            for ours in OURS
        )
        for trace in study.traces
        for rho in study.rhos
    ]


def _share_row(name: str, wins: Sequence[bool], bar: Bar) -> Row:
    share = 100 * sum(wins) / len(wins)
    return Row(
        f"{name}, of {len(wins)} cells", share, "%", bar=bar.text("%"), holds=bar.holds(share, None)
    )


def binding_rows(traces: Sequence[Path], seeds: Sequence[int]) -> Iterator[Row]:
    """Late binding against placement on arrival, eight workers at a load of 0.85."""
    placements = ("random", "round_robin", "least_requests", "two_choices", "least_work",
                  "mooncake", "dynamo", "lmetric", "preble")  # fmt: skip
    trace, rho = traces[0], 0.85
    late = [Cell(trace, rho, "ours, mean", seed, workers=8) for seed in seeds]
    late_fcfs = [Cell(trace, rho, "fcfs", seed, workers=8) for seed in seeds]
    bound = {
        (name, stale_ms): [
            Cell(trace, rho, "fcfs", s, placement=name, stale_ms=stale_ms, workers=8) for s in seeds
        ]
        for name, stale_ms in [*((name, 0.0) for name in placements), ("least_work", 200.0)]
    }
    runs = measure_all([*late, *late_fcfs, *(cell for cells in bound.values() for cell in cells)])
    ours = [runs[cell].mean for cell in late]
    rivals = {"late, fcfs": [runs[cell].mean for cell in late_fcfs]}
    for (name, stale_ms), cells in bound.items():
        label = f"{name}, fcfs" + (f", {stale_ms:.0f} ms old" if stale_ms else "")
        rivals[label] = [runs[cell].mean for cell in cells]
    bars = {"late, fcfs": 0.55, "least_work, fcfs, 200 ms old": 0.40}
    for label, theirs in rivals.items():
        ratio = statistics.median(o / t for o, t in zip(ours, theirs, strict=True))
        bar = at_most(bars[label], of="ratio") if label in bars else None
        value = statistics.median(ours)
        yield Row(
            f"{_short(trace)} mean, 8 workers, ρ = {rho}, ours, mean", value, "s",
            reference=label, reference_value=statistics.median(theirs), ratio=ratio,
            bar="" if bar is None else bar.text(""),
            holds=None if bar is None else bar.holds(value, ratio),
        )  # fmt: skip


# ── the command ──────────────────────────────────────────────────────────────────────────────────

SECTIONS = ("queue", "dominance", "binding", "decode", "fairness", "speed")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", type=Path, action="append", help="instead of those that come along"
    )
    parser.add_argument("--only", choices=SECTIONS, action="append", help="these sections alone")
    parser.add_argument("--seeds", type=int, help="of arrivals; 5, with --quick 2")


def rows(options: Options) -> Iterator[Row]:
    traces = tuple(options.arguments.trace or TRACES)
    sections = options.arguments.only or SECTIONS
    seeds = range(options.arguments.seeds or (2 if options.quick else 5))
    if {"queue", "dominance"} & set(sections):
        study = Study(traces, seeds=seeds, rhos=(RHO,) if options.quick else RHOS)
        if "queue" in sections:
            yield from queue_rows(study)
        if "dominance" in sections:
            yield from dominance_rows(study)
    if "binding" in sections:
        yield from binding_rows(traces, seeds)
    if "decode" in sections:
        yield from decode_rows(traces, quick=options.quick)
    if "fairness" in sections:
        yield from fairness_rows(quick=options.quick)
    if "speed" in sections:
        yield from speed_rows(traces, quick=options.quick)


if __name__ == "__main__":
    run("scheduling", rows, add_arguments=_arguments)
