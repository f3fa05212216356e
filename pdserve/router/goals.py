"""γ, steered to an operator's goal by shadow queues.

    mean       the least mean time to first token: γ as small as it gets
    balanced   the least mean with the slowest answers hardly slower than first come, first served
    tail       the least mean with the slowest answers no slower than that
    slo        the most requests within the objective

No formula gives the best γ for bursty arrivals: that for Poisson arrivals is far too cautious for
some traffic and too bold for other. But a queue is cheap to imitate. So every arrival (when, and
how much work) also enters a few *shadows*: queues with as many servers as there are workers, one
first come, first served, the others with one γ each. Each keeps a fading histogram of its response
times, and now and then the real γ moves one step towards that whose shadow serves the goal best.

*The slowest* are the last 1 % and the last 0.1 %, each with its own limit (``LIMITS``). The 99th
percentile alone says little: where few prompts are long, the smallest γ lets all short ones pass,
so that it falls, while those few wait without end. Between two shadows γ is put where the limit is
met in between. Under *overload*, where first come, first served lets everybody wait for minutes, to
be no slower is worth nothing, and γ becomes the smallest: then at least the short ones are served.

As long as servers are free in all of them, all shadows do the same, whatever their γ: so they have
their servers in common until somebody has to wait, and again once nobody waits and all are as busy.

A shadow has no preemption, and its times are not what requests get: it need not predict those, only
their ratios. But the less there is to spare, the more these depend on how much work there is. So
work is as predicted for whole prefills, corrected by what workers take, and who waits has less of
it once somebody has computed the same prefix (``ShadowJob``). Its memory is an hour, because a 99th
percentile is made by the worst minutes of it, and what a calm minute would have chosen says nothing
of those.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdserve.clock import MS, S
from pdserve.router.entry import ShadowJob
from pdserve.router.levels import Ladder
from pdserve.router_config import RouterConfig

GAMMAS_PER_S = tuple(0.05 * 2.0**step for step in range(-4, 8))  # 0.003 to 6.4 per second
GAMMA_MIN_PER_S = 0.002
START = 4
GAMMA_START_PER_S = GAMMAS_PER_S[START]

PERIOD_NS = 30 * S
MEMORY_NS = 3600 * S
ARRIVALS_MIN = 2000
"""Twenty in the last percent. With fewer γ stays: one burst says how it went, not how bursts go."""

WAITING_MAX: Final = 4096
"""Requests in one shadow; an arrival beyond is left out of all of them."""

MEET_EVERY: Final = 64
"""Arrivals after which shadows that parted are compared again, which is linear in workers."""

OVERLOAD_RATIO = 2
"""Of the time after which who waits is rescued: if first come, first served lets everybody wait for
so long, there is more work than workers."""

STEP_MAX = 2.0
"""By which γ is multiplied or divided at most in one period."""


class Limits(NamedTuple):
    """How much slower than first come, first served the slowest 1 % and 0.1 % may be."""

    p99: float
    p999: float


LIMITS = {"balanced": Limits(1.05, 1.25), "tail": Limits(1.0, 1.05)}

AIM: Final = 0.98
"""Of its limits, what γ is steered to: it follows what has been, and so is always a little late."""

BINS: Final = 1024
BIN_RATIO = 1.02
_LOG_RATIO: Final = math.log(BIN_RATIO)


def bin_of(time_ns: int) -> int:
    """Where a histogram counts it."""
    place = int(math.log(time_ns / MS) / _LOG_RATIO) if time_ns > MS else 0
    return min(place, BINS - 1)


class Histogram:
    """Times from 1 ms to a week, each known to 2 %, older ones counting less."""

    def __init__(self) -> None:
        self._counts: NDArray[np.float64] = np.zeros(BINS)
        self._fresh: list[int] = []  # bins of the latest
        self._total_s = 0.0

    def add(self, time_ns: int) -> None:
        self.add_at(bin_of(time_ns), time_ns / S)

    def add_at(self, place: int, time_s: float) -> None:
        """``place``: ``bin_of`` that time."""
        self._fresh.append(place)
        self._total_s += time_s

    def fade(self, factor: float) -> None:
        self._counts *= factor
        self._total_s *= factor

    def collect(self) -> None:
        if self._fresh:
            self._counts += np.bincount(self._fresh, minlength=BINS)
            self._fresh.clear()

    @property
    def count(self) -> float:
        return float(self._counts.sum())

    @property
    def mean_s(self) -> float:
        return self._total_s / self.count

    def quantile_s(self, at: float) -> float:
        """As if the times of a bin lay evenly in it: by its middle, two queues whose tails differ
        by less than a bin would be equally slow."""
        below = np.cumsum(self._counts)
        rank = at * float(below[-1])
        place = int(np.searchsorted(below, rank))
        part = 1 - (float(below[place]) - rank) / float(self._counts[place])
        return float(BIN_RATIO ** (place + part)) / 1000

    def part_within(self, limit_ns: float) -> float:
        place = max(0, int(math.log(limit_ns / MS) / _LOG_RATIO))
        return float(self._counts[: place + 1].sum() / self.count)


class Shadow:
    """``workers`` servers that take the least key first. Not preemptive."""

    def __init__(self, boosts_ns: Sequence[int], workers: int) -> None:
        self.times = Histogram()
        self._boosts_ns = boosts_ns
        self._free_ns = [0] * workers  # heap of the instants at which servers are free
        self._waiting: list[tuple[int, int, ShadowJob]] = []  # heap of (key, number, who)

    def __len__(self) -> int:
        return len(self._waiting)

    def oldest_wait_ns(self, now_ns: int) -> int:
        """Of a shadow without boosts: how long the next one has waited."""
        return now_ns - self._waiting[0][2].arrived_ns if self._waiting else 0

    def set_workers(self, count: int) -> None:
        """The first to be free go, or come."""
        while len(self._free_ns) > count:
            heapq.heappop(self._free_ns)
        while len(self._free_ns) < count:
            heapq.heappush(self._free_ns, self._free_ns[0] if self._free_ns else 0)

    def arrive(self, job: ShadowJob, number: int, rung: int) -> None:
        """Arrivals come in order; ``number`` tells those of one instant apart."""
        waiting, free_ns, now_ns = self._waiting, self._free_ns, job.arrived_ns
        while waiting and free_ns[0] <= now_ns:
            self._serve(free_ns[0], heapq.heappop(waiting)[2])
        if free_ns[0] <= now_ns:
            self._serve(now_ns, job)
        else:
            heapq.heappush(waiting, (now_ns - self._boosts_ns[rung], number, job))

    def is_free(self, now_ns: int) -> bool:
        """Whether one more would be served at once, and nobody waits."""
        return not self._waiting and self._free_ns[0] <= now_ns

    def occupy(self, now_ns: int, work_ns: int) -> None:
        """A free server, for so long; its time is the caller's to note."""
        heapq.heapreplace(self._free_ns, now_ns + work_ns)

    def busy_ns(self, now_ns: int) -> list[int] | None:
        """When those servers are free that are not, ascending; None: somebody waits."""
        return None if self._waiting else sorted([ns for ns in self._free_ns if ns > now_ns])

    def share_servers(self, other: "Shadow") -> None:
        self._free_ns = other._free_ns

    def part(self) -> None:
        """From now on it has servers of its own."""
        self._free_ns = self._free_ns.copy()

    def _serve(self, begin_ns: int, job: ShadowJob) -> None:
        done_ns = begin_ns + job.work_ns
        heapq.heapreplace(self._free_ns, done_ns)
        self.times.add(done_ns - job.arrived_ns)


@dataclass(frozen=True, slots=True)
class Outcome:
    gamma_per_s: float
    mean_s: float
    p99_s: float
    p999_s: float
    within_slo: float

    def excess(self, limits: Limits, fcfs: "Outcome") -> float:
        """Above 1: a limit is too near."""
        p99, p999 = self.p99_s / fcfs.p99_s, self.p999_s / fcfs.p999_s
        return max(p99 / (AIM * limits.p99), p999 / (AIM * limits.p999))


def choose(goal: str, fcfs: Outcome, outcomes: Sequence[Outcome]) -> float:
    """The γ that serves the goal best, by those tried, which are given in ascending order of γ."""
    if goal == "slo":
        return max(outcomes, key=lambda o: (o.within_slo, -o.mean_s)).gamma_per_s
    limits = LIMITS[goal]
    excesses = [outcome.excess(limits, fcfs) for outcome in outcomes]
    keeping = [place for place, excess in enumerate(excesses) if excess <= 1]
    if not keeping:
        least = min(
            range(len(outcomes)), key=lambda place: (excesses[place], outcomes[place].mean_s)
        )
        return outcomes[least].gamma_per_s
    best = min(keeping, key=lambda place: outcomes[place].mean_s)
    gamma = outcomes[best].gamma_per_s
    if best == 0 or best - 1 in keeping:
        return gamma
    below = outcomes[best - 1].gamma_per_s
    part = (1 - excesses[best]) / (excesses[best - 1] - excesses[best])
    return float(gamma * (below / gamma) ** part)


class GoalControl:
    def __init__(self, settings: RouterConfig) -> None:
        self._goal = settings.goal
        self._slo_ns = None if settings.ttft_slo_ms is None else settings.ttft_slo_ms * MS
        self._overload_ns = round(OVERLOAD_RATIO * settings.rescue_after_ms * MS)
        self._ladder = Ladder.of(settings, GAMMA_START_PER_S)
        self._arrived_count = 0
        self._due_ns: int | None = None
        self._faded_ns = 0
        self.gamma_per_s = settings.gamma_per_s or (
            GAMMA_MIN_PER_S if settings.goal == "mean" else GAMMA_START_PER_S
        )
        steers = (
            settings.policy == "skip_join"
            and settings.goal != "mean"
            and settings.gamma_per_s is None
        )
        flat = [0] * len(self._ladder.quanta_ns)
        self._fcfs = Shadow(flat, 1)
        self._shadows = [
            (gamma, Shadow(Ladder.of(settings, gamma).boosts_ns, 1))
            for gamma in (GAMMAS_PER_S if steers else ())
        ]
        self._are_alike = False  # all shadows have the servers of the first
        self._apart_count = 0  # arrivals since they parted
        self._meet(0)

    def set_workers(self, count: int) -> None:
        for shadow in [self._fcfs] if self._are_alike else self._all():
            shadow.set_workers(max(1, count))

    def arrived(self, now_ns: int, work_ns: int) -> ShadowJob | None:
        """What shadows have of it, if it waits in any: whoever learns while it waits that less is
        to be done says so there."""
        if not self._shadows or len(self._fcfs) >= WAITING_MAX:
            return None
        self._arrived_count += 1
        if self._due_ns is None:
            self._due_ns = now_ns + PERIOD_NS
        if self._are_alike and self._fcfs.is_free(now_ns):
            self._fcfs.occupy(now_ns, work_ns)
            place, time_s = bin_of(work_ns), work_ns / S
            self._fcfs.times.add_at(place, time_s)
            for _, shadow in self._shadows:
                shadow.times.add_at(place, time_s)
            return None
        if self._are_alike:
            self._part()
        rung = self._ladder.rung_of(work_ns)
        job = ShadowJob(now_ns, work_ns)
        for shadow in self._all():
            shadow.arrive(job, self._arrived_count, rung)
        self._apart_count += 1
        if self._apart_count % MEET_EVERY == 0:
            self._meet(now_ns)
        return job

    def _part(self) -> None:
        """Somebody has to wait: from here on it matters who is next."""
        self._are_alike, self._apart_count = False, 0
        for _, shadow in self._shadows:
            shadow.part()

    def _meet(self, now_ns: int) -> None:
        """Let them share servers if nobody waits, and all are busy until the same instants; when
        those were free that are, matters no more."""
        busy_ns = self._fcfs.busy_ns(now_ns)
        if busy_ns is None or any(s.busy_ns(now_ns) != busy_ns for _, s in self._shadows):
            return
        self._are_alike = True
        for _, shadow in self._shadows:
            shadow.share_servers(self._fcfs)

    def due_ns(self) -> int | None:
        """When ``tick`` has something to do; None: not before the next arrival."""
        return self._due_ns

    def tick(self, now_ns: int) -> bool:
        """Whether γ has changed."""
        if self._due_ns is None or now_ns < self._due_ns:
            return False
        self._due_ns = None
        faded = math.exp(-(now_ns - self._faded_ns) / MEMORY_NS)
        self._faded_ns = now_ns
        for shadow in self._all():
            shadow.times.fade(faded)
            shadow.times.collect()
        if self._fcfs.oldest_wait_ns(now_ns) > self._overload_ns:
            best = GAMMAS_PER_S[0]
        elif self._arrived_count >= ARRIVALS_MIN:
            outcomes = [self._outcome(gamma, shadow) for gamma, shadow in self._shadows]
            best = choose(self._goal, self._outcome(0.0, self._fcfs), outcomes)
        else:
            return False
        before = self.gamma_per_s
        self.gamma_per_s = min(max(best, before / STEP_MAX), before * STEP_MAX)
        return self.gamma_per_s != before

    def _outcome(self, gamma: float, shadow: Shadow) -> Outcome:
        times = shadow.times
        return Outcome(
            gamma_per_s=gamma,
            mean_s=times.mean_s,
            p99_s=times.quantile_s(0.99),
            p999_s=times.quantile_s(0.999),
            within_slo=1.0 if self._slo_ns is None else times.part_within(self._slo_ns),
        )

    def _all(self) -> list[Shadow]:
        return [self._fcfs, *(shadow for _, shadow in self._shadows)]
