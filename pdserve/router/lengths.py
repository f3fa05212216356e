"""How long answers become: what is known before they end.

Nobody knows the length of an answer, but everybody has seen the answers before it. For each class
of requests (who asks, and for how much at most) a histogram of lengths is kept that forgets slowly.
With O the length of an answer and ``a`` the tokens it has already:

    survival(a)   P(O > a)
    remaining(a)  E[O − a | O > a]
    index(a)      G(a) = sup over t of  P(O ≤ a + t | O > a) / E[min(O − a, t) | O > a]

The last is the *Gittins index*: the best rate of answers ended per token spent that somebody who
may stop at any time can expect. Serving the largest index first minimises the mean time in the
system on one server when lengths are unknown. Where answers that have lasted are about to end (most
chats) it rises with ``a``, and nothing should be preempted; where they are likely to last longer
still (code, reasoning) it falls.

A class that has ended few answers leans on all classes together, as if it had seen ``LEAN_COUNT``
of theirs; all together lean on one made-up answer with P(O > a) = 1 / (1 + a), which says, beyond
the longest answer seen, that what has lasted will last about as long again.

Source: the index is Gittins' (1979), in the form of Scully and Harchol-Balter's work on scheduling
without known sizes; the predicted peak is that of "Past-Future" (ASPLOS '25), with expected instead
of sampled lengths, so that equal inputs give equal answers.
"""

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from pdserve.messages import Request

LENGTH_TOKENS_MAX: Final = 1 << 20
"""Longer answers count as this long."""

MEMORY_COUNT: Final = 2048
"""About so many of the last answers are remembered; older ones fade."""

LEAN_COUNT: Final = 32.0
REFRESH_COUNT: Final = 32
"""A class's curves are computed anew after so many answers."""

CLASSES_MAX: Final = 256
"""Classes with a histogram of their own; further ones are read from all together."""


def length_class(kind: Hashable, max_tokens: int) -> Hashable:
    """A class of requests: whoever asks, and the power of two of how much at most."""
    return kind, max_tokens.bit_length()


def class_of(request: Request) -> Hashable:
    return length_class(request.service_class, request.stop.max_tokens)


def cell_of(tokens: int) -> int:
    """The histogram's cell that holds this number of tokens: single numbers up to 8, then four
    cells to each doubling."""
    assert tokens >= 0
    if tokens < 8:
        return tokens
    octave = min(tokens, LENGTH_TOKENS_MAX - 1).bit_length() - 3
    return 4 * octave + (min(tokens, LENGTH_TOKENS_MAX - 1) >> octave)


def _edge(cell: int) -> int:
    """The smallest number of tokens in a cell."""
    return cell if cell < 8 else (4 + cell % 4) << ((cell - 8) // 4 + 1)


CELL_COUNT = cell_of(LENGTH_TOKENS_MAX) + 1
EDGES = np.array([_edge(cell) for cell in range(CELL_COUNT + 1)], dtype=np.int64)

_EDGE_LIST: list[int] = EDGES.tolist()
_WIDTHS = np.diff(EDGES).astype(np.float64)
_MADE_UP = -np.diff(1 / (1 + EDGES.astype(np.float64)))


class Growing(Protocol):
    """What of a stream the predicted peak asks for."""

    @property
    def cls(self) -> Hashable: ...
    @property
    def generated_tokens(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...


class Curve:
    """What follows from one histogram. An answer of O tokens lies in the cell of O − 1, the last
    count of tokens it had without being over; within a cell all lengths are equally likely."""

    __slots__ = ("_areas", "_masses", "_survivals", "indices")

    def __init__(self, weights: npt.NDArray[np.float64]) -> None:
        masses = weights / weights.sum()
        survivals = np.append(np.cumsum(masses[::-1])[::-1], 0.0)
        steps = survivals[:-1] * _WIDTHS - masses * (_WIDTHS - 1) / 2
        areas = np.append(np.cumsum(steps[::-1])[::-1], 0.0)  # Σ over u ≥ a of P(O > u)
        self._masses: list[float] = masses.tolist()
        self._survivals: list[float] = survivals.tolist()
        self._areas: list[float] = areas.tolist()
        self.indices = _gittins(survivals, areas)
        """The index at each cell's edge."""

    def survival(self, attained: int) -> float:
        cell, beyond = self._place(attained)
        return self._survivals[cell] - self._masses[cell] * beyond / float(_WIDTHS[cell])

    def remaining(self, attained: int) -> float:
        cell, beyond = self._place(attained)
        slope = self._masses[cell] / float(_WIDTHS[cell])
        survival = self._survivals[cell]
        passed = survival * beyond - slope * beyond * (beyond - 1) / 2
        # At least the next token; the differences of the last cell would say a little less.
        return max(1.0, (self._areas[cell] - passed) / (survival - slope * beyond))

    def quantile(self, attained: int, ratio: float) -> int:
        """The least number of further tokens that this part of the answers does not exceed."""
        assert 0 < ratio < 1
        limit = self.survival(attained) * (1 - ratio)
        # Survival falls from edge to edge: the last edge above the limit begins the cell sought.
        cell = bisect_left(self._survivals, -limit, key=lambda survival: -survival) - 1
        cell = min(max(cell, 0), CELL_COUNT - 1)
        share = (self._survivals[cell] - limit) / self._masses[cell]
        tokens = _EDGE_LIST[cell] + share * float(_WIDTHS[cell])
        return max(1, int(np.ceil(tokens - attained - 1e-9)))

    def index(self, attained: int) -> float:
        return float(self.indices[min(cell_of(attained), CELL_COUNT - 1)])

    def _place(self, attained: int) -> tuple[int, int]:
        attained = min(attained, LENGTH_TOKENS_MAX - 1)
        cell = cell_of(attained)
        return cell, attained - _EDGE_LIST[cell]


def _gittins(
    survivals: npt.NDArray[np.float64], areas: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    ended = survivals[:-1, None] - survivals[None, 1:]  # [from cell, to the end of cell]
    spent = areas[:-1, None] - areas[None, 1:]
    later = np.tri(CELL_COUNT, dtype=bool).T  # to the end of the same cell, or of a later one
    rates = np.divide(ended, spent, out=np.zeros_like(ended), where=later & (spent > 0))
    best: npt.NDArray[np.float64] = rates.max(axis=1)
    return best


class _Histogram:
    __slots__ = ("count", "weights")

    def __init__(self) -> None:
        self.weights = np.zeros(CELL_COUNT)
        self.count = 0

    def add(self, generated: int) -> None:
        self.weights *= 1 - 1 / MEMORY_COUNT
        self.weights[cell_of(generated - 1)] += 1
        self.count += 1


class LengthModel:
    """Lengths of answers by class. No chance in it: equal observations give equal answers."""

    def __init__(self) -> None:
        self._all = _Histogram()
        self._classes: dict[Hashable, _Histogram] = {}
        self._curves: dict[Hashable, tuple[int, Curve]] = {}  # and the count it was computed at
        self._pooled: tuple[int, Curve] | None = None

    @property
    def observed_count(self) -> int:
        return self._all.count

    def observe(self, cls: Hashable, generated: int) -> None:
        """An answer of this class has ended with so many tokens."""
        assert generated > 0
        self._all.add(generated)
        if cls not in self._classes and len(self._classes) < CLASSES_MAX:
            self._classes[cls] = _Histogram()
        if cls in self._classes:
            self._classes[cls].add(generated)

    def survival(self, cls: Hashable, attained: int) -> float:
        return self.curve(cls).survival(attained)

    def remaining(self, cls: Hashable, attained: int) -> float:
        """Expected tokens still to come of an answer that has ``attained`` and goes on."""
        return self.curve(cls).remaining(attained)

    def remaining_quantile(self, cls: Hashable, attained: int, ratio: float) -> int:
        return self.curve(cls).quantile(attained, ratio)

    def index(self, cls: Hashable, attained: int) -> float:
        """The Gittins index, in answers per token."""
        return self.curve(cls).index(attained)

    def peak_tokens(self, streams: Iterable[Growing], ratio: float | None = None) -> int:
        """The most tokens of KV these streams will hold at once, if they end when expected.

        Args:
            ratio: take this quantile of what each has still to come, not the mean.
        """
        return peak_tokens(
            [
                (
                    self.remaining(stream.cls, stream.generated_tokens)
                    if ratio is None
                    else self.remaining_quantile(stream.cls, stream.generated_tokens, ratio),
                    stream.context_tokens,
                )
                for stream in streams
            ]
        )

    def curve(self, cls: Hashable) -> Curve:
        """Of answers so far, at most ``REFRESH_COUNT`` of them old."""
        own = self._classes.get(cls)
        if own is None:
            return self._pooled_curve()
        known = self._curves.get(cls)
        if known is None or self._stale(known[0]):
            known = (self._all.count, Curve(own.weights + LEAN_COUNT * self._pooled_shares()))
            self._curves[cls] = known
        return known[1]

    def _stale(self, count: int) -> bool:
        # While few have been seen, each one says much.
        return self._all.count - count >= min(REFRESH_COUNT, 1 + count // 8)

    def _pooled_curve(self) -> Curve:
        if self._pooled is None or self._stale(self._pooled[0]):
            self._pooled = (self._all.count, Curve(self._pooled_shares()))
        return self._pooled[1]

    def _pooled_shares(self) -> npt.NDArray[np.float64]:
        weights = self._all.weights + _MADE_UP
        shares: npt.NDArray[np.float64] = weights / weights.sum()
        return shares


def peak_tokens(streams: Sequence[tuple[float, int]]) -> int:
    """The most tokens of KV at once, from (tokens still to come, context now) of each stream.

    The peak is reached just before somebody ends. When the i-th longest ends, the i longest are
    there, and each has grown by what that one had still to come.
    """
    peak = 0.0
    context = 0
    for count, (remaining, own) in enumerate(sorted(streams, reverse=True), start=1):
        context += own
        peak = max(peak, remaining * count + context)
    return int(np.ceil(peak))
