"""What an order of decoding would do: the present, followed by the recent past once more.

Whether an order pays depends on what binds, on the load, the lengths and the streams that wait
already; no formula says so. So it is tried: from the streams as they are, with the last arrivals
coming again. A *plan* is one way to order streams, with a *size* and a *spread*:

    key = arrival + spread · ln(size),   the least key first

    size      expected tokens to come; 1 / Gittins index where streams may be parked; either one
              times the memory it holds, where memory binds
    spread    0 is first come, first served. A stream overtakes another only if it came within
              spread · ln(the other's size / its own) after it: waiting is bounded by construction.

``replay`` runs jobs under a plan on one worker and says how long they take. It knows when each job
ends, its plan does not. The worker is a fluid: between two events all steps take equally long, and
a job holds its mean context throughout. So an event costs O(log jobs), with a plan that parks
O(sequences); memory that runs out is not modelled.

The logarithm is the boost of γ-Boost (arXiv:2404.08826), 1/γ · ln(1 / (1 − exp(−γ·size))), where
γ·size is small, with spread = 1/γ.
"""

import heapq
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from pdserve.router.costs import CostModel
from pdserve.router.lengths import EDGES, LengthModel

SWAP_RATIO = 3.0
SWAP_RATIO_GROWTH = 2.0
"""A stream yields to one whose size is so many times smaller, and with each time that it has
yielded so many times more. A stream may yield few times, and each time costs everybody the time of
two moves: they are for where the gain is large. Lower ratios move more, to gain less."""


@dataclass(frozen=True, slots=True)
class Plan:
    spread_ns: int = 0
    parks: bool = False
    weighs_memory: bool = False

    def hold_ns(self, moves: int) -> float:
        """By how much the key of a stream that runs counts as smaller than it is."""
        return self.spread_ns * (math.log(SWAP_RATIO) + moves * math.log(SWAP_RATIO_GROWTH))

    def key(
        self,
        lengths: LengthModel,
        cls: Hashable,
        arrived_ns: int,
        generated_tokens: int,
        context_tokens: int,
    ) -> float:
        if self.spread_ns == 0:
            return arrived_ns
        if self.parks:
            size = 1 / lengths.index(cls, generated_tokens)
            memory = float(context_tokens)
        else:
            size = lengths.remaining(cls, generated_tokens)
            memory = context_tokens + size / 2
        return arrived_ns + self.spread_ns * math.log(size * memory if self.weighs_memory else size)


FCFS = Plan()


@dataclass(frozen=True, slots=True)
class Job:
    """One stream from its first generated token to its last."""

    cls: Hashable
    arrived_ns: int
    prompt_tokens: int
    generated_tokens: int  # in the end
    attained_tokens: int = 0  # when the replay begins
    moves: int = 0
    runs: bool = False

    @property
    def mean_context_tokens(self) -> int:
        return self.prompt_tokens + (self.attained_tokens + self.generated_tokens) // 2


@dataclass(frozen=True, slots=True)
class Outcome:
    mean_ns: float  # from arrival, or from the beginning if that is later, to the end
    p99_ns: float  # from arrival
    wait_ns: float  # mean, of those that did not run at the beginning, before they do
    memory_share: float  # of those that had to wait on arrival, how many waited for memory


class _Worker:
    """The state of one replay."""

    def __init__(
        self,
        jobs: Sequence[Job],
        plan: Plan,
        running_max: int,
        capacity_tokens: int,
        costs: CostModel,
        lengths: LengthModel,
        moves_max: int,
        now_ns: int,
    ) -> None:
        self.jobs = jobs
        self.plan = plan
        self.costs = costs
        self.lengths = lengths
        self.moves_max = moves_max
        self.capacity = capacity_tokens
        self.used = 0
        self.now_ns = float(now_ns)
        self.steps = 0.0
        # While waiting; while running, without this stretch.
        self.attained = [float(job.attained_tokens) for job in jobs]
        self.moves = [job.moves for job in jobs]
        self.started_ns: list[float | None] = [None] * len(jobs)
        self.ended_ns = [0.0] * len(jobs)
        self.waiting: list[tuple[float, int]] = []  # a heap of (key, job)
        self.ends: list[tuple[float, int, int]] = []  # a heap of (step, place, job); some are stale
        self.free_places = list(range(running_max))
        # Of the job in each place; -1 and False where there is none.
        self.job_at = np.full(running_max, -1)
        self.movable_at = np.zeros(running_max, dtype=np.bool_)
        self.origin_at = np.zeros(running_max)  # the step at which it would have had no token
        self.fixed_at = np.zeros(running_max)  # the part of its key that stays while it runs
        self.class_at = np.zeros(running_max, dtype=np.int64)
        classes = {job.cls: None for job in jobs}
        self.class_index = {cls: index for index, cls in enumerate(classes)}
        if plan.parks:
            rates = np.array([lengths.curve(cls).indices for cls in classes])
            self.growing = -plan.spread_ns * np.log(rates)  # by class and cell

    def key(self, job: int) -> float:
        one = self.jobs[job]
        attained = round(self.attained[job])
        return self.plan.key(
            self.lengths, one.cls, one.arrived_ns, attained, one.prompt_tokens + attained
        )

    def fits(self, job: int) -> bool:
        tokens = self.jobs[job].mean_context_tokens
        # Who fits nowhere runs alone, or nothing would ever end.
        fits = self.used + tokens <= self.capacity or self.used == 0
        return bool(self.free_places) and fits

    def start(self, job: int) -> None:
        one = self.jobs[job]
        place = self.free_places.pop()
        self.used += one.mean_context_tokens
        self.job_at[place] = job
        self.movable_at[place] = self.moves[job] < self.moves_max
        self.origin_at[place] = self.steps - self.attained[job]
        if self.plan.parks:
            memory = math.log(one.mean_context_tokens) if self.plan.weighs_memory else 0.0
            held = self.plan.hold_ns(self.moves[job])
            self.fixed_at[place] = one.arrived_ns + self.plan.spread_ns * memory - held
            self.class_at[place] = self.class_index[one.cls]
        if self.started_ns[job] is None:
            self.started_ns[job] = self.now_ns
        end = self.origin_at[place] + one.generated_tokens
        heapq.heappush(self.ends, (float(end), place, job))

    def leave(self, place: int) -> int:
        job = int(self.job_at[place])
        self.attained[job] = self.steps - float(self.origin_at[place])
        self.used -= self.jobs[job].mean_context_tokens
        self.job_at[place] = -1
        self.movable_at[place] = False
        self.free_places.append(place)
        return job

    def fill(self) -> None:
        """Start whom there is room for, and park whom that is worth it."""
        while self.waiting and self.fits(self.waiting[0][1]):
            self.start(heapq.heappop(self.waiting)[1])
        while self.waiting and self.plan.parks and self.swap():
            pass

    def swap(self) -> bool:
        cells = np.searchsorted(EDGES, self.steps - self.origin_at, side="right") - 1
        cells = np.clip(cells, 0, len(EDGES) - 2)
        keys = np.where(
            self.job_at >= 0, self.fixed_at + self.growing[self.class_at, cells], -np.inf
        )
        place = int(keys.argmax())
        key, into = self.waiting[0]
        out = int(self.job_at[place])
        if not self.movable_at[place]:
            return False
        left = self.capacity - self.used + self.jobs[out].mean_context_tokens
        if keys[place] <= key or left < self.jobs[into].mean_context_tokens:
            return False
        heapq.heappop(self.waiting)
        self.leave(place)
        self.moves[out] += 1
        self.start(into)
        heapq.heappush(self.waiting, (self.key(out), out))
        moved = self.jobs[out].mean_context_tokens + (
            self.jobs[into].mean_context_tokens if self.moves[into] else 0
        )
        self.now_ns += self.costs.host_ns(moved)
        return True

    def next_end(self) -> float | None:
        while self.ends:
            end, place, job = self.ends[0]
            total = self.jobs[job].generated_tokens
            if self.job_at[place] == job and self.origin_at[place] + total == end:
                return end
            heapq.heappop(self.ends)  # it was parked before it ended
        return None

    def advance(self, until_ns: float) -> bool:
        """Run until the next answer ends (True) or this instant (False), whichever is first."""
        end = self.next_end()
        if end is None:
            self.now_ns = max(self.now_ns, until_ns)
            return False
        running = len(self.job_at) - len(self.free_places)
        step_ns = self.costs.decode.step_ns(running, self.used)
        end_ns = self.now_ns + (end - self.steps) * step_ns
        if end_ns > until_ns:
            if until_ns > self.now_ns:
                self.steps += (until_ns - self.now_ns) / step_ns
                self.now_ns = until_ns
            return False
        self.now_ns, self.steps = end_ns, end
        self.ended_ns[self.leave(heapq.heappop(self.ends)[1])] = end_ns
        return True


def replay(
    jobs: Sequence[Job],
    plan: Plan,
    now_ns: int,
    *,
    running_max: int,
    capacity_tokens: int,
    costs: CostModel,
    lengths: LengthModel,
    moves_max: int,
) -> Outcome:
    """How long these jobs, by arrival, take on one worker of this size from ``now_ns`` on."""
    assert jobs
    worker = _Worker(jobs, plan, running_max, capacity_tokens, costs, lengths, moves_max, now_ns)
    memory_waits = waits = 0
    for index, job in enumerate(jobs):
        if job.runs and worker.fits(index):
            worker.start(index)
    for index, job in enumerate(jobs):
        if worker.started_ns[index] is not None:
            continue
        while worker.advance(job.arrived_ns):
            worker.fill()
        heapq.heappush(worker.waiting, (worker.key(index), index))
        worker.fill()
        if worker.waiting:
            waits += 1
            memory_waits += bool(worker.free_places)
    while worker.advance(math.inf):
        worker.fill()
    arrived_ns = np.array([float(job.arrived_ns) for job in jobs])
    from_ns = np.maximum(arrived_ns, now_ns)
    ended_ns = np.array(worker.ended_ns)
    begun_ns = np.array(worker.started_ns, dtype=np.float64)
    return Outcome(
        mean_ns=float((ended_ns - from_ns).mean()),
        p99_ns=float(np.quantile(ended_ns - arrived_ns, 0.99)),
        wait_ns=float((begun_ns - from_ns).mean()),
        memory_share=memory_waits / max(1, waits),
    )
