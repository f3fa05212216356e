"""Tables of what was measured, from the files in ``bench/results``."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from handbook.tables import HEAD, cell, code, table

INTRODUCTION = """# Benchmarks

Every file of `bench/results`, as it was written by `python -m bench.AREA --json FILE`. A value is
a median and its spread the 10th and 90th percentile. What it is compared with was measured in the
same run. A ratio is ours divided by theirs; where a bar was promised, the last column says
whether it holds. A `+` behind a commit says that the tree had changes.
"""


def benchmarks_page(results: Path) -> str:
    out = [HEAD + INTRODUCTION]
    for file in sorted(results.glob("*.json")):
        out.append(section(file.stem, json.loads(file.read_text())))
    return "\n".join(out)


def section(name: str, run: Mapping[str, Any]) -> str:
    machine = run.get("machine", {})
    where = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    return (
        f"## {run['area']}: {name}\n\n"
        f"{run.get('date', '')[:10]}, commit {code(run.get('commit', '?'))}; {cell(where)}\n\n"
        + table(["", "value", "spread", "beside it", "its value", "ratio", "bar"], _rows(run))
    )


def _rows(run: Mapping[str, Any]) -> Iterator[list[str]]:
    for row in run["rows"]:
        unit = row["unit"]
        if row["value"] is None:
            yield [row["name"], "not measured", row["skipped"], "", "", "", row["bar"]]
            continue
        spread = row.get("spread")
        yield [
            row["name"],
            f"{figure(row['value'])} {unit}",
            "" if spread is None else f"{figure(spread[0])} to {figure(spread[1])}",
            row.get("reference", ""),
            "" if row.get("reference_value") is None else figure(row["reference_value"]),
            "" if row.get("ratio") is None else figure(row["ratio"]),
            _promise(row),
        ]


def _promise(row: Mapping[str, Any]) -> str:
    if row.get("holds") is None:
        return str(row.get("bar", ""))
    return f"{row['bar']}: {'holds' if row['holds'] else '**missed**'}"


def figure(value: float) -> str:
    """Three digits that count, and no power of ten."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):.10f}".rstrip("0").rstrip(".")
