"""What moving bytes over one path costs, learned from the moves that were made. Pure.

    time = fixed + bytes / bandwidth

fitted by least squares to what was measured, older moves counting less with each new one. What was
believed at first keeps a small weight for good, so that moves of one size alone still give a line.
One odd move (a disk that slept, a machine that was busy) changes little: a measurement counts for
at most ``SURPRISE_MAX`` times what was expected, or for at least that part of it.
"""

from dataclasses import dataclass

FADE = 0.9
"""Weight of what was known when a move more is: about the last ten count."""

PRIOR_WEIGHT = 0.001
PRIOR_BYTES = (1 << 20, 16 << 20)
SURPRISE_MAX = 4.0

FIXED_S_MAX = 1.0
BYTES_PER_S_MIN = 1e6
BYTES_PER_S_MAX = 1e12


@dataclass(frozen=True, slots=True)
class PathCost:
    fixed_s: float
    bytes_per_s: float

    def time_s(self, moved_bytes: int) -> float:
        """Of one move; none takes no time."""
        return self.fixed_s + moved_bytes / self.bytes_per_s if moved_bytes else 0.0


class PathSpeed:
    def __init__(self, believed: PathCost) -> None:
        points = [(float(size), believed.time_s(size)) for size in PRIOR_BYTES]
        self._prior = [
            PRIOR_WEIGHT * sum(terms) for terms in zip(*map(_terms, points), strict=True)
        ]
        self._sums = [0.0] * len(self._prior)
        self._cost = believed

    @property
    def cost(self) -> PathCost:
        return self._cost

    def observe(self, moved_bytes: int, elapsed_s: float) -> None:
        assert moved_bytes > 0
        expected_s = self._cost.time_s(moved_bytes)
        bounded_s = min(max(elapsed_s, expected_s / SURPRISE_MAX), expected_s * SURPRISE_MAX)
        terms = _terms((float(moved_bytes), bounded_s))
        self._sums = [FADE * sum_ + term for sum_, term in zip(self._sums, terms, strict=True)]
        self._cost = _fitted([a + b for a, b in zip(self._sums, self._prior, strict=True)])


def _terms(point: tuple[float, float]) -> tuple[float, ...]:
    """What a measurement adds to the sums: weight, x, y, x², x · y. Large moves weigh less, or
    their deviations, which are as much larger, would decide alone."""
    x, y = point
    weight = 1 / (x + PRIOR_BYTES[0]) ** 2
    return weight, weight * x, weight * y, weight * x * x, weight * x * y


def _fitted(sums: list[float]) -> PathCost:
    weight, x, y, xx, xy = sums
    slope = (weight * xy - x * y) / (weight * xx - x * x)  # two sizes at least: those of the prior
    slope = min(max(slope, 1 / BYTES_PER_S_MAX), 1 / BYTES_PER_S_MIN)
    fixed_s = (y - slope * x) / weight
    if fixed_s < 0:
        fixed_s = 0.0
        slope = min(max(xy / xx, 1 / BYTES_PER_S_MAX), 1 / BYTES_PER_S_MIN)
    return PathCost(min(fixed_s, FIXED_S_MAX), 1 / slope)
