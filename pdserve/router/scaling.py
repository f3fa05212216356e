"""How many workers each pool wants: what the router sees in, two numbers and their reasons out.

Both pools are decided together, for a request needs both: what waits because decode is full is no
reason for another prefill worker, and neither pool is put to sleep while the other has work.

*Demand* is counted in workers' worth, so that it does not depend on how many there are. Of prefill
it is the predicted time of the prompts that arrive per second. Of decode it is the blocks and the
places that streams take, and what keeps a step within its objective. A pool should *grow* to what
demand needs at the high mark. It may be *kept* as small as demand needs at the low mark, which is
``SHRINK_RATIO`` of it: between the two nothing happens.

*Lateness* is the other reason to grow: the oldest prompt has waited too long, or the first token of
the next is predicted too late. But a worker takes ``start_s`` to start. Where those there now will
have worked the backlog off by then, another would come too late and cost all the same.

Growing waits ``upscale_delay_s``, shrinking until the largest number kept over
``downscale_delay_s`` is below the present one. A pool that had to grow back after it shrank has
learnt a *floor*: it does not shrink below it again unless far fewer requests come than then. So a
constant load moves a number at most once each way, whatever a pool's size does to the demand.

Bounds are in here too; placing and starting workers is the caller's (Ray Serve's own).

Source: the window over which the largest number counts is the stabilisation window of Kubernetes'
HorizontalPodAutoscaler.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pdserve.config import AutoscalingConfig
from pdserve.messages import Role

SHRINK_RATIO = 0.6
STEP_SHRINK_RATIO = 0.8
"""The same for the objective of a step. Steps hardly get shorter with fewer streams."""

FORGET_RATIO = 0.75
"""A floor is forgotten when so much fewer requests come than when the pool shrank."""

REGRET_RATIO = 20.0
"""Growing back within so many ``downscale_delay_s`` may show that shrinking was wrong."""

SAME_LOAD_RATIO = 1.5
"""It does unless so many times the requests come. Demand of decode is no measure of that: a smaller
pool has longer steps, so streams stay longer, and there are more of them."""

RATE_MEMORY_RATIO = 4.0
"""Times ``load_memory_s``: how long requests are counted for these two."""

GROWTH_RATIO_MAX = 2
"""A pool doubles at most, then looks again: what a burst needs is uncertain."""

LATE_SHARE_MAX = 0.3
"""A pool grows that was late for so much of the time, although each backlog was soon over."""

ADOPT_MS = 5_000
"""A router that has just begun looks on for so long: workers of one before it come back."""

START_S_MAX = 900.0
KEEPS_MAX = 4_096
CHANGES_MAX = 256


@dataclass(frozen=True, slots=True)
class PrefillSignals:
    workers: int  # that take prompts; who leaves is left out
    busy: int  # of them, those that have something to compute
    queued: int  # requests that wait in the router
    oldest_wait_ms: int
    work_ms: int  # predicted, of all that wait and of what is being computed
    arrived_work_ms: int  # predicted, of all that ever came; only grows
    shed_count: int  # refused because they would be late; only grows
    lent: int = 0  # of ``workers``, those of the other pool, less its own that are there


@dataclass(frozen=True, slots=True)
class DecodeSignals:
    workers: int
    blocks: int  # used, promised, and what those need that are parked or kept waiting by decode
    worker_blocks: int  # of one worker; 0 where none has ever come
    sequences: int
    worker_sequences: int  # that one worker runs at once
    parked: int
    is_full: bool  # no worker has room for the next request
    step_fixed_ms: float  # predicted, of a step whatever its batch
    step_shared_ms: float  # what streams add to it, if one worker had them all
    lent: int = 0


@dataclass(frozen=True, slots=True)
class Observation:
    """The router at one moment. Plain values: it is recorded, and played back through a policy."""

    at_ms: int  # of any clock that only goes forward
    live: int  # requests anywhere
    arrived: int  # requests that ever came; only grows
    prefill: PrefillSignals
    decode: DecodeSignals


@dataclass(frozen=True, slots=True)
class Bounds:
    least: int
    most: int

    def clamp(self, count: int) -> int:
        return min(self.most, max(self.least, count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the autoscaler may do, and what it is to keep."""

    settings: AutoscalingConfig
    bounds: Mapping[Role, Bounds]  # without prefill: one pool does everything
    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def aggregated(self) -> bool:
        return Role.PREFILL not in self.bounds


@dataclass(frozen=True, slots=True)
class Need:
    """What one pool needs by one observation."""

    grow_to: int  # at least so many
    keep: int  # it need not be larger than this
    demand: float  # in workers' worth
    why: str
    is_late: bool = False  # ``grow_to`` is because of a backlog, not of demand


@dataclass(frozen=True, slots=True)
class Decision:
    """One pool, by one observation."""

    at_ms: int
    pool: Role
    workers: int  # that are there
    before: int  # how many it was to have
    wanted: int
    grow_to: int
    keep: int
    demand: float
    why: str

    @property
    def changes(self) -> bool:
        return self.wanted != self.before


class Autoscaler:
    """Observations in, decisions out; the last say stands until the next.

    Feed it every ``metrics_interval_s``, more or less.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.latest: tuple[Decision, ...] = ()
        self.changes: deque[Decision] = deque(maxlen=CHANGES_MAX)
        self._pools = {role: _Pool(role, plan) for role in plan.bounds}
        self._load = _Load(plan.settings.load_memory_s)
        self._live_ms: int | None = None  # when somebody was there last
        self._began_ms: int | None = None
        self._arrived = 0

    def wanted(self, role: Role) -> int | None:
        """None: it has not seen enough to say."""
        pool = self._pools.get(role)
        return None if pool is None else pool.target

    def start_s(self, role: Role) -> float:
        """How long a worker takes from being wanted to being there, as far as is known."""
        return self._pools[role].start_s

    def decide(self, seen: Observation) -> tuple[Decision, ...]:
        """One decision a pool, prefill first."""
        if self._began_ms is None:
            self._began_ms = self._live_ms = seen.at_ms
        if seen.live or seen.arrived != self._arrived:
            self._live_ms = seen.at_ms
        self._arrived = seen.arrived
        late = _lateness(seen, self.plan, shed_count=self._load.shed_since(seen))
        self._load.see(seen, late is not None)
        if seen.at_ms - self._began_ms < ADOPT_MS and not self._is_asleep(seen):
            return ()
        decisions = []
        for role, pool in self._pools.items():
            need = self._need(role, pool, seen, late)
            workers = _workers(role, seen) - _lent(role, seen)
            decisions.append(pool.decide(seen.at_ms, workers, need, self._load.rate))
        self.latest = tuple(decisions)
        self.changes.extend(one for one in decisions if one.changes)
        return self.latest

    def _is_asleep(self, seen: Observation) -> bool:
        """Somebody waits and nobody is there."""
        return seen.live > 0 and any(_workers(role, seen) == 0 for role in self._pools)

    def _need(self, role: Role, pool: "_Pool", seen: Observation, late: str | None) -> Need:
        """Of the pool, sleep taken into account."""
        lent = _lent(role, seen)
        count = max(1, pool.count(_workers(role, seen) - lent) + lent)
        if role is Role.PREFILL:
            need = self._prefill_need(seen, count, pool.start_s, late)
        else:
            need = self._decode_need(seen, count)
            if self.plan.aggregated:
                need = _larger(need, self._prefill_need(seen, count, pool.start_s, late))
        assert self._live_ms is not None
        idle_s = (seen.at_ms - self._live_ms) / 1000
        if not seen.live and idle_s >= self.plan.settings.zero_delay_s:
            return Need(0, 0, 0.0, f"nobody came for {idle_s:.0f} s")
        return replace(need, grow_to=max(1, need.grow_to - lent), keep=max(1, need.keep - lent))

    # ── prefill ──────────────────────────────────────────────────────────────────────────────────

    def _prefill_need(
        self, seen: Observation, count: int, start_s: float, late: str | None
    ) -> Need:
        signals, settings = seen.prefill, self.plan.settings
        demand = self._load.steady
        high = settings.prefill_busy_ratio
        grow_to = math.ceil(demand / high - 1e-9)
        keep = math.ceil(max(demand, self._load.recent) / (high * SHRINK_RATIO) - 1e-9)
        why = f"prompts of {demand:.2f} workers arrive, {high:.0%} of a worker is used"
        if late is None:
            if self._load.late_share > LATE_SHARE_MAX:
                keep = max(keep, count)
            return Need(grow_to, keep, demand, why)
        keep = max(keep, count)
        if seen.decode.is_full and signals.busy < signals.workers:
            waits = f"{late}, but for decode: {signals.workers - signals.busy} prefill workers idle"
            return Need(min(grow_to, count), keep, demand, waits)
        spare = count - max(demand, self._load.recent)
        over_s = signals.work_ms / 1000 / spare if spare > 0 else math.inf
        if over_s <= start_s and self._load.late_share <= LATE_SHARE_MAX:
            soon = f"{late}, over in {over_s:.1f} s; a worker starts in {start_s:.1f} s"
            return Need(grow_to, keep, demand, soon)
        drains = math.ceil(demand + signals.work_ms / 1000 / max(start_s, 1.0))
        return Need(max(grow_to, count + 1, drains), keep, demand, late, is_late=True)

    # ── decode ───────────────────────────────────────────────────────────────────────────────────

    def _decode_need(self, seen: Observation, count: int) -> Need:
        signals, settings = seen.decode, self.plan.settings
        blocks = signals.blocks / signals.worker_blocks if signals.worker_blocks else 0.0
        places = signals.sequences / max(1, signals.worker_sequences)
        demand = max(blocks, places)
        high = settings.kv_pressure_ratio
        grow_to = math.ceil(demand / high - 1e-9)
        keep = math.ceil(demand / (high * SHRINK_RATIO) - 1e-9)
        what = "KV blocks" if blocks >= places else "places"
        why = f"{what} of {demand:.2f} workers are taken, {high:.0%} of a worker is used"
        if signals.parked or (signals.is_full and seen.prefill.queued and signals.workers):
            grow_to, keep = max(grow_to, count + 1), max(keep, count)
            parked = f"{signals.parked} are parked" if signals.parked else "the next has no room"
            return Need(grow_to, keep, demand, f"{parked}; {why}", is_late=True)
        tpot_ms = self.plan.tpot_ms
        if tpot_ms is not None:
            steps = _workers_for_step(signals, tpot_ms)
            keep = max(keep, _workers_for_step(signals, tpot_ms * STEP_SHRINK_RATIO))
            if steps > grow_to:
                step_ms = signals.step_fixed_ms + signals.step_shared_ms / count
                why = f"a token takes {step_ms:.1f} ms, tpot_ms is {tpot_ms:g}"
                grow_to = steps
        return Need(grow_to, max(keep, grow_to), demand, why)


class _Fading:
    """What came per second, earlier things counting for less."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._sum = self._weight_s = 0.0

    def add(self, amount: float, passed_s: float) -> None:
        kept = math.exp(-passed_s / self._memory_s)
        # Both fade alike, so that their quotient is right from the first second on.
        self._sum = self._sum * kept + amount
        self._weight_s = self._weight_s * kept + passed_s

    @property
    def per_s(self) -> float:
        return self._sum / self._weight_s if self._weight_s else 0.0


class _Load:
    """How much prefill work arrives per second, how many requests, and how often it was late."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._work = _Fading(memory_s)
        self._recent_work = _Fading(memory_s / 4)
        self._requests = _Fading(memory_s * RATE_MEMORY_RATIO)
        self._seen: Observation | None = None
        self.late_share = 0.0  # of the time; from 0, so that one late moment is not all of it

    @property
    def steady(self) -> float:
        return self._work.per_s

    @property
    def recent(self) -> float:
        return self._recent_work.per_s

    @property
    def rate(self) -> float:
        return self._requests.per_s

    def shed_since(self, seen: Observation) -> int:
        """How many were refused since what was seen last."""
        return 0 if self._seen is None else seen.prefill.shed_count - self._seen.prefill.shed_count

    def see(self, seen: Observation, is_late: bool) -> None:
        before, self._seen = self._seen, seen
        if before is None or seen.arrived < before.arrived:  # another router's figures
            return
        passed_s = max(0.0, (seen.at_ms - before.at_ms) / 1000)
        work_s = (seen.prefill.arrived_work_ms - before.prefill.arrived_work_ms) / 1000
        self._work.add(work_s, passed_s)
        self._recent_work.add(work_s, passed_s)
        self._requests.add(seen.arrived - before.arrived, passed_s)
        kept = math.exp(-passed_s / self._memory_s)
        self.late_share = self.late_share * kept + is_late * (1 - kept)


@dataclass(frozen=True, slots=True)
class _Shrunk:
    at_ms: int
    count: int  # before
    rate: float  # of requests, per second


class _Pool:
    """One pool's number: when it follows what is needed."""

    def __init__(self, role: Role, plan: Plan) -> None:
        self._role = role
        self._settings = plan.settings
        self._bounds = plan.bounds[role]
        self.target: int | None = None
        self.start_s = plan.settings.start_s
        self._over_ms: int | None = None  # since when more are needed
        self._keeps: deque[tuple[int, int]] = deque(maxlen=KEEPS_MAX)  # when, how many
        self._grew_ms: int | None = None  # workers have been starting since
        self._shrunk: _Shrunk | None = None
        self._floor = 0
        self._floor_rate = 0.0

    def count(self, workers: int) -> int:
        return workers if self.target is None else self.target

    def decide(self, now_ms: int, workers: int, need: Need, rate: float) -> Decision:
        """``rate``: of requests, per second."""
        if self.target is None:
            self.target = self._bounds.clamp(max(1, workers))
        before = self.target
        self._see_start(now_ms, workers)
        if self._floor and rate <= FORGET_RATIO * self._floor_rate:
            self._floor = 0
        wanted, why = self._followed(now_ms, workers, need)
        wanted = self._bounds.clamp(wanted)
        if wanted != before:
            self._move(now_ms, wanted, rate)
        return Decision(
            now_ms, self._role, workers, before, wanted,
            need.grow_to, need.keep, round(need.demand, 3), why,
        )  # fmt: skip

    def _followed(self, now_ms: int, workers: int, need: Need) -> tuple[int, str]:
        assert self.target is not None
        target = self.target
        self._remember(now_ms, max(need.keep, min(need.grow_to, target)))
        if need.grow_to > target:
            return self._grown(now_ms, workers, need)
        self._over_ms = None
        return self._shrunken(now_ms, workers, need)

    def _remember(self, now_ms: int, keep: int) -> None:
        """One entry for each small part of the window, so that there is room for all of it."""
        grain_ms = self._settings.downscale_delay_s * 1000 / (KEEPS_MAX / 2)
        if len(self._keeps) > 1 and now_ms - self._keeps[-2][0] < grain_ms:
            at_ms, last = self._keeps.pop()
            now_ms, keep = at_ms, max(last, keep)
        self._keeps.append((now_ms, keep))

    def _grown(self, now_ms: int, workers: int, need: Need) -> tuple[int, str]:
        assert self.target is not None
        target = self.target
        if self._over_ms is None:
            self._over_ms = now_ms
        if target >= self._bounds.most:
            return target, f"{need.why}; replicas_max is {self._bounds.most}"
        if workers < target and need.is_late and self._is_starting(now_ms):
            return target, f"{need.why}; {target - workers} workers are starting"
        waited_s = (now_ms - self._over_ms) / 1000
        delay_s = self._settings.upscale_delay_s if target and workers else 0.0
        if waited_s < delay_s:
            return target, f"{need.why}; for {waited_s:.1f} of {delay_s:g} s"
        return min(need.grow_to, max(target + 1, GROWTH_RATIO_MAX * target)), need.why

    def _shrunken(self, now_ms: int, workers: int, need: Need) -> tuple[int, str]:
        assert self.target is not None
        target = self.target
        window_ms = round(self._settings.downscale_delay_s * 1000)
        first_ms = self._keeps[0][0]
        # One entry at or before the window's beginning stays: it says that the window is covered.
        while len(self._keeps) > 1 and self._keeps[1][0] <= now_ms - window_ms:
            self._keeps.popleft()
        keep = max(count for _, count in self._keeps)
        if need.keep >= target:
            return target, need.why
        if keep >= target or now_ms - first_ms < window_ms:
            return target, f"{need.why}; {need.keep} would do, not yet for long enough"
        if workers < target and self._is_starting(now_ms):
            return target, f"{need.why}; {target - workers} workers are starting"
        if keep < self._floor:
            keep = min(self._floor, target)
            if keep == target:
                return target, f"{need.why}; fewer than {target} were too few at this load"
        return max(keep, target // GROWTH_RATIO_MAX), need.why

    def _is_starting(self, now_ms: int) -> bool:
        """Later than that, it has been in vain: the host may have no room for it."""
        return self._grew_ms is not None and now_ms - self._grew_ms < 2000 * self.start_s

    def _see_start(self, now_ms: int, workers: int) -> None:
        if self._grew_ms is not None and self.target is not None and workers >= self.target:
            took_s = max(0.1, (now_ms - self._grew_ms) / 1000)
            self.start_s = min(START_S_MAX, (self.start_s + took_s) / 2)
            self._grew_ms = None

    def _move(self, now_ms: int, wanted: int, rate: float) -> None:
        assert self.target is not None
        if wanted > self.target:
            if (shrunk := self._shrunk) is not None and self._regrets(shrunk, now_ms, rate):
                self._floor, self._floor_rate = shrunk.count, shrunk.rate
            self._grew_ms = now_ms
        else:
            # From sleep one is woken; that is no reason to sleep less.
            self._shrunk = _Shrunk(now_ms, self.target, rate) if wanted else None
            self._grew_ms = None
        self.target = wanted
        self._over_ms = None
        self._keeps.clear()

    def _regrets(self, shrunk: _Shrunk, now_ms: int, rate: float) -> bool:
        regret_ms = 1000 * REGRET_RATIO * self._settings.downscale_delay_s
        return now_ms - shrunk.at_ms < regret_ms and rate <= SAME_LOAD_RATIO * shrunk.rate


def _workers(role: Role, seen: Observation) -> int:
    return seen.prefill.workers if role is Role.PREFILL else seen.decode.workers


def _lent(role: Role, seen: Observation) -> int:
    return seen.prefill.lent if role is Role.PREFILL else seen.decode.lent


def _larger(decode: Need, prefill: Need) -> Need:
    """Of a pool that does both."""
    first, second = (prefill, decode) if prefill.grow_to > decode.grow_to else (decode, prefill)
    return replace(
        first, keep=max(first.keep, second.keep), demand=max(first.demand, second.demand)
    )


def _lateness(seen: Observation, plan: Plan, *, shed_count: int) -> str | None:
    """Why prefill is late, if it is."""
    signals, limit_ms = seen.prefill, plan.settings.queue_age_ms
    if shed_count > 0:
        return f"{shed_count} were refused, for they would have been late"
    if not signals.queued:
        return None
    if signals.oldest_wait_ms > limit_ms:
        return f"the oldest has waited {signals.oldest_wait_ms} ms, queue_age_ms is {limit_ms:g}"
    if plan.ttft_ms is not None:
        predicted_ms = signals.work_ms / max(1, signals.workers)
        if predicted_ms > plan.ttft_ms:
            return (
                f"a first token is predicted in {predicted_ms:.0f} ms, ttft_ms is {plan.ttft_ms:g}"
            )
    return None


def _workers_for_step(signals: DecodeSignals, limit_ms: float) -> int:
    """So many that a step takes no longer; 0 where no number is enough."""
    left_ms = limit_ms - signals.step_fixed_ms
    return math.ceil(signals.step_shared_ms / left_ms - 1e-9) if left_ms > 0 else 0
