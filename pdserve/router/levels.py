"""Skip-join levels: the order in which waiting prompts are prefilled.

Each level has a *quantum*: the prefill time of the requests that belong there. Quanta double from
level to level. *Skip-join*: how long a prefill lasts is known on arrival (uncached tokens over the
measured rate), so a request joins the first level whose quantum covers it, and skips those above,
where it would only delay the short ones and be demoted anyway.

Which of two waiting requests goes first is decided by a *key* that never changes while it waits:

    key = virtual arrival − boost(level)
    boost(level) = (1/γ) · ln(1 / (1 − e^(−γ·quantum)))

A short request goes before those that arrived up to (its boost − their boost) earlier, and before
no others: overtaking is bounded by construction, so nobody starves and no sweep promotes anybody.
γ → ∞ makes all boosts 0 (first come, first served), γ → 0 lets them differ without bound
(shortest first). First come, first served is also what a single level gives.

Because keys differ within a level by virtual arrival alone, each level is a list in that order and
the next request is the least of the levels' heads. The virtual arrival is the time of arrival,
kept through preemptions.

Source: the boost function is that of Yu et al., "Strongly Tail-Optimal Scheduling in the Light-
Tailed M/G/1", arXiv:2404.08826 (γ-Boost); skip-join is that of arXiv:2305.05920.
"""

import heapq
import math
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pdserve.clock import MS, S
from pdserve.config import RouterConfig
from pdserve.ids import RequestId

QUANTUM_RATIO = 2

DEAD_PLACES_MAX = 32
"""Places of removed requests a level keeps beyond as many as it has live ones."""


def quanta_ns(first_quantum_ns: int, level_count: int) -> tuple[int, ...]:
    """The quantum of each level, level 0 first."""
    return tuple(first_quantum_ns * QUANTUM_RATIO**level for level in range(level_count))


def boosts_ns(quanta: Sequence[int], gamma_per_s: float) -> tuple[int, ...]:
    """How much earlier than it did a request of each level counts as having arrived."""
    return tuple(
        # expm1 keeps the digits where γ·quantum is small, which is the usual case.
        round(-math.log(-math.expm1(-gamma_per_s * quantum / S)) / gamma_per_s * S)
        for quantum in quanta
    )


@dataclass(frozen=True, slots=True)
class Ladder:
    """The levels' figures, level 0 first."""

    quanta_ns: tuple[int, ...]
    boosts_ns: tuple[int, ...]

    @staticmethod
    def of(settings: RouterConfig) -> "Ladder":
        level_count = 1 if settings.policy == "fcfs" else settings.level_count
        quanta = quanta_ns(round(settings.first_quantum_ms * MS), level_count)
        return Ladder(quanta, boosts_ns(quanta, settings.gamma_per_s or 0.12))

    @property
    def last(self) -> int:
        return len(self.quanta_ns) - 1

    def level_of(self, work_ns: int) -> int:
        """The first level whose quantum covers so much work; the last level if none does."""
        for level, quantum_ns in enumerate(self.quanta_ns):
            if work_ns <= quantum_ns:
                return level
        return self.last

    def key_ns(self, virtual_ns: int, level: int) -> int:
        """Smaller goes first."""
        return virtual_ns - self.boosts_ns[level]


@dataclass(frozen=True, slots=True, order=True)
class _Place:
    """A request's place in a level. Live while it is the one the level remembers for it."""

    virtual_ns: int
    order: int  # of arrival: who came first at equal times
    serial: int  # of this place, so that no two are equal
    request: RequestId


class _Level:
    """Requests by virtual arrival. Joining at the end and leaving anywhere is O(1), amortised."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._first = 0  # places before it are dead
        self._live: dict[RequestId, _Place] = {}

    def __len__(self) -> int:
        return len(self._live)

    def push(self, place: _Place) -> None:
        assert place.request not in self._live, f"{place.request} waits already"
        self._live[place.request] = place
        insort(self._places, place, lo=self._first)  # only a re-entry moves what stands there

    def remove(self, request: RequestId) -> None:
        del self._live[request]
        while self._first < len(self._places) and not self._is_live(self._places[self._first]):
            self._first += 1
        if len(self._places) > 2 * len(self._live) + DEAD_PLACES_MAX:
            self._places = [place for place in self._places if self._is_live(place)]
            self._first = 0

    def __iter__(self) -> Iterator[_Place]:
        for index in range(self._first, len(self._places)):
            if self._is_live(self._places[index]):
                yield self._places[index]

    def _is_live(self, place: _Place) -> bool:
        return self._live.get(place.request) is place


class LevelQueue:
    """Everybody who waits for a prefill worker."""

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = ladder
        self._levels = [_Level() for _ in ladder.quanta_ns]
        self._level_by_request: dict[RequestId, int] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._level_by_request)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._level_by_request

    def lengths(self) -> tuple[int, ...]:
        return tuple(len(level) for level in self._levels)

    def push(self, request: RequestId, *, virtual_ns: int, order: int, level: int) -> None:
        assert request not in self._level_by_request, f"{request} waits already"
        self._serial += 1
        self._levels[level].push(_Place(virtual_ns, order, self._serial, request))
        self._level_by_request[request] = level

    def remove(self, request: RequestId) -> None:
        self._levels[self._level_by_request.pop(request)].remove(request)

    def in_order(self) -> Iterator[RequestId]:
        """Who goes first, who next, …; do not change the queue while iterating."""
        keyed = [self._keyed(level) for level in range(len(self._levels))]
        return (request for _, _, request in heapq.merge(*keyed))

    def _keyed(self, level: int) -> Iterator[tuple[int, int, RequestId]]:
        for place in self._levels[level]:
            yield self._ladder.key_ns(place.virtual_ns, level), place.order, place.request

    def check(self) -> None:
        """Assert that levels and the way back from a request agree. Linear; for tests."""
        for index, level in enumerate(self._levels):
            places = list(level)
            assert places == sorted(places), f"level {index} is out of order"
            assert len(places) == len(level)
            for place in places:
                assert self._level_by_request[place.request] == index
        assert sum(self.lengths()) == len(self._level_by_request)
