"""The gated order of decoding: first come, first served, until the recent past says otherwise.

Parking one stream for another costs two moves of KV, and whether it gains anything depends on the
lengths of answers: with those of most chats it does harm. So nothing is done on principle. Every
``STUDY_EVERY_NS``, while streams wait for room, what is there and the last arrivals once more are
played under a few plans (``decode_shadow``), and one is followed only while it is predicted to
shorten the mean time in the system by ``GAIN_MIN`` without stretching the 99th percentile beyond
``tail_ratio``. Otherwise the order *is* first come, first served. A study that finds hardly anybody
waiting refutes nothing: the plan of the last burst stays for the next.

A study is spread over calls, one replay each, so that none of them takes long:

    first come, first served ──> what binds, and how long the wait is
         └──> plans with that price, and spreads that are multiples of that wait ──> the best

Also when a plan that parks has been proven, a single swap happens only if

    room   binds now, and what is expected to end by itself during the moves does not make room;
    gain   the sizes differ by ``SWAP_RATIO`` at least, on top of the difference in arrival;
    calm   neither of the two moved within twice the time of its move, and the parked one has been
           parked less than ``moves_max`` times;
    budget moves take at most ``LINK_SHARE_MAX`` of the links' time.
"""

from collections import deque
from collections.abc import Hashable, Sequence

from pdserve.clock import S
from pdserve.router.costs import CostModel
from pdserve.router.decode_base import (
    DecodeRoom,
    Stream,
    Swap,
    exchange,
    memory_binds,
    ranked,
)
from pdserve.router.decode_shadow import FCFS, Job, Outcome, Plan, replay
from pdserve.router.lengths import LengthModel

STUDY_EVERY_NS = 30 * S
JOBS_MIN = 64
JOBS_MAX = 500
"""Arrivals that come once more in a study, and streams that are there, per worker."""

ENDED_MAX = 4000
"""Answers remembered for studies: enough for eight workers' share."""

GAIN_MIN = 0.03
SPREADS = (1, 4, 16)
"""Multiples of the mean wait under first come, first served. Beyond, nothing is gained but
starvation: 16 waits are far more than any two sizes' logarithm needs."""

LINK_SHARE_MAX = 0.05
CREDIT_MAX_NS = S // 2
"""Of link time, per worker: what ten quiet seconds earn."""

GOLDEN = 0.6180339887498949


class _Study:
    """Replays under way."""

    def __init__(
        self, jobs: list[Job], now_ns: int, running_max: int, capacity_tokens: int
    ) -> None:
        assert jobs
        self.jobs = jobs
        self.now_ns = now_ns
        self.running_max = running_max
        self.capacity_tokens = capacity_tokens
        self.base: Outcome | None = None
        self.plans: list[Plan] = [FCFS]
        self.best: tuple[Plan, float] | None = None  # and its mean, as a part of the base's


class GatedOrder:
    def __init__(self, costs: CostModel, *, moves_max: int, tail_ratio: float = 1.25) -> None:
        assert tail_ratio > 0
        self._costs = costs
        self._moves_max = moves_max
        self._tail_ratio = tail_ratio
        self._lengths = LengthModel()
        self._ended: deque[Job] = deque(maxlen=ENDED_MAX)
        self._study: _Study | None = None
        self._next_study_ns = 0
        self._studied_count = 0
        self._plan = FCFS
        self._credit_ns = 0.0
        self._credited_ns: int | None = None

    @property
    def plan(self) -> Plan:
        """What is followed now."""
        return self._plan

    @property
    def lengths(self) -> LengthModel:
        return self._lengths

    def finished(
        self,
        cls: Hashable,
        generated_tokens: int,
        now_ns: int,  # noqa: ARG002
        *,
        context_tokens: int = 0,
        arrived_ns: int | None = None,
    ) -> None:
        self._lengths.observe(cls, generated_tokens)
        if arrived_ns is not None:
            prompt_tokens = max(1, context_tokens - generated_tokens)
            self._ended.append(Job(cls, arrived_ns, prompt_tokens, generated_tokens))

    def resume_order(self, parked: Sequence[Stream], now_ns: int) -> list[Stream]:  # noqa: ARG002
        return [one.stream for one in ranked(parked, self._key)]

    def swaps(
        self,
        running: Sequence[Stream],
        parked: Sequence[Stream],
        rooms: Sequence[DecodeRoom],
        now_ns: int,
    ) -> list[Swap]:
        self._earn(len(rooms), now_ns)
        if not parked or not rooms:
            return []
        self._learn(running, parked, rooms, now_ns)
        plan = self._plan
        if not plan.parks or plan.weighs_memory != memory_binds(rooms):
            return []
        outs = [one for one in running if one.moves < self._moves_max and self._calm(one, now_ns)]
        intos = [one for one in parked if one.moves == 0 or self._calm(one, now_ns)]
        wished = exchange(
            ranked(outs, lambda one: self._key(one) - plan.hold_ns(one.moves)),
            ranked(intos, self._key),
            rooms,
        )
        return self._afforded(wished, running, parked) if wished else []

    # ── single swaps ─────────────────────────────────────────────────────────────────────────────

    def _key(self, stream: Stream) -> float:
        return self._plan.key(
            self._lengths,
            stream.cls,
            stream.arrived_ns,
            stream.generated_tokens,
            stream.context_tokens,
        )

    def _move_ns(self, stream: Stream) -> int:
        return self._costs.host_ns(stream.context_tokens)

    def _calm(self, stream: Stream, now_ns: int) -> bool:
        return now_ns - stream.since_ns >= 4 * self._move_ns(stream)  # twice: out and in

    def _earn(self, workers: int, now_ns: int) -> None:
        if self._credited_ns is not None:
            earned = LINK_SHARE_MAX * workers * max(0, now_ns - self._credited_ns)
            self._credit_ns = min(CREDIT_MAX_NS * workers, self._credit_ns + earned)
        self._credited_ns = now_ns

    def _afforded(
        self, wished: Sequence[Swap], running: Sequence[Stream], parked: Sequence[Stream]
    ) -> list[Swap]:
        """Those that the link has time for and that will not be overtaken by events."""
        streams = {one.request: one for one in (*running, *parked)}
        afforded = []
        for place, swap in enumerate(wished):
            assert swap.into is not None
            move_ns = self._move_ns(streams[swap.out]) + self._move_ns(streams[swap.into])
            if self._credit_ns < move_ns:
                break
            if self._ending(running, 2 * move_ns) > place + 1:
                continue
            self._credit_ns -= move_ns
            afforded.append(swap)
        return afforded

    def _ending(self, running: Sequence[Stream], within_ns: int) -> float:
        """How many of the running streams are expected to end by themselves in this time."""
        context = sum(one.context_tokens for one in running)
        workers = len({one.worker for one in running})
        step_ns = self._costs.decode.step_ns(len(running) // workers, context // workers)
        tokens = within_ns // max(1, step_ns)
        ending = 0.0
        for one in running if tokens else ():
            curve = self._lengths.curve(one.cls)
            now = curve.survival(one.generated_tokens)
            ending += 1 - curve.survival(one.generated_tokens + tokens) / now
        return ending

    # ── studies ──────────────────────────────────────────────────────────────────────────────────

    def _learn(
        self,
        running: Sequence[Stream],
        parked: Sequence[Stream],
        rooms: Sequence[DecodeRoom],
        now_ns: int,
    ) -> None:
        if self._study is not None:
            self._advance(self._study)
        elif self._study_is_due(now_ns):
            self._next_study_ns = now_ns + STUDY_EVERY_NS
            self._studied_count = self._lengths.observed_count
            self._study = _Study(
                self._jobs([*running, *parked], len(rooms), now_ns),
                now_ns,
                sum(room.running_max for room in rooms) // len(rooms),
                sum(room.capacity_tokens for room in rooms) // len(rooms),
            )

    def _study_is_due(self, now_ns: int) -> bool:
        if len(self._ended) < JOBS_MIN:
            return False
        # At first, each doubling of what was seen says more than the time that has passed.
        doubled = self._lengths.observed_count >= 2 * self._studied_count
        fresh = self._lengths.observed_count <= ENDED_MAX
        return now_ns >= self._next_study_ns or (doubled and fresh)

    def _jobs(self, live: Sequence[Stream], workers: int, now_ns: int) -> list[Job]:
        """One worker's share of what is there, and of the last arrivals, coming once more.

        How long a live answer will be is spread over what is to be expected, evenly and without
        chance.
        """
        present = []
        for count, one in enumerate(sorted(live, key=lambda one: one.arrived_ns)):
            ratio = min(0.99, max(0.01, (count * GOLDEN) % 1))
            more = self._lengths.remaining_quantile(one.cls, one.generated_tokens, ratio)
            present.append(
                Job(
                    one.cls,
                    one.arrived_ns,
                    max(1, one.context_tokens - one.generated_tokens),
                    one.generated_tokens + more,
                    one.generated_tokens,
                    one.moves,
                    runs=one.worker is not None,
                )
            )
        past = sorted([*self._ended, *present], key=lambda job: job.arrived_ns)
        past = past[-JOBS_MAX * workers :]
        shift_ns = now_ns - past[0].arrived_ns
        future = [
            Job(job.cls, job.arrived_ns + shift_ns, job.prompt_tokens, job.generated_tokens)
            for job in past[::workers]
        ]
        return [*present[: JOBS_MAX * workers : workers], *future]

    def _advance(self, study: _Study) -> None:
        """One replay; after the last one, its result is what is followed."""
        plan = study.plans.pop()
        outcome = replay(
            study.jobs,
            plan,
            study.now_ns,
            running_max=study.running_max,
            capacity_tokens=study.capacity_tokens,
            costs=self._costs,
            lengths=self._lengths,
            moves_max=self._moves_max,
        )
        if study.base is None:
            study.base = outcome
            study.plans = _plans(outcome, len({job.cls for job in study.jobs}))
            if study.plans:
                study.best = (FCFS, 1 - GAIN_MIN)
        else:
            assert study.best is not None
            ratio = outcome.mean_ns / study.base.mean_ns
            tail = outcome.p99_ns / study.base.p99_ns
            if ratio <= study.best[1] and tail <= self._tail_ratio:
                study.best = (plan, ratio)
        if not study.plans:
            if study.best is not None:  # else hardly anybody waits, which says nothing about plans
                self._plan = study.best[0]
            self._study = None


def _plans(base: Outcome, classes: int) -> list[Plan]:
    """What to try where first come, first served does so."""
    if base.wait_ns < GAIN_MIN * base.mean_ns:
        return []  # there is nothing to gain
    memory = base.memory_share > 0.5
    # Before they have begun, streams of one class differ in nothing but the memory they hold.
    sorts = (False, True) if memory or classes > 1 else (True,)
    return [
        Plan(round(spread * base.wait_ns), parks, memory) for parks in sorts for spread in SPREADS
    ]
