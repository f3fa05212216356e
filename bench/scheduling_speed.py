"""Speed: of one decision among a thousand workers, and of the simulator."""

import random
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.frame import Row, at_least, at_most, percentile
from bench.router_latency import dispatch_ms
from bench.scheduling_cells import UNLIMITED
from pdserve.clock import MS, US, S
from pdserve.cluster.collecting import collect_rarely
from pdserve.ids import HostId, RequestId, StoreId, WorkerId
from pdserve.lifecycle import Event
from pdserve.messages import (
    Address,
    Dispatch,
    Hello,
    Progress,
    Report,
    Request,
    Role,
    Sampling,
    ServiceClass,
    Stop,
)
from pdserve.router.commands import Command, ToWorker
from pdserve.router.core import RouterCore
from pdserve.router.costs import CostModel, PrefillCost
from pdserve.router_config import RouterConfig
from pdserve.simulator.run import SimulationSettings, simulate
from pdserve.simulator.settings import STUDY_COSTS
from pdserve.simulator.synthetic import exponential, poisson
from pdserve.simulator.traces import TraceRequest, load_trace, some_tokens
from pdserve.simulator.transformations import overlay, scale_to_load, spread

WORKERS = 1000
QUEUED = (1_000, 100_000)
DECISIONS = 20_000

_HERE = Address(HostId("here"), "/here", "")


def speed_rows(traces: Sequence[Path], *, quick: bool) -> Iterator[Row]:
    p50_us = {}
    for queued, limit_us in zip(QUEUED, (15, 20), strict=True):
        decided_us, enqueued_us = _decisions(queued, DECISIONS // (4 if quick else 1))
        p50_us[queued] = statistics.median(decided_us)
        bar = at_most(limit_us)
        yield Row(
            f"decision among {WORKERS} workers, {queued} queued, p50", p50_us[queued], "µs",
            bar=bar.text("µs"), holds=bar.holds(p50_us[queued], None),
            spread=(percentile(decided_us, 0.1), percentile(decided_us, 0.99)),
        )  # fmt: skip
        if queued == QUEUED[-1]:
            rate = 1e6 / statistics.mean(decided_us)
            bar = at_least(25_000)
            yield Row("decisions", rate, "/s", bar=bar.text("/s"), holds=bar.holds(rate, None))
            rate = 1e6 / enqueued_us
            yield Row("arrivals queued", rate, "/s")
    growth = p50_us[QUEUED[1]] / p50_us[QUEUED[0]]
    bar = at_most(1.5)
    yield Row(
        "growth from 1,000 to 100,000", growth, "", bar=bar.text(""), holds=bar.holds(growth, None)
    )
    latency_ms = dispatch_ms(100 if quick else 500)
    value, bar = statistics.median(latency_ms), at_most(2)
    yield Row(
        "router in to dispatched, idle worker, p50", value, "ms", bar=bar.text("ms"),
        holds=bar.holds(value, None),
        spread=(percentile(latency_ms, 0.1), percentile(latency_ms, 0.99)),
    )  # fmt: skip
    yield from _simulator_rows(traces[0], quick=quick)


# ── one decision ─────────────────────────────────────────────────────────────────────────────────


def _hello(role: Role, index: int) -> Hello:
    host = index // 8
    return Hello(
        worker=WorkerId(f"{role[0]}{index:05}"),
        role=role,
        address=_HERE,
        store_id=StoreId(f"store-{host}"),
        store=Address(HostId(f"h{host}"), "/store", ""),
        namespace="00",
        block_tokens=16,
        block_count=1 << 20,
        running_max=1 << 20,
        chunk_tokens=512,
        pid=index,
    )


class _Crowd:
    """Workers that hold what they were sent until they are told to be done with one."""

    def __init__(self) -> None:
        router = RouterConfig(
            waiting_max=UNLIMITED, queue_age_max_ms=None, worker_silence_ms=UNLIMITED, goal="mean"
        )
        self.core = RouterCore(router, costs=STUDY_COSTS, unix_zero_ms=0)
        self.held: dict[WorkerId, deque[RequestId]] = {}
        self.sequences: dict[WorkerId, int] = {}
        self._chance = random.Random(0)
        self._asked = 0
        for role in Role:
            for index in range(WORKERS):
                hello = _hello(role, index)
                self.held[hello.worker] = deque()
                self.sequences[hello.worker] = 0
                self.core.on_hello(hello, 0)

    def request(self) -> Request:
        tokens = max(1, round(self._chance.lognormvariate(7, 1.2)))
        self._asked += 1
        return Request(
            RequestId(f"r{self._asked}"), 0, 0, "model", some_tokens(tokens), tokens, (), "",
            ServiceClass.STANDARD, Sampling(), Stop(64), 0, UNLIMITED * 1000, _HERE,
        )  # fmt: skip

    def arrive(self, queued: int, now_ns: int) -> int:
        """Requests come until so many wait. How many came."""
        before = self._asked
        while len(self.core.state.lines) < queued:
            self.take(self.core.on_submit(self.request(), now_ns))
        return self._asked - before

    def done(self, worker: WorkerId) -> Report:
        """It hands its first prompt over."""
        progress = (Progress(self.held[worker].popleft(), 0, Event.PREFILL_DONE),)
        sequence = self.sequences[worker]
        self.sequences[worker] += 1
        running = len(self.held[worker])
        return Report(worker, sequence, False, running, 0, 1 << 20, progress)

    def take(self, commands: Sequence[Command]) -> int:
        """How many prompts were sent."""
        sent = 0
        for command in commands:
            if isinstance(command, ToWorker) and isinstance(command.message, Dispatch):
                self.held[command.worker].append(command.message.request.request)
                sent += 1
        return sent


def _decisions(queued: int, rounds: int) -> tuple[list[float], float]:
    """Microseconds of each decision (a worker is done, somebody is sent there), and of queueing."""
    collect_rarely()  # as the router's process does
    crowd = _Crowd()
    core, now_ns = crowd.core, 0
    begun_ns = time.perf_counter_ns()
    arrived = crowd.arrive(queued, now_ns)
    enqueued_us = (time.perf_counter_ns() - begun_ns) / arrived / US
    busy = deque(worker for worker, held in crowd.held.items() if held)
    taken_us: list[float] = []
    while len(taken_us) < rounds:
        worker = busy.popleft()
        busy.append(worker)
        if not crowd.held[worker]:
            continue  # somebody else has something, while the queue is not empty
        now_ns += MS
        report = crowd.done(worker)
        begun_ns = time.perf_counter_ns()
        commands = core.on_report(report, now_ns)
        elapsed_us = (time.perf_counter_ns() - begun_ns) / US
        sent = crowd.take(commands)
        if sent:
            taken_us.append(elapsed_us / sent)
        crowd.arrive(queued, now_ns)
    return taken_us, enqueued_us


# ── the simulator ────────────────────────────────────────────────────────────────────────────────


def _simulator_rows(path: Path, *, quick: bool) -> Iterator[Row]:
    trace = spread(load_trace(path), 0)
    settings = SimulationSettings(
        router=RouterConfig(waiting_max=UNLIMITED, queue_age_max_ms=None),
        prefill_workers=8, decode_workers=4,
        store_tokens=None,
    )  # fmt: skip
    hashes, factors = set(), []
    for _ in range(2 if quick else 3):
        begun = time.perf_counter()
        result = simulate(trace, settings)
        factors.append(trace.span_ns / S / (time.perf_counter() - begun))
        hashes.add(result.decisions_sha256)
    factor, bar = statistics.median(factors), at_least(1000)
    yield Row(
        f"simulated {path.stem}, 8 prefill and 4 decode workers", factor, "× real",
        bar=bar.text("×"), holds=bar.holds(factor, None), spread=(min(factors), max(factors)),
    )  # fmt: skip
    bar = at_most(1)
    yield Row(
        f"decision logs of {len(factors)} equal runs", len(hashes), "", bar=bar.text(""),
        holds=bar.holds(len(hashes), None),
    )  # fmt: skip
    yield _analytic(50_000, seeds=(1,)) if quick else _analytic(1_000_000, seeds=(1, 2, 3, 4))
    if not quick:
        yield _million(path)


def _analytic(jobs: int, seeds: Sequence[int]) -> Row:
    """M/M/4 at a load of 0.8, first come, first served: the mean wait by Erlang's C formula, for
    the load that the draws came to. The mean of a million jobs still errs by 0.8 %, hence several
    seeds; that every single wait is the queue's is a unit test."""
    servers, token_s = 4, 8e-5
    costs = _linear(token_s)
    settings = SimulationSettings(
        router=RouterConfig(policy="fcfs", waiting_max=UNLIMITED, queue_age_max_ms=None),
        costs=costs,
        prefill_workers=servers, decode_workers=1, decode=False, chunk_tokens=16,
    )  # fmt: skip
    waited_s, expected_s = [], []
    for seed in seeds:
        trace = poisson(jobs, 0.8 * servers, seed=seed, prompt=exponential(1 / token_s))
        result = simulate(trace, settings)
        work_s = np.array([r.prompt_tokens for r in trace.requests]) * token_s
        rho = work_s.sum() / (servers * trace.span_ns / S)
        waited_s.append(float((result.ttft_s - work_s).mean()))
        expected_s.append(_erlang_c(servers, rho) * work_s.mean() / (servers * (1 - rho)))
    error = 100 * abs(statistics.mean(waited_s) / statistics.mean(expected_s) - 1)
    bar = at_most(1) if len(seeds) > 1 else None
    return Row(
        f"mean wait of {len(seeds)} × {jobs} jobs, M/M/{servers}, error", error, "%",
        reference="Erlang C", reference_value=statistics.mean(expected_s),
        bar="" if bar is None else bar.text("%"),
        holds=None if bar is None else bar.holds(error, None),
    )  # fmt: skip


def _linear(token_s: float) -> CostModel:
    return replace(STUDY_COSTS, prefill=PrefillCost(fixed_s=0.0, token_s=token_s))


def _erlang_c(servers: int, rho: float) -> float:
    """The probability of having to wait."""
    offered = servers * rho
    term, total = 1.0, 1.0
    for count in range(1, servers):
        term *= offered / count
        total += term
    last = term * offered / servers / (1 - rho)
    return last / (total + last)


def _million(path: Path) -> Row:
    requests, workers = 1_000_000, 1000

    def work_s(request: TraceRequest, cached_tokens: int) -> float:
        return STUDY_COSTS.prefill_ns(request.prompt_tokens - cached_tokens, cached_tokens) / S

    trace = scale_to_load(overlay(load_trace(path), requests), 0.8, workers=workers, work_s=work_s)
    settings = SimulationSettings(
        router=RouterConfig(waiting_max=UNLIMITED, queue_age_max_ms=None), prefill_workers=workers,
        decode_workers=workers // 2, hosts=workers // 8,
        # As large as such workers and hosts have them. Without limits, what 83 passes over the
        # trace leave behind would take 13 GiB.
        cache_tokens=1_300_000, store_tokens=10_000_000,
    )  # fmt: skip
    begun = time.process_time()  # it has one thread, and others may want the machine
    simulate(trace, settings)
    minutes, bar = (time.process_time() - begun) / 60, at_most(5)
    return Row(
        f"simulated {requests} requests on {workers} workers, one core", minutes, "min",
        bar=bar.text("min"),
        holds=bar.holds(minutes, None),
    )  # fmt: skip
