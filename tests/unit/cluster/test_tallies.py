"""What counts in plain numbers says what Prometheus' own metrics say, to the letter."""

import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from pdserve.cluster.http.tallies import TallyCounter, TallyHistogram

BOUNDS = (0.001, 0.25, 1, 2.5)
LABELS = ("front", "operation")

# Sixty-fourths add up exactly, in whatever order; a bound that is none of them is among the values.
values = st.integers(0, 256).map(lambda n: n / 64) | st.sampled_from([0.25, 1.0, 2.5])
observations = st.lists(st.tuples(st.sampled_from("ab"), values, st.integers(1, 5)))


def text(registry: CollectorRegistry) -> str:
    """Without when each was created: the two were not at once."""
    return re.sub(r"(_created\S*) .*", r"\1", generate_latest(registry).decode())


@given(observations)
def test_a_tally_is_the_histogram_of_the_same_observations(
    observed: list[tuple[str, float, int]],
) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = TallyHistogram("gap_seconds", "Between tokens", LABELS, buckets=BOUNDS)
    ours.register(tally)
    histogram = Histogram("gap_seconds", "Between tokens", LABELS, buckets=BOUNDS, registry=theirs)
    for operation, value, count in observed:
        tally.labels("http", operation).observe(value, count)
        for _ in range(count):
            histogram.labels("http", operation).observe(value)
    assert text(ours) == text(theirs)


@given(st.lists(st.integers(0, 1000)))
def test_a_counter_counts(counts: list[int]) -> None:
    for labels, given_values in ((), ()), (LABELS, ("http", "chat")):
        ours, theirs = CollectorRegistry(), CollectorRegistry()
        tally = TallyCounter("tokens", "So many", labels, given_values)
        ours.register(tally)
        family: Any = Counter("tokens", "So many", labels, registry=theirs)
        counter = family.labels(*given_values) if labels else family
        for count in counts:
            tally.inc(count)
            counter.inc(count)
        assert text(ours) == text(theirs)
