"""Decode: how long answers take under each order, where sequences or memory are short.

One decode worker with the step time and the swap bandwidth of the study we compare with; the rows'
names say the load and what binds. Conversation lengths are bound by memory, code by sequences; the
mix with a few very long answers is generated.
"""

import csv
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.decode_study import OrderName, decode_study, reasoning_mix
from bench.frame import Bar, Row, at_most
from pdserve.router.core import DECODE_TAIL_RATIOS

Lengths = list[tuple[int, int]]

REQUESTS = 4000
REQUESTS_QUICK = 1500

MEAN, BALANCED = (DECODE_TAIL_RATIOS[goal] for goal in ("mean", "balanced"))

CASES: tuple[tuple[str, str, float, int, int, float, float | None], ...] = (
    # lengths, what binds, ρ, sequences, tokens of KV, tail ratio by goal, bar on the mean
    ("code", "16 sequences", 0.9, 16, 1_340_000, MEAN, 0.72),
    ("code", "16 sequences", 1.1, 16, 1_340_000, MEAN, 0.25),
    ("reasoning", "memory", 1.1, 256, 300_000, BALANCED, 0.85),
    ("conv", "memory", 1.1, 256, 1_340_000, BALANCED, 0.78),
    ("conv", "memory", 0.95, 256, 1_340_000, BALANCED, 1.02),
    ("conv", "memory", 0.85, 256, 1_340_000, BALANCED, 1.02),
    ("conv", "memory", 0.5, 256, 1_340_000, BALANCED, 1.02),
)


def decode_rows(traces: Sequence[Path], *, quick: bool) -> Iterator[Row]:
    lengths = {"reasoning": reasoning_mix(REQUESTS, seed=0)}
    for trace, name in zip(traces, ("conv", "code"), strict=False):
        lengths[name] = _lengths(trace)
    seeds = range(1 if quick else 3)
    for name, binds, rho, slots, kv_tokens, tail_ratio, limit in CASES:
        if name not in lengths:
            continue
        taken = lengths[name][: REQUESTS_QUICK if quick else REQUESTS]
        means: dict[OrderName, list[float]] = {}
        tails: dict[OrderName, list[float]] = {}
        moves: list[float] = []
        for order in ("gated", "fcfs", "mlfq", "oracle"):
            found = [
                decode_study(taken, order, rho, slots, kv_tokens, seed, tail_ratio=tail_ratio)
                for seed in seeds
            ]
            means[order] = [figures["mean_jct_s"] for figures in found]
            tails[order] = [figures["p99_jct_s"] for figures in found]
            if order == "gated":
                moves = [figures["moves_per_request"] for figures in found]
        case = f"decode {name}, {binds}, ρ = {rho}"
        yield _row(f"{case}, mean, gated", means["gated"], "fcfs", means["fcfs"], limit)
        yield _row(f"{case}, p99, gated", tails["gated"], "fcfs", tails["fcfs"], 1.25)
        against_mlfq = 0.70 if name == "conv" and rho >= 0.95 else None
        yield _row(f"{case}, mean, gated", means["gated"], "mlfq", means["mlfq"], against_mlfq)
        yield _row(f"{case}, mean, gated", means["gated"], "oracle", means["oracle"], None)
        yield Row(f"{case}, moves per request", statistics.median(moves), "")


def _row(
    name: str, ours: list[float], reference: str, theirs: list[float], limit: float | None
) -> Row:
    bar: Bar | None = None if limit is None else at_most(limit, of="ratio")
    ratio = statistics.median(o / t for o, t in zip(ours, theirs, strict=True))
    value = statistics.median(ours)
    return Row(
        name, value, "s", reference=reference, reference_value=statistics.median(theirs),
        ratio=ratio, bar="" if bar is None else bar.text(""),
        holds=None if bar is None else bar.holds(value, ratio), spread=(min(ours), max(ours)),
    )  # fmt: skip


def _lengths(trace: Path) -> Lengths:
    if trace.suffix == ".jsonl":
        lines = map(json.loads, trace.read_text().splitlines())
        return [(line["input_length"], line["output_length"]) for line in lines]
    with trace.open(encoding="utf-8-sig", newline="") as rows:
        return [(int(r["ContextTokens"]), int(r["GeneratedTokens"])) for r in csv.DictReader(rows)]
