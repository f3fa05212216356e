"""Two pools under a load, as a few numbers: what an autoscaler is shown, and what it does to them.

Prompts arrive at a rate and take a fixed time of one prefill worker; then each is a stream for so
many tokens. Steps get longer with the streams a decode worker has. Workers come ``start_s`` after
they are wanted and leave at once. Time goes in ticks; within one, everything is divided evenly.
"""

import random
from collections import deque
from dataclasses import dataclass
from itertools import pairwise

from pdserve.messages import Role
from pdserve.router.scaling import Autoscaler, DecodeSignals, Observation, PrefillSignals

TICK_S = 1.0
QUEUE_MAX = 400
"""Beyond, arrivals are turned away; what they would have taken counts as having arrived."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    rate: float  # prompts per second
    prefill_s: float
    tokens: int  # of an answer
    stream_blocks: int = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    start_s: float = 8.0
    worker_blocks: int = 1000
    worker_sequences: int = 64
    step_fixed_s: float = 0.01
    step_stream_s: float = 0.0005


class Pools:
    def __init__(
        self, workers: Workers, autoscaler: Autoscaler, *, begin: int = 1, seed: int | None = None
    ) -> None:
        """``seed``: arrivals are Poisson; None: they are even."""
        self._workers = workers
        self._autoscaler = autoscaler
        self._chance = None if seed is None else random.Random(seed)
        self.now_s = 0.0
        self.count = dict.fromkeys(Role, begin)
        self._coming: list[tuple[float, Role]] = []
        self._queue: deque[tuple[float, float]] = deque()  # when it came, what is left of it
        self._outside: deque[float] = deque()  # prefilled, and no room: tokens
        self._streams: list[float] = []  # tokens left
        self._arrived = 0
        self._arrived_s = 0.0
        self._owed = 0.0
        self.numbers: dict[Role, list[tuple[float, int]]] = {role: [] for role in Role}
        self.bill_s = 0.0  # of workers, from when they were wanted

    def run(self, load: Load, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s += TICK_S
            self._arrive(load)
            self._prefill(load)
            self._decode(load)
            self._scale(load)

    def turns(self, role: Role, since_s: float) -> tuple[int, int]:
        """How often the wanted number grew, and how often it shrank, after ``since_s``."""
        later = [count for at_s, count in self.numbers[role] if at_s >= since_s]
        before = [count for at_s, count in self.numbers[role] if at_s < since_s][-1:]
        series = before + later
        ups = sum(b > a for a, b in pairwise(series))
        downs = sum(b < a for a, b in pairwise(series))
        return ups, downs

    def _arrive(self, load: Load) -> None:
        if self._chance is None:
            self._owed += load.rate * TICK_S
            count = int(self._owed)
            self._owed -= count
        else:
            count, at_s = 0, self._chance.expovariate(load.rate)
            while at_s < TICK_S:
                count, at_s = count + 1, at_s + self._chance.expovariate(load.rate)
        self._arrived += count
        self._arrived_s += count * load.prefill_s
        for _ in range(min(count, QUEUE_MAX - len(self._queue))):
            self._queue.append((self.now_s, load.prefill_s))

    def _prefill(self, load: Load) -> None:
        capacity_s = self.count[Role.PREFILL] * TICK_S
        while self._queue and capacity_s > 0 and not self._outside:
            came_s, left_s = self._queue.popleft()
            if left_s > capacity_s:
                self._queue.appendleft((came_s, left_s - capacity_s))
                return
            capacity_s -= left_s
            self._outside.append(load.tokens)
            self._adopt(load)

    def _adopt(self, load: Load) -> None:
        count = self.count[Role.DECODE]
        room = count * min(
            self._workers.worker_sequences, self._workers.worker_blocks // load.stream_blocks
        )
        while self._outside and len(self._streams) < room:
            self._streams.append(self._outside.popleft())

    def _decode(self, load: Load) -> None:
        count = self.count[Role.DECODE]
        if count:
            step_s = self._workers.step_fixed_s
            step_s += self._workers.step_stream_s * len(self._streams) / count
            done = TICK_S / step_s
            self._streams = [left - done for left in self._streams if left > done]
        self._adopt(load)

    def _seen(self, load: Load) -> Observation:
        prefill, decode = self.count[Role.PREFILL], self.count[Role.DECODE]
        is_full = bool(self._outside)
        streams = len(self._streams)
        outside = len(self._outside) + (len(self._queue) if is_full else 0)
        work_s = sum(left_s for _, left_s in self._queue)
        stopped = bool(self._outside) or not self._queue
        return Observation(
            at_ms=round(self.now_s * 1000),
            live=len(self._queue) + outside + streams,
            arrived=self._arrived,
            prefill=PrefillSignals(
                workers=prefill,
                busy=0 if stopped else prefill,
                queued=len(self._queue),
                oldest_wait_ms=round((self.now_s - self._queue[0][0]) * 1000) if self._queue else 0,
                work_ms=round(work_s * 1000),
                arrived_work_ms=round(self._arrived_s * 1000),
                shed_count=0,
            ),
            decode=DecodeSignals(
                workers=decode,
                blocks=(streams + outside) * load.stream_blocks,
                worker_blocks=self._workers.worker_blocks,
                sequences=streams + outside,
                worker_sequences=self._workers.worker_sequences,
                parked=len(self._outside),
                is_full=is_full,
                step_fixed_ms=self._workers.step_fixed_s * 1000,
                step_shared_ms=self._workers.step_stream_s * streams * 1000,
            ),
        )

    def _scale(self, load: Load) -> None:
        self._autoscaler.decide(self._seen(load))
        for due in [one for one in self._coming if one[0] <= self.now_s]:
            self._coming.remove(due)
            self.count[due[1]] += 1
        for role in Role:
            wanted = self._autoscaler.wanted(role)
            self.bill_s += TICK_S * self._had(role)
            if wanted is None:
                continue
            self.numbers[role].append((self.now_s, wanted))
            while self._had(role) < wanted:
                self._coming.append((self.now_s + self._workers.start_s, role))
            while self._had(role) > wanted:
                latest = [one for one in self._coming if one[1] is role]
                if latest:
                    self._coming.remove(latest[-1])
                else:
                    self.count[role] -= 1

    def _had(self, role: Role) -> int:
        return self.count[role] + sum(other is role for _, other in self._coming)
