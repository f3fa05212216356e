"""Levels: how much sooner a short prefill is served than a long one that came before it.

Each level has a *quantum*: the prefill time of the requests that belong there. Quanta double from
level to level. *Skip-join*: how long a prefill lasts is known on arrival (uncached tokens at the
measured speed), so a request joins the first level whose quantum covers it, and skips those above,
where it would only delay the short ones and be demoted anyway.

A level has four *rungs*, with quanta in between, and a request stands on one of them: of two where
one is twice as long, the shorter should not have to wait only because both are of one level.
(Measured: a mean time to first token 5 to 7 % shorter, at the same tail.) Levels are what people
are shown, rungs what is compared.

Which of two waiting requests goes first is decided by a *key* that never changes while it waits:

    key = virtual arrival − boost(rung)
    boost(rung) = (1/γ) · ln(1 / (1 − e^(−γ·quantum)))

A short request goes before those that arrived up to (its boost − their boost) earlier, and before
no others: overtaking is bounded by construction, so nobody starves and no sweep promotes anybody.
γ → ∞ makes all boosts 0 (first come, first served), γ → 0 lets them differ without bound
(shortest first). First come, first served is also what a single level gives.

Source: the boost function is that of Yu et al., "Strongly Tail-Optimal Scheduling in the Light-
Tailed M/G/1", arXiv:2404.08826 (γ-Boost); skip-join is that of arXiv:2305.05920.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pdserve.clock import MS, S
from pdserve.ids import RequestId
from pdserve.router.entry import Entry
from pdserve.router.places import DEAD_PLACES_MAX, Place, Places
from pdserve.router_config import RouterConfig

RUNGS: Final = 4
"""Of a level, but for level 0, which has one."""

NEAR_PLACES: Final = 64
"""So far from the front of a rung, no place that somebody left stays: whoever looks for the next
ones looks there, again and again."""


def quanta_ns(first_quantum_ns: int, level_count: int) -> tuple[int, ...]:
    """The quantum of each rung, rung 0 first."""
    rung_count = 1 + (level_count - 1) * RUNGS
    return tuple(round(first_quantum_ns * 2 ** (rung / RUNGS)) for rung in range(rung_count))


def level_of(rung: int) -> int:
    """Whose highest rung has the quantum of the level."""
    return -(-rung // RUNGS)


def boost_ns(work_ns: float, gamma_per_s: float) -> int:
    """How much earlier than it did a request of so much work counts as having arrived."""
    # expm1 keeps the digits where γ·work is small, which is the usual case.
    return round(-math.log(-math.expm1(-gamma_per_s * work_ns / S)) / gamma_per_s * S)


def boosts_ns(quanta: Sequence[int], gamma_per_s: float) -> tuple[int, ...]:
    """The boost of each rung, rung 0 first."""
    return tuple(boost_ns(quantum, gamma_per_s) for quantum in quanta)


@dataclass(frozen=True, slots=True)
class Ladder:
    """The rungs' figures, rung 0 first."""

    quanta_ns: tuple[int, ...]
    boosts_ns: tuple[int, ...]

    @staticmethod
    def of(settings: RouterConfig, gamma_per_s: float) -> "Ladder":
        level_count = 1 if settings.policy == "fcfs" else settings.level_count
        quanta = quanta_ns(round(settings.first_quantum_ms * MS), level_count)
        return Ladder(quanta, boosts_ns(quanta, gamma_per_s))

    @property
    def last(self) -> int:
        """The last rung."""
        return len(self.quanta_ns) - 1

    def rung_of(self, work_ns: int) -> int:
        """The first rung whose quantum covers so much work; the last one if none does."""
        return min(self.last, bisect_left(self.quanta_ns, work_ns))

    def key_ns(self, virtual_ns: int, rung: int) -> int:
        """Smaller goes first."""
        return virtual_ns - self.boosts_ns[rung]


class Rung(Places):
    """Those who stand on it, by virtual arrival. Joining at the end and leaving anywhere is O(1),
    amortised."""

    def __init__(self) -> None:
        super().__init__()
        self._places: list[Place] = []
        self._first = 0  # places before it are dead, or stand behind it again

    def push(self, entry: Entry, virtual_ns: int) -> None:
        place = self._place(entry, virtual_ns)
        if not self._places or self._places[-1] < place:
            self._places.append(place)
        else:
            insort(self._places, place, lo=self._first)  # only a re-entry moves what stands there

    def remove(self, request: RequestId) -> None:
        place = self._live.pop(request)
        if not self._live:
            self._places.clear()
            self._first = 0
            return
        places = self._places
        if places[self._first][2] == place[2]:
            self._first += 1
        else:
            self._close(place)
        while self._first < len(places) and not self._is_live(places[self._first]):
            self._first += 1
        if self._first > len(self._live) + DEAD_PLACES_MAX:
            del places[: self._first]
            self._first = 0
        if len(places) > 2 * len(self._live) + DEAD_PLACES_MAX:
            self._places = list(self)
            self._first = 0

    def _close(self, place: Place) -> None:
        """Near the front, leave no dead place: those before it move up."""
        places, first = self._places, self._first
        at = bisect_left(places, place, lo=first, hi=min(len(places), first + NEAR_PLACES))
        if at < len(places) and places[at][2] == place[2]:
            places[first + 1 : at + 1] = places[first:at]
            self._first += 1

    def __iter__(self) -> Iterator[Place]:
        for index in range(self._first, len(self._places)):
            if self._is_live(self._places[index]):
                yield self._places[index]

    def check(self) -> None:
        """Assert order and count. Linear; for tests."""
        places = list(self)
        assert places == sorted(places, key=lambda place: place[:3]), "out of order"
        assert len(places) == len(self)
