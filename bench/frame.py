"""What every benchmark shares: rows, a table, a file of the same rows, and fair repetition.

A benchmark is a generator of rows:

    def measure(options: Options) -> Iterator[Row]:
        samples = interleave(options.rounds(20), ours=one_call, theirs=their_call)
        yield row("call", samples["ours"], "µs", reference="theirs",
                  reference_samples=samples["theirs"], bar=at_most(1.1, of="ratio"))

    if __name__ == "__main__":
        run("calls", measure)

A value is a median, and its spread (the 10th and the 90th percentile) stands beside it. What it is
compared with is a physical limit or a peer that was measured in the same run, turn and turn about,
because a machine's speed drifts by more than most differences that matter.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pdserve.compiled import is_in_use

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Row:
    """One measure. ``row`` fills in what follows from samples."""

    name: str
    value: float | None  # None: not measured, ``skipped`` says why
    unit: str
    reference: str = ""  # the physical limit or the peer
    reference_value: float | None = None
    ratio: float | None = None  # value / reference_value
    ratio_interval: tuple[float, float] | None = None  # between what 95 % of all repeats would lie
    bar: str = ""
    holds: bool | None = None  # None: nothing was promised
    spread: tuple[float, float] | None = None  # 10th and 90th percentile of the value
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class Bar:
    """A promise about a row."""

    limit: float
    direction: Literal["≤", "≥"]
    of: Literal["value", "ratio"]

    def text(self, unit: str) -> str:
        return f"{self.direction} {self.limit:g}" + (f" {unit}" if self.of == "value" else "×")

    def holds(self, value: float, ratio: float | None) -> bool:
        measured = value if self.of == "value" else ratio
        if measured is None:
            return False
        return bool(measured <= self.limit if self.direction == "≤" else measured >= self.limit)


def at_most(limit: float, *, of: Literal["value", "ratio"] = "value") -> Bar:
    return Bar(limit, "≤", of)


def at_least(limit: float, *, of: Literal["value", "ratio"] = "value") -> Bar:
    return Bar(limit, "≥", of)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line said."""

    quick: bool
    arguments: argparse.Namespace  # those that the area added

    def rounds(self, full: int) -> int:
        """How often to repeat: ``full`` times, or a fifth of that, and three times at least."""
        return max(3, full // 5) if self.quick else full


def row(
    name: str,
    samples: Sequence[float],
    unit: str,
    *,
    reference: str = "",
    reference_samples: Sequence[float] = (),
    bar: Bar | None = None,
    at: float | None = None,
) -> Row:
    """The row of some samples, compared by medians, or by the percentile ``at`` of both."""
    value = _summary(samples, at)
    reference_value = _summary(reference_samples, at) if reference_samples else None
    ratio = value / reference_value if reference_value else None
    return Row(
        name=name,
        value=value,
        unit=unit,
        reference=reference,
        reference_value=reference_value,
        ratio=ratio,
        bar=bar.text(unit) if bar is not None else "",
        holds=bar.holds(value, ratio) if bar is not None else None,
        spread=(percentile(samples, 0.1), percentile(samples, 0.9)),
    )


def _summary(samples: Sequence[float], at: float | None) -> float:
    return statistics.median(samples) if at is None else percentile(samples, at)


def skipped(name: str, unit: str, reason: str) -> Row:
    """A measure that cannot be taken on this machine."""
    return Row(name, None, unit, skipped=reason)


def percentile(samples: Sequence[float], ratio: float) -> float:
    """The smallest sample that at least this part of all samples does not exceed."""
    assert samples
    assert 0 <= ratio <= 1
    ordered = sorted(samples)
    return ordered[max(0, -int(-ratio * len(ordered) // 1) - 1)]  # ceil(ratio * count) - 1


def interleave(rounds: int, **measures: Callable[[], float]) -> dict[str, list[float]]:
    """Samples of each measure, taken in turn; the order turns round from one round to the next."""
    assert rounds > 0
    samples: dict[str, list[float]] = {name: [] for name in measures}
    for index in range(rounds):
        names = list(measures) if index % 2 == 0 else list(reversed(measures))
        for name in names:
            samples[name].append(measures[name]())
    return samples


def run(
    area: str,
    measure: Callable[[Options], Iterable[Row]],
    *,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Measure, print each row as soon as it is there, write the file; exit 1 when a bar is missed.
    What was measured before a part failed is in the file too.

    Args:
        add_arguments: adds what only this area can be told.
        argv: instead of the command line's.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.{area}")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, rougher numbers")
    if add_arguments is not None:
        add_arguments(parser)
    arguments = parser.parse_args(argv)
    about = machine()
    print(f"{area} on {describe(about)}, commit {commit()}\n")
    print(_line(_TITLES))
    print(_line(["-" * width for width, _ in _COLUMNS]))
    rows = []
    try:
        for item in measure(Options(arguments.quick, arguments)):
            rows.append(item)
            print(_line(cells(item)), flush=True)
    finally:
        if arguments.json is not None and rows:
            arguments.json.write_text(json.dumps(as_tree(area, about, rows), indent=1) + "\n")
    missed = [item.name for item in rows if item.holds is False]
    if missed:
        print(f"\nmissed: {', '.join(missed)}")
        sys.exit(1)


def as_tree(area: str, about: dict[str, object], rows: Sequence[Row]) -> dict[str, object]:
    """What ``--json`` writes."""
    return {
        "area": area,
        "machine": about,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": [dataclasses.asdict(item) for item in rows],
    }


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu_model(),
        "python": platform.python_version(),
        "torch": torch,
        "router": "compiled" if is_in_use() else "interpreted",
    }


def describe(about: dict[str, object]) -> str:
    gpu = f", {about['gpu']}" if about["gpu"] else ""
    return (
        f"{about['cpu']} ({about['cores']} cores, {about['memory_gib']} GiB{gpu}), "
        f"Python {about['python']}, torch {about['torch']}, router {about['router']}"
    )


def commit() -> str:
    """The commit of this tree, with a + when files have changed since; "" outside of git."""
    said = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not said:
        return ""
    return said + ("+" if _output("git", "-C", str(ROOT), "status", "--porcelain") else "")


def cells(item: Row) -> list[str]:
    """One row of the table, as text."""
    if item.value is None:
        return [item.name, "–", item.unit, "", item.skipped, "", "", "", ""]
    spread = "" if item.spread is None else f"{_short(item.spread[0])}–{_short(item.spread[1])}"
    return [
        item.name,
        _short(item.value),
        item.unit,
        spread,
        item.reference,
        "" if item.reference_value is None else _short(item.reference_value),
        _ratio(item),
        item.bar,
        {None: "", True: "holds", False: "MISSED"}[item.holds],
    ]


_TITLES = ["measure", "value", "unit", "spread", "reference", "its value", "ratio", "bar", ""]
_COLUMNS = [
    (44, "<"), (9, ">"), (8, "<"), (17, ">"), (28, "<"), (9, ">"), (16, "<"), (12, "<"), (6, "<"),
]  # fmt: skip


def _line(texts: Sequence[str]) -> str:
    pairs = zip(texts, _COLUMNS, strict=True)
    return " ".join(f"{text:{align}{width}}" for text, (width, align) in pairs).rstrip()


def _ratio(item: Row) -> str:
    if item.ratio is None:
        return ""
    interval = "" if item.ratio_interval is None else "{:.2f}–{:.2f}".format(*item.ratio_interval)
    return f"{item.ratio:.2f}× {interval}".strip()


def _short(value: float) -> str:
    """Three digits that count, without an exponent between a thousandth and a million."""
    digits = next((count for count, floor in enumerate((100, 10, 1)) if abs(value) >= floor), 3)
    return f"{value:,.{digits}f}"


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = itertools.chain(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        [platform.machine()],
    )
    return next(names)


def _gpu_model() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    said = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return said.replace("\n", ", ") or None


def _output(*command: str) -> str:
    """What a command prints, stripped; "" when it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
