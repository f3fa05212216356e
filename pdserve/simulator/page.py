"""One HTML file with everything in it: a table, and charts drawn by ``charts``. No scripts, nothing
is loaded from elsewhere, and it prints."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from pdserve.simulator import charts
from pdserve.simulator.report import HEADINGS, Case, Goal, goodput_per_s, rows
from pdserve.simulator.result import Floats, Result

QUANTILES = 200
LAYERS_MAX = 8
"""Levels drawn apart; deeper ones are summed up in the last layer."""

_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f"
)  # fmt: skip
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "", "6 3", "2 3", "8 3 2 3")

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --faint: #d8d8d8; --soft: #666; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #ececec; --faint: #363b42; --soft: #a5a5a5; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif;
  margin: 2rem auto; max-width: 1400px; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 0 0 .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
.scroll { overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--faint);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.charts { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr));
  margin-top: 2rem; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: 13px; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
svg .tick { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--faint); fill: none; } .axis, .front { stroke: var(--soft); fill: none; }
.front { stroke-dasharray: 4 3; } .point { fill: #0072b2; }
.line { fill: none; stroke-width: 2; } .area { stroke: none; opacity: .8; }
"""


def page(cases: Sequence[Case], goal: Goal, *, title: str) -> str:
    """The report. Distributions, queues and the Pareto front are those of the load nearest to the
    trace's own; one load alone has no goodput curve, one policy no front."""
    assert cases
    load = min((case.load for case in cases), key=lambda each: (abs(math.log(each)), each))
    chosen = [case for case in cases if case.load == load]
    figures = [
        _figure("Time to first token", _distribution(chosen, "ttft_s", "seconds"), _OF_ALL),
        _figure("Time per token after it", _distribution(chosen, "tpot_s", "seconds"), _OF_ALL),
    ]
    figures += [
        _figure(f"Waiting in the router: {case.policy}", _queue(case.result), _LEVELS)
        for case in chosen
    ]
    if len({case.load for case in cases}) > 1:
        figures.append(_figure("Goodput against load", _goodput(cases, goal), _good(goal)))
    if len(chosen) > 1:
        figures.append(_figure("Mean against tail", _front(chosen), _FRONT))
    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows(cases, goal)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}{_series_style()}</style></head>\n<body>"
        f"<h1>{escape(title)}</h1>\n"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f'</div>\n<div class="charts">{"".join(figures)}</div></body></html>\n'
    )


_OF_ALL = "Part of the requests that took no longer."
_LEVELS = "Requests by level; level 0 is the shortest prefills."
_FRONT = "Time to first token. Nobody is better in both than those on the dashed line."


def _good(goal: Goal) -> str:
    return (
        f"Requests finished with the first token within {charts.number(goal.ttft_s)} s and the "
        f"others within {charts.number(goal.tpot_s * 1000)} ms each, per second."
    )


def _figure(title: str, chart: str, caption: str) -> str:
    return (
        f"<figure><h2>{escape(title)}</h2>{chart}<figcaption>{escape(caption)}</figcaption>"
        "</figure>\n"
    )


def _series_style() -> str:
    rules = []
    for index, (colour, dash) in enumerate(zip(_COLOURS, _DASHES, strict=True)):
        rules.append(f".line.s{index} {{ stroke: {colour}; stroke-dasharray: {dash or 'none'}; }}")
        rules.append(f".area.s{index} {{ fill: {colour}; }}")
    return "\n".join(rules)


def _distribution(cases: Sequence[Case], column: str, label: str) -> str:
    parts = np.linspace(0, 1, QUANTILES + 1)
    series: list[tuple[str, charts.Points]] = []
    for case in cases:
        values: Floats = getattr(case.result, column)
        known = values[np.isfinite(values)]
        if len(known):
            at = [float(value) for value in np.quantile(known, parts)]
            series.append((case.policy, list(zip(at, map(float, parts), strict=True))))
    x = charts.axis(label, [px for _, line in series for px, _ in line], log=True)
    return charts.lines(x, charts.Axis("requests", 0.0, 1.0), series, title=f"CDF, {label}")


def _queue(result: Result) -> str:
    at = [sample.at_s for sample in result.samples]
    depth = max((len(sample.waiting_by_level) for sample in result.samples), default=1)
    layers = []
    for level in range(min(depth, LAYERS_MAX)):
        last = level == LAYERS_MAX - 1 and depth > LAYERS_MAX
        upto = depth if last else level + 1
        values = [float(sum(sample.waiting_by_level[level:upto])) for sample in result.samples]
        layers.append((f"level {level}" + (" and deeper" if last else ""), values))
    return charts.stacked(
        charts.axis("seconds", at), "requests", at, layers, title="Queue by level over time"
    )


def _goodput(cases: Sequence[Case], goal: Goal) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for case in sorted(cases, key=lambda each: each.load):
        good = goodput_per_s(case, goal)
        series.setdefault(case.policy, []).append((case.load, good))
    x = charts.axis("load, times the trace's own", [px for s in series.values() for px, _ in s])
    y = charts.axis("good requests per second", [py for s in series.values() for _, py in s])
    return charts.lines(x, y, list(series.items()), title="Goodput against load")


def _front(cases: Sequence[Case]) -> str:
    named = []
    for case in cases:
        known = case.result.ttft_s[np.isfinite(case.result.ttft_s)]
        if len(known):
            named.append((case.policy, float(known.mean()), float(np.quantile(known, 0.99))))
    x = charts.axis("mean, seconds", [px for _, px, _ in named])
    y = charts.axis("99th percentile, seconds", [py for _, _, py in named])
    return charts.points(x, y, named, title="Pareto front")
