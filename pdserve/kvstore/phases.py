"""How long the parts of a store's work take: a histogram for each phase and tier.

    lookup    a client asks for its prefix, until it has the answer           memory, remote
    claim     the node's own part of that: find and pin                       memory
    copy      one block from the arena to its reader                          memory
    network   one block over a socket to its reader                           remote
    verify    its checksum                                                    memory, remote
    put       new blocks of one call, from reserved to committed              memory, remote
    queue     a hand-off waits for slots                                      memory
    disk      a prompt waits for its blocks to come up                        disk

A client counts what it sees and sends the differences to its node now and then, so that a node
answers for all that used it. There are as many series as lines above: nothing grows.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pdserve.clock import S

BOUNDS_S = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
"""Of buckets, each inclusive; the last bucket has none."""

MOST = 1 << 62
"""Of a count or a sum: what others say must not make them too large to be sent."""

_BOUNDS_NS = tuple(round(bound * S) for bound in BOUNDS_S)

Phase = tuple[str, str]
"""Its name and its tier."""

PHASES: tuple[Phase, ...] = (
    ("lookup", "memory"),
    ("lookup", "remote"),
    ("claim", "memory"),
    ("copy", "memory"),
    ("network", "remote"),
    ("verify", "memory"),
    ("verify", "remote"),
    ("put", "memory"),
    ("put", "remote"),
    ("queue", "memory"),
    ("disk", "disk"),
)


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """One histogram, as it is sent."""

    phase: str
    tier: str
    counts: tuple[int, ...]  # by bucket, not accumulated
    sum_ns: int

    @property
    def count(self) -> int:
        return sum(self.counts)


class Phases:
    """The histograms of one process."""

    def __init__(self) -> None:
        empty = len(BOUNDS_S) + 1
        self._counts: Mapping[Phase, list[int]] = MappingProxyType(
            {phase: [0] * empty for phase in PHASES}
        )
        self._sums_ns = dict.fromkeys(PHASES, 0)

    def note(self, phase: Phase, elapsed_ns: int) -> None:
        self._counts[phase][bisect_left(_BOUNDS_NS, elapsed_ns)] += 1
        self._sums_ns[phase] += elapsed_ns

    def add(self, times: PhaseTimes) -> bool:
        """Count what somebody else measured, up to ``MOST``. False: it is no histogram of ours."""
        counts = self._counts.get((times.phase, times.tier))
        if counts is None or len(counts) != len(times.counts):
            return False
        if min(*times.counts, times.sum_ns) < 0:
            return False
        for bucket, count in enumerate(times.counts):
            counts[bucket] = min(MOST, counts[bucket] + count)
        phase = times.phase, times.tier
        self._sums_ns[phase] = min(MOST, self._sums_ns[phase] + times.sum_ns)
        return True

    def times(self) -> tuple[PhaseTimes, ...]:
        """Of all phases that occurred."""
        return tuple(
            PhaseTimes(*phase, tuple(counts), self._sums_ns[phase])
            for phase, counts in self._counts.items()
            if any(counts)
        )

    def take(self) -> tuple[PhaseTimes, ...]:
        """``times``, which begin anew."""
        times = self.times()
        for phase, counts in self._counts.items():
            counts[:] = [0] * len(counts)
            self._sums_ns[phase] = 0
        return times
