"""The simulation: one heap of events around the production ``RouterCore``.

    trace ──arrivals──► ┌──────────────┐ ──Dispatch, Preempt, Cancel, Resume──► workers
                        │  RouterCore  │
    gateway ◄──Lost──── └──────────────┘ ◄──Hello, Report, Parked──────────────

Time is the instant of the event at hand; between events nothing happens. Equal instants keep the
order in which they were scheduled, all chance comes from one seed, and every command is entered in
a log whose SHA-256 is part of the result: the same seed gives the same decisions, bit by bit.

A request costs four events: it arrives, is computed, is adopted by decode, and ends; a few more
where its chunks are reported, its last blocks travel, or it is preempted or parked.
"""

import gc
import hashlib
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from pdserve.clock import MS, US, S
from pdserve.errors import ErrorInfo, WorkerLost
from pdserve.ids import HostId, RequestId, StoreId, WorkerId
from pdserve.messages import (
    Address,
    Dispatch,
    Handoff,
    Hello,
    Lost,
    Parked,
    Refused,
    Report,
    Request,
    Role,
    Sampling,
    Stop,
    WorkerFailed,
)
from pdserve.router.core import Command, RouterCore, ToWorker
from pdserve.simulator.agenda import Agenda
from pdserve.simulator.attempt import Attempt, Job, Keys, Outcome
from pdserve.simulator.neighbours import Neighbours
from pdserve.simulator.pools import Pools
from pdserve.simulator.result import Result, Sample, columns
from pdserve.simulator.settings import (
    UNLIMITED_BLOCKS,
    Death,
    Failure,
    SimulationSettings,
    Slowdown,
)
from pdserve.simulator.stores import stores_of
from pdserve.simulator.surroundings import Action, Surroundings
from pdserve.simulator.traces import Trace, some_tokens
from pdserve.simulator.worker import Worker

__all__ = ["Result", "SimulationSettings", "simulate"]

TICK_NS_MAX: Final = 250 * MS
"""The router is ticked at least so often, as the live service does."""

LOST_AGAIN_NS: Final = 250 * MS
"""Before the third attempt, and twice as long before each further one, as a live gateway does."""

AT_ONCE_MAX = 10_000
"""Events at one instant, and ten more per request, since all may arrive at once; beyond, two
parties send each other to and fro."""

SAMPLES_MAX = 512
LOG_LINES_MAX: Final = 4096
"""Lines of the decision log that wait to be hashed together."""

FOR_EVER_MS: Final = 10**11
"""Three years: when clients without a deadline give up, and silence means trouble."""

_GATEWAY = Address(HostId("gateway"), "/gateway", "")
_SAMPLING = Sampling()


def simulate(trace: Trace, settings: SimulationSettings) -> Result:
    """What the cluster would have done with this trace."""
    # Millions of objects come and go, and none of them in a cycle: looking for cycles again and
    # again among all that live would take a tenth of the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        return Simulation(trace, settings).run()
    finally:
        if collects:
            gc.enable()


class Simulation(Surroundings):
    def __init__(self, trace: Trace, settings: SimulationSettings) -> None:
        assert trace.requests
        self.now_ns = 0
        self._trace = trace
        self._settings = settings
        self._agenda = Agenda()
        self._keys = Keys()
        self._chance = random.Random(settings.seed)
        self._stop = Stop(max_tokens=settings.max_tokens)
        self._jobs: list[Job] = []
        self._live: dict[RequestId, Job] = {}
        self._workers: dict[WorkerId, Worker] = {}
        self._places: dict[tuple[Role, int], Worker] = {}  # who is there now, or was last
        self._busy_ns = 0  # of prefill workers that died
        self._came_count = 0
        self._stores = stores_of(settings, trace.block_tokens)
        crowded = range(settings.hosts if settings.contention > 1 else 0)
        self._neighbours = {host: Neighbours(settings.contention, self.at) for host in crowded}
        self._samples: list[Sample] = []
        self._sample_ns = max(S // 10, trace.span_ns * 2 // SAMPLES_MAX)
        self._log: list[str] = []
        self._digest = hashlib.sha256()
        self._event_count = 0
        self._ticking = False  # a tick is in the heap
        self._sampling = True
        router = replace(
            settings.router,
            worker_silence_ms=FOR_EVER_MS,
            # A decode worker that takes no time would be a splendid one to prefill.
            stand_in=settings.router.stand_in and settings.decode,
        )
        self._core = RouterCore(
            router,
            costs=settings.predicted or settings.costs,
            oracle=self._output_tokens,
            unix_zero_ms=0,
        )
        self._pools: Pools | None = None

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────

    def run(self) -> Result:
        self._set_up()
        agenda, at_once = self._agenda, 0
        at_once_max = AT_ONCE_MAX + 10 * len(self._trace.requests)
        while len(agenda):
            now_ns, action, argument = agenda.take()
            if now_ns == self.now_ns:
                at_once += 1
                assert at_once < at_once_max, f"time stands still: {''.join(self._log[-8:])}"
            else:
                at_once = 0
            self.now_ns = now_ns
            self._event_count += 1
            action(now_ns, argument)
        return self._result()

    def _set_up(self) -> None:
        self._carry_out(self._core.on_gateway_hello(_GATEWAY, 0))
        for role in Role:
            for index in range(self._settings.workers_of(role)):
                self._add_worker(role, index)
        for failure in self._settings.failures:
            self.at(failure.at_ns, self._fail, failure)
        self.at(self._trace.requests[0].arrival_ns, self._arrive, 0)
        self.at(0, self._sample, None)
        scaling = self._settings.autoscaling
        if scaling is not None:
            self._pools = Pools(
                scaling, self._core, self._workers, self._join, self._retire, self.at
            )
            self.at(0, self._scale, self._pools)

    def at(self, when_ns: int, action: Action, argument: object) -> None:
        self._agenda.add(when_ns, action, argument)

    @property
    def _over(self) -> bool:
        return not self._live and len(self._jobs) == len(self._trace.requests)

    def _tick(self, now_ns: int, _: None) -> None:
        """As the live service does, while there is anything to do; the next arrival resumes it."""
        self._ticking = bool(self._live)
        if not self._ticking:
            return
        self._carry_out(self._core.on_tick(now_ns))
        due_ns = self._core.next_tick_ns()
        latest_ns = now_ns + TICK_NS_MAX
        if due_ns is None:
            due_ns = latest_ns
        elif (
            len(self._agenda) <= self._sampling
        ):  # nothing else is going to happen: only a deadline can end it
            latest_ns = due_ns
        self.at(max(now_ns + MS, min(due_ns, latest_ns)), self._tick, None)

    def _sample(self, now_ns: int, _: None) -> None:
        if self._over:
            return
        state = self._core.state
        self._samples.append(Sample(now_ns / S, state.lines.lengths(), len(state.parked)))
        if len(self._samples) >= SAMPLES_MAX:
            self._samples = self._samples[::2]
            self._sample_ns *= 2
        self._sampling = len(self._agenda) > self._ticking
        if self._sampling:
            self.at(now_ns + self._sample_ns, self._sample, None)

    # ── the gateway ──────────────────────────────────────────────────────────────────────────────

    def _arrive(self, now_ns: int, index: int) -> None:
        if index + 1 < len(self._trace.requests):
            self.at(self._trace.requests[index + 1].arrival_ns, self._arrive, index + 1)
        asked = self._trace.requests[index]
        job = Job(
            index,
            asked,
            self._keys.of(asked.blocks),
            target=asked.generated_tokens if self._settings.decode else 1,
            factor=self._service_factor(),
        )
        self._jobs.append(job)
        self._live[job.id] = job
        self._submit(now_ns, job)
        if not self._ticking:
            self._ticking = True
            self.at(now_ns + TICK_NS_MAX, self._tick, None)

    def _submit(self, now_ns: int, job: Job) -> None:
        asked = job.trace
        if job.outcome is not Outcome.OPEN:
            return
        timeout_s = self._settings.timeout_s
        arrival_ms = (asked.arrival_ns if job.retries == 0 else job.asked_ns) // MS
        request = Request(
            job.id,
            job.attempt,
            0,
            "model",
            some_tokens(asked.prompt_tokens + job.delivered),
            asked.prompt_tokens,
            job.keys,
            asked.tenant,
            asked.service_class,
            _SAMPLING,
            self._stop,
            0,
            FOR_EVER_MS if timeout_s is None else arrival_ms + round(timeout_s * 1000),
            _GATEWAY,
            retries=job.retries,
        )
        self._carry_out(self._core.on_submit(request, now_ns))

    def _again(self, now_ns: int, job: Job) -> None:
        job.attempt += 1
        job.kept_blocks = 0
        self._submit(now_ns, job)

    def _hear(self, message: Refused | Lost) -> None:
        job = self._live.get(message.request)
        if job is None or job.attempt != message.attempt:
            return
        if isinstance(message, Refused):
            if not self._comes_back(job, message):
                job.outcome = Outcome.REFUSED
                del self._live[job.id]
            return
        waits = LOST_AGAIN_NS * 2 ** (job.attempt - 1) if job.attempt else 0
        self.at(self.now_ns + waits + self._settings.message_ns, self._again, job)

    def _comes_back(self, job: Job, refused: Refused) -> bool:
        """Whether its client asks again, as OpenAI's libraries do."""
        settings, hint_ms = self._settings, refused.error.retry_after_ms
        if job.attempt > 0 or hint_ms is None or job.retries >= settings.client_retries:
            return False
        after_ns = hint_ms * MS
        if settings.client_patience_s:
            after_ns = round(settings.client_patience_s * S * 2**job.retries)
        job.retries += 1
        job.asked_ns = self.now_ns + after_ns
        self.at(job.asked_ns, self._submit, job)
        return True

    # ── what workers need ────────────────────────────────────────────────────────────────────────

    def job(self, request: RequestId) -> Job:
        return self._jobs[int(request[1:])]

    def hand_off(self, attempt: Attempt, now_ns: int) -> None:
        """From a prefill worker; where decode is gone, the router hears that it failed."""
        decode = self._workers.get(attempt.decode)
        if decode is not None:
            if self._settings.message_ns:
                self._deliver(now_ns, decode.take, attempt)
            else:
                decode.take(now_ns, attempt)
            return
        lost = ErrorInfo.of(WorkerLost(f"decode {attempt.decode} did not take it"))
        request = attempt.request
        failed = WorkerFailed(request.request, request.attempt, lost)
        self.at(now_ns, self._heard, (attempt.prefill, failed))

    def report(self, report: Report, now_ns: int) -> None:
        if self._settings.message_ns:
            self.at(now_ns + self._settings.message_ns, self._reported, report)
        else:
            self._carry_out(self._core.on_report(report, now_ns))

    def _reported(self, now_ns: int, report: Report) -> None:
        self._carry_out(self._core.on_report(report, now_ns))

    def say(self, worker: WorkerId, message: Parked | WorkerFailed, now_ns: int) -> None:
        self._deliver(now_ns, self._heard, (worker, message))

    def _heard(self, now_ns: int, said: tuple[WorkerId, Parked | WorkerFailed]) -> None:
        worker, message = said
        if isinstance(message, Parked):
            self._carry_out(self._core.on_parked(message.handoff, worker, now_ns))
        else:
            self._carry_out(self._core.on_failed(message, worker, now_ns))

    def ended(self, job: Job, now_ns: int) -> None:
        if job.outcome is Outcome.OPEN:
            job.outcome = Outcome.FINISHED
            job.end_ns = now_ns
            job.keys = ()  # of a million, they would take more memory than all else
            del self._live[job.id]

    # ── commands ─────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, commands: Iterable[Command]) -> None:
        for command in commands:
            if isinstance(command, ToWorker):
                self._enter(command.worker, command.message)
                receiver = self._workers.get(command.worker)
                if receiver is None:
                    continue
                if self._settings.message_ns:
                    self._deliver(self.now_ns, receiver.receive, command.message)
                else:  # what is called at once need not be made an object first
                    receiver.receive(self.now_ns, command.message)
            else:
                self._enter("gateway", command.message)
                self._hear(command.message)

    def _deliver(self, now_ns: int, action: Action, message: object) -> None:
        if self._settings.message_ns:
            self.at(now_ns + self._settings.message_ns, action, message)
        else:
            action(now_ns, message)

    def _enter(self, receiver: str, message: Any) -> None:
        """One line of the decision log."""
        kind = type(message).__name__
        if isinstance(message, Dispatch):
            request, route = message.request, message.route
            job = self._jobs[int(request.request[1:])]
            if job.level < 0:
                job.level = message.timing.level
            what = f"{request.request}/{request.attempt} {route.decode} {message.timing.level}"
        elif hasattr(message, "handoff"):
            handoff: Handoff = message.handoff
            what = f"{handoff.request.request}/{handoff.request.attempt} {handoff.length}"
        elif hasattr(message, "request"):
            what = f"{message.request}/{message.attempt}"
        else:
            what = ""
        self._log.append(f"{self.now_ns} {receiver} {kind} {what}\n")
        if len(self._log) >= LOG_LINES_MAX:
            self._hash_log()

    def _hash_log(self) -> None:
        self._digest.update("".join(self._log).encode())
        self._log.clear()

    # ── workers ──────────────────────────────────────────────────────────────────────────────────

    def _add_worker(self, role: Role, index: int, *, slow: float | None = None) -> None:
        settings, host = self._settings, index % self._settings.hosts
        store = self._stores[host]
        name = f"{role[0]}{index:05}" + (f"-{self._came_count}" if self.now_ns else "")
        self._came_count += 1
        hello = Hello(
            worker=WorkerId(name),
            role=role,
            address=Address(HostId(f"h{host}"), f"/{name}", ""),
            store_id=StoreId(f"store-{host}"),
            store=Address(HostId(f"h{host}"), "/store", ""),
            namespace="00",
            block_tokens=self._trace.block_tokens,
            block_count=self._block_count(role),
            running_max=settings.running_max if settings.decode else UNLIMITED_BLOCKS,
            chunk_tokens=settings.chunk_tokens,
            pid=self._came_count,
            fetches=store is not None and store.fetches,
            store_has_disk=store is not None and store.has_disk,
        )
        worker = Worker(hello, settings, self, store, slow=slow or 1.0)
        self._workers[hello.worker] = self._places[role, index] = worker
        if self._neighbours:
            self._neighbours[host].add(worker, self.now_ns)
        self._carry_out(self._core.on_hello(hello, self.now_ns))

    def _block_count(self, role: Role) -> int:
        settings = self._settings
        limit = settings.cache_tokens if role is Role.PREFILL else settings.decode_tokens
        if limit is None or (role is Role.DECODE and not settings.decode):
            return UNLIMITED_BLOCKS
        return max(2, limit // self._trace.block_tokens)

    def _fail(self, now_ns: int, failure: Failure) -> None:
        if self._over:
            return
        worker = self._places[failure.role, failure.index]
        if isinstance(failure, Slowdown):
            if worker.alive:
                self._become_slow(worker, failure.factor, now_ns)
            return
        if not worker.alive:
            return
        self._die(worker, now_ns)
        if failure.role is Role.PREFILL:
            self._busy_ns += worker.engine.busy_ns
        if failure.back_after_ns is not None:
            self.at(now_ns + failure.back_after_ns, self._come_back, failure)
        self._carry_out(self._core.on_worker_lost(worker.hello.worker, now_ns))

    def _die(self, worker: Worker, now_ns: int) -> None:
        worker.die(now_ns)
        del self._workers[worker.hello.worker]
        if self._neighbours:
            self._neighbours[self._host_of(worker)].remove(worker, now_ns)

    def _become_slow(self, worker: Worker, slow: float, now_ns: int) -> None:
        if self._neighbours:
            self._neighbours[self._host_of(worker)].become_slow(worker, slow, now_ns)
        else:
            worker.become_slow(slow, now_ns)

    @staticmethod
    def _host_of(worker: Worker) -> int:
        return int(worker.hello.address.host[1:])

    def _come_back(self, _: int, death: Death) -> None:
        if not self._over:
            slow = self._places[death.role, death.index].engine.slow
            self._add_worker(death.role, death.index, slow=slow)

    def _scale(self, now_ns: int, pools: Pools) -> None:
        if not self._over:
            pools.look(now_ns)
            self.at(now_ns + pools.every_ns, self._scale, pools)

    def _join(self, role: Role) -> None:
        if not self._over:
            self._add_worker(role, self._came_count)

    def _retire(self, worker: Worker) -> None:
        """It has nothing left."""
        self._die(worker, self.now_ns)
        if worker.hello.role is Role.PREFILL:
            self._busy_ns += worker.engine.busy_ns
        self._carry_out(self._core.on_worker_lost(worker.hello.worker, self.now_ns, left=True))

    # ── chance, and what comes of it all ─────────────────────────────────────────────────────────

    def _service_factor(self) -> float:
        noise, factor = self._settings.noise, 1.0
        if noise.sigma:
            factor = math.exp(self._chance.gauss(-(noise.sigma**2) / 2, noise.sigma))
        if noise.lie_share and self._chance.random() < noise.lie_share:
            factor *= noise.lie_factor
        return factor

    def _output_tokens(self, request: RequestId) -> int:
        return self._jobs[int(request[1:])].target

    def _result(self) -> Result:
        self._hash_log()
        prefills = [w for w in self._workers.values() if w.hello.role is Role.PREFILL]
        busy_ns = self._busy_ns + sum(worker.engine.busy_ns for worker in prefills)
        worker_ns = max(1, self._settings.workers_of(Role.PREFILL)) * self.now_ns
        counters = dict(self._core.snapshot(self.now_ns).counters)
        if self._pools is not None:
            counters |= self._pools.counters(self.now_ns)
            worker_ns = self._pools.billed_ns[Role.PREFILL]
        engines = [worker.engine for worker in self._workers.values()]
        counters["simulated_events"] = self._event_count
        counters["simulated_busy_us"] = sum(engine.busy_ns for engine in engines) // US
        counters["simulated_steps"] = sum(engine.batch.steps for engine in engines)
        counters["simulated_prompt_tokens"] = sum(engine.tokens_computed for engine in engines)
        return Result(
            name=self._trace.name,
            **columns(self._jobs),
            span_s=self.now_ns / S,
            prefill_busy=busy_ns / max(1, worker_ns),
            counters=counters,
            samples=tuple(self._samples),
            decisions_sha256=self._digest.hexdigest(),
        )
