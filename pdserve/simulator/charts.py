"""Charts as SVG text: lines, stacked areas and points, with axes that say what they show.

Colours are those of Okabe and Ito, told apart by people with any kind of colour vision; lines also
differ by their dashes, points by their labels. Colours and text are classes, so that the page's
style sheet makes them dark or light.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 16, 48
SERIES_MAX = 8
POINTS_MAX = 400
"""Points drawn per line; more are not seen on a screen and make the page heavy."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axis:
    label: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """From 0 to 1 along the axis."""
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            return (math.log(max(value, self.low)) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if self.log:
            first = math.floor(math.log10(self.low))
            last = math.ceil(math.log10(self.high))
            powers = [10.0**power for power in range(first, last + 1)]
            return [tick for tick in powers if self.low <= tick <= self.high * 1.0001]
        step = _round_step((self.high - self.low) / 5)
        first_tick = math.ceil(self.low / step)
        return [tick * step for tick in range(first_tick, math.floor(self.high / step) + 1)]


def axis(label: str, values: Sequence[float], *, log: bool = False, zero: bool = True) -> Axis:
    """One that all finite ``values`` fit on; with ``log`` to whole powers of ten."""
    finite = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if log:
        low = 10.0 ** math.floor(math.log10(min(finite, default=1.0)))
        high = 10.0 ** math.ceil(math.log10(max(finite, default=10.0)))
        return Axis(label, low, max(high, low * 10), log=True)
    low = min([0.0] if zero else finite, default=0.0)
    high = max(finite, default=1.0)
    return Axis(label, low, high if high > low else low + 1.0)


def lines(x: Axis, y: Axis, series: Sequence[tuple[str, Points]], *, title: str) -> str:
    """One line per series, named at the right."""
    drawn = []
    for index, (name, points) in enumerate(series[:SERIES_MAX]):
        path = "L".join(f"{_x(x, px)} {_y(y, py)}" for px, py in _thinned(points))
        if path:
            drawn.append(
                f'<path class="line s{index}" d="M{path}"><title>{escape(name)}</title></path>'
            )
        drawn.append(_legend(index, name))
    return _frame(x, y, title, drawn)


def stacked(x: Axis, label: str, at: Sequence[float], layers: Sequence[tuple[str, Sequence[float]]],
            *, title: str) -> str:  # fmt: skip
    """Layers on top of each other, the first lowest."""
    totals = [math.fsum(values) for values in zip(*(layer for _, layer in layers), strict=True)]
    y = axis(label, totals or [1.0])
    drawn, floor = [], [0.0] * len(at)
    for index, (name, values) in enumerate(layers):
        ceiling = [low + value for low, value in zip(floor, values, strict=True)]
        there = [f"{_x(x, px)} {_y(y, py)}" for px, py in zip(at, ceiling, strict=True)]
        back = [f"{_x(x, px)} {_y(y, py)}" for px, py in zip(at, floor, strict=True)]
        path = "L".join(there + back[::-1])
        if path:
            drawn.append(f'<path class="area s{index % SERIES_MAX}" d="M{path}Z"/>')
        drawn.append(_legend(index, name, area=True))
        floor = ceiling
    return _frame(x, y, title, drawn)


def points(x: Axis, y: Axis, named: Sequence[tuple[str, float, float]], *, title: str) -> str:
    """One labelled point each; those that nobody beats on both axes are joined."""
    front: list[tuple[float, float]] = []
    for _, px, py in sorted(named, key=lambda point: (point[1], point[2])):
        if not front or py < front[-1][1]:
            front.append((px, py))
    path = "L".join(f"{_x(x, px)} {_y(y, py)}" for px, py in front)
    drawn = [f'<path class="front" d="M{path}"/>'] if path else []
    for name, px, py in named:
        cx, cy = _x(x, px), _y(y, py)
        drawn.append(f'<circle class="point" cx="{cx}" cy="{cy}" r="4"/>')
        drawn.append(f'<text x="{cx + 7:.1f}" y="{cy + 4:.1f}">{escape(name)}</text>')
    return _frame(x, y, title, drawn)


def number(value: float) -> str:
    """Three digits, and no exponent where a person would not write one."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or 0.001 <= abs(value) < 1_000_000:
        text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        return text if "e" not in text else f"{value:,.0f}"
    return f"{value:.1e}"


def _frame(x: Axis, y: Axis, title: str, drawn: Sequence[str]) -> str:
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in x.ticks():
        px = _x(x, tick)
        parts.append(f'<path class="grid" d="M{px} {TOP}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{px}" y="{bottom + 16}" text-anchor="middle">'
                     f"{number(tick)}</text>")  # fmt: skip
    for tick in y.ticks():
        py = _y(y, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {py}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">'
                     f"{number(tick)}</text>")  # fmt: skip
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    middle = (LEFT + right) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>'
    )
    parts.append(
        f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.label)}</text>"
    )
    return "\n".join([*parts, *drawn, "</svg>"])


def _legend(index: int, name: str, *, area: bool = False) -> str:
    y = TOP + 12 + 18 * index
    x = WIDTH - RIGHT + 12
    kind = "area" if area else "line"
    shape = f"M{x} {y - 4}h18" if not area else f"M{x} {y - 8}h18v8h-18z"
    return (
        f'<path class="{kind} s{index % SERIES_MAX}" d="{shape}"/>'
        f'<text x="{x + 24}" y="{y}">{escape(name)}</text>'
    )


def _x(axis_: Axis, value: float) -> float:
    return round(LEFT + axis_.place(value) * (WIDTH - LEFT - RIGHT), 1)


def _y(axis_: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - axis_.place(value) * (HEIGHT - TOP - BOTTOM), 1)


def _thinned(values: Points) -> Points:
    stride = -(-len(values) // POINTS_MAX) or 1  # ceil
    kept = list(values[::stride])
    if values and kept[-1] != values[-1]:
        kept.append(values[-1])
    return kept


def _round_step(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.9999)
