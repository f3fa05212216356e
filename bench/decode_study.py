"""One decode worker under an order of decoding: discrete events, real lengths, Poisson arrivals.

What ``python -m bench.scheduling`` asks of it: how long answers take, from the hand-off to their
last token, under each order of ``pdserve.router.decode_orders``, at a load that is a fraction of
what the worker can do when it is never short of work.

    step      12 ms + 24 ns per token of context + 50 µs per sequence   (``COSTS``)
    admission in the order's order, up to ``running_max`` sequences, while the predicted peak of KV
              stays within 95 % of the capacity ("Past-Future"); when memory runs out all the same,
              who arrived last is parked
    a swap    blocks the worker while the KV goes out and another's comes in

Between two events the batch does not change, and the time of k steps is an arithmetic series: no
step is an event of its own.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pdserve.clock import S
from pdserve.ids import RequestId, WorkerId
from pdserve.router.costs import CostModel, DecodeCost, MoveCost, PrefillCost, StepCost
from pdserve.router.decode_orders import DecodeOrder, DecodeRoom, Stream, decode_order_of
from pdserve.router.lengths import LengthModel

OrderName = Literal["gated", "fcfs", "mlfq", "oracle"]

HEADROOM = 0.95
TICK_S = 1.0
"""An order is asked at least so often while streams wait: workers report once a second."""

FAR_S = 1e6

WORKER = WorkerId("decode-0")


def study_costs(swap_bytes_per_s: float = 400e9) -> CostModel:
    """A 70-billion-parameter model's decode, as assumed by the studies we compare with."""
    step = StepCost(fixed_s=0.012, context_s=2.4e-8, sequence_s=5e-5)
    move = MoveCost(fixed_s=0.0, bytes_per_s=swap_bytes_per_s)
    return CostModel(
        name="study",
        origin="believed",
        prefill=PrefillCost(fixed_s=0.015, token_s=8e-5, pair_s=1e-9),
        decode=DecodeCost(small=step, large=step),
        handoff=move,
        host=move,
        ssd=move,
        kv_token_bytes=327_680,
    )


def reasoning_mix(count: int, seed: int) -> list[tuple[int, int]]:
    """(context, output): 12 % long thoughts of about 3,100 tokens among answers of about 190. The
    standard deviation of outputs is 2.6 times their mean."""
    chance = random.Random(seed)
    lengths = []
    for _ in range(count):
        context = max(16, round(chance.lognormvariate(6.5, 0.8)))
        mean, spread = (7.73, 0.8) if chance.random() < 0.12 else (5.0, 0.7)
        lengths.append((context, max(1, round(chance.lognormvariate(mean, spread)))))
    return lengths


@dataclass(slots=True)
class _Job:
    """One request, in whatever state."""

    stream: Stream  # as of when it last began to run or to wait
    total: int
    started_step: int = 0

    def generated(self, step: int) -> int:
        return self.stream.generated_tokens + step - self.started_step


class _Batch:
    """The worker's batch; its clock moves by whole steps and by moves of KV."""

    def __init__(self, costs: CostModel, running_max: int, kv_tokens: int) -> None:
        self.costs = costs
        self.running_max = running_max
        self.kv_tokens = kv_tokens
        self.lengths = LengthModel()
        self.running: dict[RequestId, _Job] = {}
        self.waiting: dict[RequestId, _Job] = {}
        self.context_tokens = 0
        self.step = 0
        self.now_s = 0.0
        self.moved_bytes = 0
        self.moves = 0

    def now_ns(self) -> int:
        return round(self.now_s * S)

    def live(self, job: _Job) -> Stream:
        grown = self.step - job.started_step
        if grown == 0:
            return job.stream
        return replace(
            job.stream,
            generated_tokens=job.stream.generated_tokens + grown,
            context_tokens=job.stream.context_tokens + grown,
        )

    def arrive(self, job: _Job) -> None:
        self.waiting[job.stream.request] = job

    def start(self, job: _Job) -> None:
        if job.stream.moves:
            self._move(job.stream.context_tokens)
        del self.waiting[job.stream.request]
        job.stream = replace(job.stream, worker=WORKER, since_ns=self.now_ns())
        job.started_step = self.step
        self.running[job.stream.request] = job
        self.context_tokens += job.stream.context_tokens

    def park(self, job: _Job) -> None:
        stream = self.live(job)
        del self.running[stream.request]
        self.context_tokens -= stream.context_tokens
        self._move(stream.context_tokens)
        self.moves += 1
        job.stream = replace(stream, worker=None, since_ns=self.now_ns(), moves=stream.moves + 1)
        job.started_step = self.step
        self.waiting[stream.request] = job

    def _move(self, tokens: int) -> None:
        moved_bytes = tokens * self.costs.kv_token_bytes
        self.moved_bytes += moved_bytes
        self.now_s += self.costs.host.time_ns(moved_bytes) / S

    def headroom_tokens(self) -> int:
        peak = self.lengths.peak_tokens([self.live(job) for job in self.running.values()])
        return int(HEADROOM * self.kv_tokens) - peak

    def takes(self, stream: Stream) -> bool:
        if len(self.running) == self.running_max:
            return False
        if not self.running:
            return True
        together = [self.live(job) for job in self.running.values()]
        together.append(stream)
        return self.lengths.peak_tokens(together) <= HEADROOM * self.kv_tokens

    def steps_s(self, steps: int) -> float:
        """The time of so many steps of this batch."""
        count = len(self.running)
        cost = self.costs.decode.small
        first = cost.fixed_s + cost.sequence_s * count + cost.context_s * self.context_tokens
        return steps * first + cost.context_s * count * steps * (steps - 1) / 2

    def steps_until(self, seconds: float) -> int:
        """The least number of steps, at least one, that take so long."""
        count = len(self.running)
        cost = self.costs.decode.small
        square = cost.context_s * count / 2
        first = cost.fixed_s + cost.sequence_s * count + cost.context_s * self.context_tokens
        line = first - square
        root = math.sqrt(line * line + 4 * square * max(0.0, seconds))
        return max(1, math.ceil(2 * max(0.0, seconds) / (line + root) - 1e-9))

    def advance(self, until_s: float) -> list[_Job]:
        """Steps until the next answer ends, memory is full, or this time; who has ended."""
        count = len(self.running)
        ends = min(job.total - job.generated(self.step) for job in self.running.values())
        full = max(1, (self.kv_tokens - self.context_tokens) // count)
        steps = min(ends, full, self.steps_until(until_s - self.now_s))
        self.now_s += self.steps_s(steps)
        self.step += steps
        self.context_tokens += steps * count
        ended = [job for job in self.running.values() if job.generated(self.step) == job.total]
        for job in ended:
            stream = self.live(job)
            del self.running[stream.request]
            self.context_tokens -= stream.context_tokens
            self.lengths.observe(stream.cls, stream.generated_tokens)
        return ended

    def relieve(self) -> None:
        """Park who arrived last until one more step fits."""
        while len(self.running) > 1 and self.context_tokens + len(self.running) > self.kv_tokens:
            self.park(max(self.running.values(), key=lambda job: job.stream.arrived_ns))


def saturated_rate_per_s(
    lengths: Sequence[tuple[int, int]], slots: int, kv_tokens: int, costs: CostModel
) -> float:
    """Answers per second, first come, first served, when there is always one more waiting."""
    batch = _Batch(costs, slots, kv_tokens)
    marks: list[float] = []  # when each answer ended
    coming = iter(enumerate(lengths))
    while len(marks) < len(lengths):
        while True:
            if not batch.waiting:
                following = next(coming, None)
                if following is None:
                    break
                batch.arrive(_job(*following, arrived_ns=0))
            job = next(iter(batch.waiting.values()))
            if not batch.takes(job.stream):
                break
            batch.start(job)
        batch.relieve()
        marks += [batch.now_s for _ in batch.advance(batch.now_s + FAR_S)]
    tenth = len(marks) // 10
    return (len(marks) - 2 * tenth) / (marks[-1 - tenth] - marks[tenth])


def _job(index: int, lengths: tuple[int, int], arrived_ns: int) -> _Job:
    context, output = lengths
    stream = Stream(
        request=RequestId(f"r-{index:07}"),
        cls="all",
        arrived_ns=arrived_ns,
        generated_tokens=0,
        context_tokens=context,
        worker=None,
        since_ns=arrived_ns,
        moves=0,
        oracle_tokens=output,
    )
    return _Job(stream, output)


def decode_study(
    lengths: Sequence[tuple[int, int]],
    order_name: OrderName,
    rho: float,
    slots: int,
    kv_tokens: int,
    seed: int,
    *,
    rate_per_s: float | None = None,
    swap_bytes_per_s: float = 400e9,
    moves_max: int = 2,
    tail_ratio: float = 1.25,
    order: DecodeOrder | None = None,
) -> dict[str, float]:
    """Mean and tail of the time from arrival to the last token, and what moving cost.

    Args:
        lengths: (context tokens on arrival, tokens to generate) of each request, in order.
        rho: load, as a fraction of what saturates the worker, first come, first served.
        rate_per_s: that saturated rate, where it is known already.
        order: instead of a new one by ``order_name``.
    """
    costs = study_costs(swap_bytes_per_s)
    if rate_per_s is None:
        rate_per_s = saturated_rate_per_s(lengths, slots, kv_tokens, costs)
    if order is None:
        order = decode_order_of(order_name, costs, moves_max=moves_max, tail_ratio=tail_ratio)
    chance = random.Random(seed)
    arrivals_s, now_s = [], 0.0
    for _ in lengths:
        now_s += chance.expovariate(rho * rate_per_s)
        arrivals_s.append(now_s)
    batch = _Batch(costs, slots, kv_tokens)
    taken = _run(batch, order, lengths, arrivals_s, asks=order_name != "fcfs")
    taken.sort()
    return {
        "mean_jct_s": sum(taken) / len(taken),
        "p99_jct_s": taken[math.ceil(0.99 * len(taken)) - 1],
        "moves_per_request": batch.moves / len(taken),
        "swap_bytes": float(batch.moved_bytes),
    }


def _run(
    batch: _Batch,
    order: DecodeOrder,
    lengths: Sequence[tuple[int, int]],
    arrivals_s: Sequence[float],
    *,
    asks: bool,
) -> list[float]:
    """How long each request took, in seconds, by the order in which they ended."""
    taken: list[float] = []
    arrived = 0
    while len(taken) < len(lengths):
        if not batch.running and not batch.waiting:
            batch.now_s = max(batch.now_s, arrivals_s[arrived])
        while arrived < len(lengths) and arrivals_s[arrived] <= batch.now_s:
            batch.arrive(_job(arrived, lengths[arrived], round(arrivals_s[arrived] * S)))
            arrived += 1
        batch.relieve()
        if batch.waiting:
            _fill(batch, order)
        if batch.waiting and asks:
            _swap(batch, order)
        until_s = arrivals_s[arrived] if arrived < len(lengths) else math.inf
        if batch.waiting and asks:
            until_s = min(until_s, batch.now_s + TICK_S)
        for job in batch.advance(min(until_s, batch.now_s + FAR_S)):
            stream = batch.live(job)
            taken.append(batch.now_s - stream.arrived_ns / S)
            order.finished(
                stream.cls,
                job.total,
                batch.now_ns(),
                context_tokens=stream.context_tokens,
                arrived_ns=stream.arrived_ns,
            )
    return taken


def _fill(batch: _Batch, order: DecodeOrder) -> None:
    if len(batch.running) == batch.running_max:
        return
    smallest = min(job.stream.context_tokens for job in batch.waiting.values())
    if batch.running and batch.headroom_tokens() < smallest:
        return
    parked = [job.stream for job in batch.waiting.values()]
    for stream in order.resume_order(parked, batch.now_ns()):
        if not batch.takes(stream):
            return
        batch.start(batch.waiting[stream.request])


def _swap(batch: _Batch, order: DecodeOrder) -> None:
    room = DecodeRoom(
        worker=WORKER,
        sequences=len(batch.running),
        running_max=batch.running_max,
        free_tokens=max(0, batch.headroom_tokens()),
        capacity_tokens=batch.kv_tokens,
    )
    running = [batch.live(job) for job in batch.running.values()]
    parked = [job.stream for job in batch.waiting.values()]
    for swap in order.swaps(running, parked, [room], batch.now_ns()):
        batch.park(batch.running[swap.out])
        if swap.into is not None and batch.takes(batch.waiting[swap.into].stream):
            batch.start(batch.waiting[swap.into])
    _fill(batch, order)
