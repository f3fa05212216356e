"""A counter and a histogram for what happens at every token, and at every request.

Prometheus' client takes a lock or two for each observation and looks at one bucket after the other.
Everything that is told here comes from one event loop, and several tokens often share one value: so
these count in plain numbers, and make a metric of them when they are asked. A request is observed
by some twenty of them.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector


class Tally:
    """The observations under one set of labels. A value on a bound is within that bucket."""

    __slots__ = ("_bounds", "_counts", "_sum", "created_s")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.created_s = time.time()
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)  # the last: above all bounds
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """``count`` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """With how many are not above it, for each bound and for infinity."""
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))

    @property
    def sum(self) -> float:
        return self._sum


class TallyCounter(Collector):
    """A counter with one set of labels, of given values. Its ``name`` is without ``_total``."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str] = (), values: Sequence[str] = ()
    ) -> None:
        assert len(values) == len(labels), f"{values} for {labels}"
        self._name = name
        self._documentation = documentation
        self._labels = tuple(labels)
        self._values = tuple(values)
        self._count = 0
        self._created_s = time.time()

    def inc(self, count: int) -> None:
        self._count += count

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        family.add_metric(self._values, self._count, created=self._created_s)
        yield family


class TallyHistogram(Collector):
    """A family of tallies, as a registry wants it."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], *, buckets: Sequence[float]
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = tuple(labels)
        self._bounds = tuple(buckets)
        self._tallies: dict[tuple[str, ...], Tally] = {}

    def labels(self, *values: str) -> Tally:
        """The one of these values, which begins at nothing."""
        assert len(values) == len(self._labels), f"{values} for {self._labels}"
        tally = self._tallies.get(values)
        if tally is None:
            tally = self._tallies[values] = Tally(self._bounds)
        return tally

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, tally in self._tallies.items():
            family.add_metric(values, tally.buckets(), tally.sum)
            labels = dict(zip(self._labels, values, strict=True))
            family.add_sample(f"{self._name}_created", labels, tally.created_s)
        yield family
