"""A cluster around the router's core: workers and one gateway that keep the protocol, and may die.

Every connection is a queue: commands to a worker, events from a worker, hand-offs from a prefill
worker to a decode worker. Whoever drives the cluster chooses which queue moves next, so events
arrive in every order that separate connections allow. Time passes only in ``pass_time``.

A worker of either role has prompts that it computes and streams that it decodes; which it is given
is the router's choice. A prompt whose route ends where it begins becomes a stream there.
"""

import contextlib
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any

from pdserve.clock import MS
from pdserve.errors import ConfigError, ErrorInfo
from pdserve.ids import RequestId, TicketId, WorkerId
from pdserve.lifecycle import Event, Phase
from pdserve.messages import (
    Attained,
    Cancel,
    ChunkDone,
    Dispatch,
    Handoff,
    Hello,
    Lost,
    Preempt,
    Progress,
    Refused,
    Report,
    Request,
    Resume,
    Role,
    Route,
    ServiceClass,
    WorkerFailed,
)
from pdserve.router import planner
from pdserve.router.core import Command, RouterCore, ToGateway, ToWorker
from pdserve.router.duties import Duty
from pdserve.router.worker import HELD_MAX
from pdserve.router_config import RouterConfig
from tests.unit.router import build

CHUNK_TOKENS = 32
POOL_BLOCKS = 24
RUNNING_MAX = 3
ATTAINED_EVERY = 3
"""Every so many reports say how far the streams are."""

Said = Report | Handoff | WorkerFailed


@dataclass(slots=True)
class Job:
    request: Request
    route: Route
    tokens: int  # a prompt: with KV; a stream: prompt and generated


@dataclass(slots=True)
class FakeWorker:
    hello: Hello
    inbox: deque[object] = field(default_factory=deque)
    outbox: deque[Said] = field(default_factory=deque)
    prompts: dict[RequestId, Job] = field(default_factory=dict)  # in the order they came
    streams: dict[RequestId, Job] = field(default_factory=dict)
    arriving: deque[Handoff] = field(default_factory=deque)  # not yet adopted
    preempted: set[RequestId] = field(default_factory=set)  # of the prompts
    draining: bool = False
    sequence: int = 0

    @property
    def jobs(self) -> list[Job]:
        return [*self.prompts.values(), *self.streams.values()]

    @property
    def used_blocks(self) -> int:
        return sum(-(-job.tokens // build.BLOCK_TOKENS) for job in self.streams.values())

    def say(self, *progress: Progress, chunks: tuple[ChunkDone, ...] = ()) -> None:
        running = min(1, len(self.prompts)) + len(self.streams)
        self.outbox.append(
            Report(
                worker=self.hello.worker,
                sequence=self.sequence,
                draining=self.draining,
                running=running,
                waiting=len(self.jobs) - running + len(self.arriving),
                free_blocks=max(0, POOL_BLOCKS - self.used_blocks),
                progress=progress,
                chunks=chunks,
                attained=() if self.sequence % ATTAINED_EVERY else self._attained(),
            )
        )
        self.sequence += 1

    def _attained(self) -> tuple[Attained, ...]:
        return tuple(
            Attained(job.request.request, job.request.attempt, _generated(job))
            for job in self.streams.values()
        )


class FakeCluster:
    def __init__(self, **settings: Any) -> None:
        """``settings`` of the router, beside those that make everything happen soon."""
        base = replace(
            build.settings(waiting_max=8),
            rescue_after_ms=100.0,
            rescue_ratio=1.0,
            rescue_share=0.5,
            preempt_ratio=0.01,
        )
        self.settings: RouterConfig = replace(base, **settings)
        self._tokens_of: dict[RequestId, int] = {}  # that a request will generate
        self.core = RouterCore(self.settings, oracle=self._tokens_of.__getitem__, unix_zero_ms=0)
        self.now_ns = 0
        self.workers: dict[str, FakeWorker] = {}
        self.wanted: dict[RequestId, Request] = {}  # the attempt the gateway waits for
        self.lost: deque[Request] = deque()  # to be submitted again
        self.tickets: set[TicketId] = set()  # of parked requests: their blocks are pinned
        self._born = 0

    # ── what a driver may do ─────────────────────────────────────────────────────────────────────

    def join(self, role: Role) -> None:
        name = f"{role[0]}{self._born}"
        self._born += 1
        said = build.hello(
            name, chunk_tokens=CHUNK_TOKENS, block_count=POOL_BLOCKS, running_max=RUNNING_MAX
        )
        self.workers[name] = FakeWorker(said)
        self._carry_out(self.core.on_hello(said, self.now_ns))

    def kill(self, worker: str) -> None:
        self._forget_tickets(self.workers.pop(worker))
        self._carry_out(self.core.on_worker_lost(WorkerId(worker), self.now_ns))

    def reconnect(self, worker: str) -> None:
        """What was on its way in either direction is gone."""
        self._forget_tickets(self.workers[worker])
        self.workers[worker].inbox.clear()
        self.workers[worker].outbox.clear()
        self._carry_out(self.core.on_hello(self.workers[worker].hello, self.now_ns))
        self.workers[worker].say()

    def submit(
        self,
        tokens: int,
        max_tokens: int,
        document: str,
        deadline_ms: int,
        *,
        tenant: str = "",
        service_class: ServiceClass = ServiceClass.STANDARD,
    ) -> None:
        name = f"r{self._born}"
        self._born += 1
        request = replace(
            build.request(
                name,
                tokens,
                max_tokens=max_tokens,
                document=document,
                deadline_ms=self.now_ns // MS + deadline_ms,
            ),
            tenant=tenant,
            service_class=service_class,
        )
        self.wanted[request.request] = request
        self._tokens_of[request.request] = max_tokens
        self._carry_out(self.core.on_submit(request, self.now_ns))

    def submit_again(self) -> None:
        request = self.lost.popleft()
        if request.request in self.wanted:
            again = replace(request, attempt=request.attempt + 1)
            self.wanted[request.request] = again
            self._carry_out(self.core.on_submit(again, self.now_ns))

    def cancel(self, request: RequestId) -> None:
        self.wanted.pop(request, None)
        self._carry_out(self.core.on_cancel(request, self.now_ns))

    def pass_time(self, elapsed_ms: int) -> None:
        self.now_ns += elapsed_ms * MS
        self._carry_out(self.core.on_tick(self.now_ns))

    def switch(self, worker: str, duty: Duty) -> None:
        with contextlib.suppress(ConfigError):  # the mode, or the last of its role
            self._carry_out(self.core.assign(WorkerId(worker), duty, self.now_ns))

    def obey(self, worker: str) -> None:
        """The worker reads its oldest command."""
        here = self.workers[worker]
        if not here.inbox:
            return
        match here.inbox.popleft():
            case Dispatch(request, route, _, _, ahead_of):
                line = list(here.prompts.items())
                places = (place for place, (other, _) in enumerate(line) if other == ahead_of)
                line.insert(next(places, len(line)), (request.request, Job(request, route, 0)))
                here.prompts = dict(line)
                here.say()
            case Resume(handoff):
                here.arriving.append(handoff)
            case Preempt(request, attempt, phase):
                self._yield(here, request, attempt, phase)
            case Cancel(request, attempt):
                for jobs in (here.prompts, here.streams):
                    job = jobs.get(request)
                    if job is not None and _stops(attempt, job.request):
                        del jobs[request]
                for handoff in [h for h in here.arriving if h.request.request == request]:
                    if _stops(attempt, handoff.request):
                        here.arriving.remove(handoff)
                        self.tickets.discard(handoff.ticket)
                here.say()

    def hear(self, worker: str) -> None:
        """The router reads the oldest event of the worker."""
        here = self.workers[worker]
        if not here.outbox:
            return
        match here.outbox.popleft():
            case Report() as report:
                commands = self.core.on_report(report, self.now_ns)
            case Handoff() as parked:
                commands = self.core.on_parked(parked, here.hello.worker, self.now_ns)
            case failed:
                commands = self.core.on_failed(failed, here.hello.worker, self.now_ns)
        self._carry_out(commands)

    def drain(self, worker: str) -> None:
        here = self.workers[worker]
        here.draining = True
        here.say()
        for job in list(here.streams.values()):
            self._park(here, job)
        for job in list(here.prompts.values()):
            if job.tokens == 0:
                self._hand_back(here, job)

    def fail(self, worker: str) -> None:
        """It cannot go on with its oldest job."""
        here = self.workers[worker]
        if here.jobs:
            request = here.jobs[0].request
            if here.prompts.pop(request.request, None) is None:
                del here.streams[request.request]
            error = ErrorInfo("block_missing", "gone")
            here.outbox.append(WorkerFailed(request.request, request.attempt, error))
            here.say()

    def work(self, worker: str) -> None:
        """One step: a token of each stream, and a chunk of a prompt."""
        here = self.workers[worker]
        self._decode(here)
        if here.prompts:
            self._prefill(here, next(iter(here.prompts.values())))

    # ── what workers do ──────────────────────────────────────────────────────────────────────────

    def _yield(self, here: FakeWorker, request: RequestId, attempt: int, phase: Phase) -> None:
        prompt, stream = here.prompts.get(request), here.streams.get(request)
        if phase is Phase.PREFILLING and prompt is not None and prompt.request.attempt == attempt:
            here.preempted.add(request)
            if request != next(iter(here.prompts)):
                self._hand_back(here, prompt)
        elif phase is Phase.DECODING and stream is not None and stream.request.attempt == attempt:
            self._park(here, stream)

    def _prefill(self, here: FakeWorker, job: Job) -> None:
        if job.request.request in here.preempted:
            self._hand_back(here, job)
            return
        total = len(job.request.tokens)
        job.tokens = min(job.tokens + CHUNK_TOKENS, total)
        request, attempt = job.request.request, job.request.attempt
        chunk = ChunkDone(request, attempt, job.tokens, elapsed_us=CHUNK_TOKENS * 1000)
        if job.tokens < total:
            here.say(chunks=(chunk,))
            return
        del here.prompts[request]
        if job.request.stop.max_tokens == 1:
            here.say(_progress(job, Event.ENDED), chunks=(chunk,))
            self.wanted.pop(request, None)
            return
        here.say(_progress(job, Event.PREFILL_DONE), chunks=(chunk,))
        if job.route.decode == here.hello.worker:
            self._keep(here, job)
        elif job.route.decode in self.workers:
            decode = self.workers[job.route.decode]
            handed = build.handoff(job.request, decode.hello)
            decode.arriving.append(replace(handed, route=job.route))

    def _keep(self, here: FakeWorker, job: Job) -> None:
        """It stays, with its first token."""
        job.tokens += 1
        here.streams[job.request.request] = job
        here.say(_progress(job, Event.ADOPTED))
        if here.draining:
            self._park(here, job)

    def _hand_back(self, here: FakeWorker, job: Job) -> None:
        here.prompts.pop(job.request.request)
        here.preempted.discard(job.request.request)
        event = Progress(job.request.request, job.request.attempt, Event.PREEMPTED, job.tokens)
        here.say(event)

    def _decode(self, here: FakeWorker) -> None:
        """Everybody gets a token; who finds no block for it is parked, the newest first."""
        for job in list(here.streams.values()):
            job.tokens += 1
            if _generated(job) >= job.request.stop.max_tokens:
                del here.streams[job.request.request]
                here.say(_progress(job, Event.ENDED))
                self.wanted.pop(job.request.request, None)
        while here.used_blocks > POOL_BLOCKS:
            self._park(here, here.streams[next(reversed(here.streams))])
        if here.arriving and len(here.streams) < RUNNING_MAX:
            handoff = here.arriving[0]
            job = Job(handoff.request, handoff.route, len(handoff.tokens))
            earlier = here.streams.get(job.request.request)
            if earlier is not None and earlier.request.attempt > job.request.attempt:
                self.tickets.discard(here.arriving.popleft().ticket)
            elif here.draining:
                here.arriving.popleft()
                here.outbox.append(handoff)
            elif here.used_blocks + -(-job.tokens // build.BLOCK_TOKENS) <= POOL_BLOCKS:
                self.tickets.discard(here.arriving.popleft().ticket)
                here.streams[job.request.request] = job
                here.say(_progress(job, Event.ADOPTED))

    def _park(self, here: FakeWorker, job: Job) -> None:
        del here.streams[job.request.request]
        parked = build.handoff(job.request, here.hello, tokens=job.tokens)
        self._born += 1
        parked = replace(parked, ticket=TicketId(f"t{self._born}"))
        self.tickets.add(parked.ticket)
        here.outbox.append(parked)
        here.say()

    def _forget_tickets(self, here: FakeWorker) -> None:
        """What it was about to say or to take up cannot be asked of it any more."""
        for message in (*here.inbox, *here.outbox):
            if isinstance(message, Resume):
                self.tickets.discard(message.handoff.ticket)
            elif isinstance(message, Handoff):
                self.tickets.discard(message.ticket)
        if here.hello.worker not in self.workers:
            self.tickets -= {handoff.ticket for handoff in here.arriving}

    # ── what the shell does ──────────────────────────────────────────────────────────────────────

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case ToWorker(worker, message):
                    if worker in self.workers:
                        self.workers[worker].inbox.append(message)
                case ToGateway(_, Refused(request, attempt, _)):
                    if request in self.wanted and self.wanted[request].attempt == attempt:
                        del self.wanted[request]
                case ToGateway(_, Lost(request, attempt, _)):
                    if request in self.wanted and self.wanted[request].attempt == attempt:
                        self.lost.append(self.wanted[request])

    # ── what must be true ────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        state = self.core.state
        state.check()
        assert planner.plan(state, self.now_ns) == [], "something could have been done"
        next_ns = self.core.next_tick_ns()
        assert next_ns is None or next_ns > self.now_ns, "a tick is due that does nothing"
        counters = state.counters
        ends = ("finished", "refused", "lost", "cancelled", "replaced")
        assert counters["arrived"] == sum(counters[end] for end in ends) + len(state.entries)
        for worker in state.fleet.all():
            if worker.id in state.vacating:
                continue
            assert len(worker.prompts) <= (HELD_MAX if worker.prefills else 0)
            assert len(worker.streams) <= (RUNNING_MAX if worker.decodes else 0)
        self._check_nobody_waits_beside_idle_workers()
        running = Counter(
            (job.request.request, job.request.attempt)
            for worker in self.workers.values()
            for job in worker.jobs
        )
        for entry in state.entries.values():
            assert running[entry.id, entry.request.attempt] <= 1, f"{entry.id} runs twice"

    def _check_nobody_waits_beside_idle_workers(self) -> None:
        """But for those who were bound on arrival, or wait for a better worker for a moment."""
        state = self.core.state
        idle = {
            role: [
                w
                for w in state.fleet.of(role)
                if not w.held and w.running + w.waiting == 0 and not w.draining and not w.rests
            ]
            for role in Role
        }
        can_start = any(w.prefills for w in idle[Role.DECODE])  # unless its role is to decode alone
        if self.settings.mode == "disaggregated":
            can_start = bool(idle[Role.DECODE] and idle[Role.PREFILL])
        waiting = [entry for entry in state.entries.values() if entry.phase is Phase.QUEUED]
        eager = [e for e in waiting if e.deferred_ns is None and e.bound_to is None]
        assert not (can_start and eager), "idle workers, and somebody waits"

    def settle(self) -> None:
        """Let everything come to its end; then nothing may be left of it."""
        for role in Role:
            there = self.core.state.fleet.of(role)
            if all(self.workers[worker.id].draining or worker.rests for worker in there):
                self.join(role)
        for _ in range(10_000):
            while self.lost:
                self.submit_again()
            for worker in list(self.workers):
                self.obey(worker)
                self.work(worker)
                self.hear(worker)
            self.pass_time(1)
            self.check()
            if not self.core.state.entries and not self._busy():
                break
        assert not self.core.state.entries, "something never ends"
        assert not self.wanted, "the gateway waits for something that nobody knows of"
        assert not self.tickets, "blocks of parked requests stay pinned for ever"
        for known in self.core.state.fleet.all():
            assert (len(known.held), known.reserved_blocks, known.context_tokens) == (0, 0, 0)
        self.pass_time(2000)
        assert not self.core.state.vacating

    def _busy(self) -> bool:
        return any(w.inbox or w.outbox or w.jobs or w.arriving for w in self.workers.values())


def _stops(attempt: int | None, request: Request) -> bool:
    return attempt is None or request.attempt <= attempt


def _generated(job: Job) -> int:
    return job.tokens - job.request.prompt_tokens


def _progress(job: Job, event: Event) -> Progress:
    request = job.request
    return Progress(request.request, request.attempt, event, total_tokens=job.tokens)
