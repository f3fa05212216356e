"""The router's core: events in, commands out. Pure: time is an argument, chance plays no part.

Every event is first entered in the books (``state``), then ``planner`` says what can be done now.
Workers are the truth about what runs; gateways are the truth about what clients have received. So
when anything about an attempt becomes uncertain (a worker gone, blocks gone), the core forgets the
attempt and tells the gateway that it is *lost*: it comes back as the next attempt, with the tokens
the client has, and what reached the store makes its prefill short.

Events come over several connections, hence out of order between workers: decode may say that it
adopted a request before prefill says that it is done. A later event implies the earlier ones. What
cannot be true any more (an old attempt, a forgotten request) is counted and otherwise ignored; only
if a worker takes up an attempt that was given up, it is told so.

Counters: ``arrived`` = ``finished`` + ``refused`` + ``lost`` + ``cancelled`` + ``replaced`` + live.
"""

from pdserve import clock
from pdserve.clock import MS, S
from pdserve.config import RouterConfig
from pdserve.errors import DeadlineExceeded, ErrorInfo, PdserveError, QueueFull, WorkerLost
from pdserve.ids import RequestId, WorkerId
from pdserve.lifecycle import Event, Phase
from pdserve.messages import (
    Address,
    Cancel,
    ChunkDone,
    Goodbye,
    Handoff,
    Hello,
    Progress,
    Refused,
    Report,
    Request,
    Role,
    WorkerFailed,
)
from pdserve.router import planner
from pdserve.router.commands import Command, ToGateway, ToWorker
from pdserve.router.endings import drop, free_orphans, free_ticket, lose
from pdserve.router.fleet import Worker
from pdserve.router.snapshot import RouterSnapshot, snapshot_of
from pdserve.router.state import Entry, RouterState

__all__ = ["Command", "RouterCore", "ToGateway", "ToWorker"]

GATEWAY_GRACE_NS = 10 * S
"""How long requests of a gateway that hung up run on, in case it comes back."""

RETRY_MS_MIN = 50


class RouterCore:
    def __init__(self, settings: RouterConfig, *, unix_zero_ms: int | None = None) -> None:
        """
        Args:
            settings: levels, bounds and limits.
            unix_zero_ms: wall time at the instant 0 of ``now_ns``, by which deadlines are turned
                into instants; None takes it from this host's clocks, once.
        """
        if unix_zero_ms is None:
            unix_zero_ms = clock.unix_ms() - clock.monotonic() // MS
        self.state = RouterState(settings, unix_zero_ms=unix_zero_ms)
        self._gone_gateways: dict[Address, int] = {}  # until when their requests run on

    # ── gateways ─────────────────────────────────────────────────────────────────────────────────

    def on_submit(self, request: Request, now_ns: int) -> list[Command]:
        self._gone_gateways.pop(request.reply_to, None)
        known = self.state.entries.get(request.request)
        if known is not None and known.request.attempt >= request.attempt:
            self.state.counters["stale_submits"] += 1  # sent again after we seemed to be gone
            return []
        commands = [] if known is None else drop(self.state, known, Event.CLIENT_GONE, "replaced")
        self.state.counters["arrived"] += 1
        refusal = self._refusal(request, now_ns)
        if refusal is None:
            self.state.admit(request, now_ns)
        else:
            self.state.counters["refused"] += 1
            commands.append(_refused(request, refusal))
        return commands + planner.plan(self.state, now_ns)

    def on_cancel(self, request: RequestId, now_ns: int) -> list[Command]:
        entry = self.state.entries.get(request)
        if entry is None:
            self.state.counters["stale_cancels"] += 1
            return []
        self._gone_gateways.pop(entry.request.reply_to, None)
        return drop(self.state, entry, Event.CLIENT_GONE, "cancelled") + planner.plan(
            self.state, now_ns
        )

    def on_gateway_hello(self, gateway: Address, now_ns: int) -> list[Command]:
        """It is back: its requests run on without a limit."""
        self._gone_gateways.pop(gateway, None)
        return planner.plan(self.state, now_ns)

    def on_gateway_lost(self, gateway: Address, now_ns: int) -> list[Command]:
        """Its requests run on for a grace; ``on_tick`` ends them unless it has come back."""
        self._gone_gateways[gateway] = now_ns + GATEWAY_GRACE_NS
        return []

    def _refusal(self, request: Request, now_ns: int) -> PdserveError | None:
        state, settings = self.state, self.state.settings
        if request.attempt >= settings.attempts_max:
            return WorkerLost(
                f"attempt {request.attempt} of {settings.attempts_max}: workers died under every "
                "one; see `pdserve status`, and try again"
            )
        if state.deadline_ns(request) <= now_ns:
            return DeadlineExceeded("the deadline had passed when the request arrived")
        # A second attempt has begun to answer: it is never turned away. There are no more of
        # those than requests that ran at once.
        if request.attempt == 0 and len(state.queue) >= settings.waiting_max:
            workers = max(1, len(state.fleet.of(Role.PREFILL)))
            retry_after_ms = max(RETRY_MS_MIN, state.queued_work_ns // workers // MS)
            return QueueFull(
                f"{len(state.queue)} requests wait already, waiting_max is "
                f"{settings.waiting_max}; try again in {retry_after_ms} ms",
                retry_after_ms=retry_after_ms,
            )
        return None

    # ── workers ──────────────────────────────────────────────────────────────────────────────────

    def on_hello(self, hello: Hello, now_ns: int) -> list[Command]:
        """A worker is there, for the first time or again.

        What was on its way while the connection was down may be gone, so requests we believed
        there are lost; and should it still run them, it is told to stop.
        """
        commands: list[Command] = []
        known = self.state.fleet.get(hello.worker)
        if known is not None:
            held = [self.state.entries[request].request for request in known.held]
            commands = self._forget_worker(known)
            commands += [ToWorker(known.id, Cancel(r.request, r.attempt)) for r in held]
        self.state.fleet.add(hello, now_ns)
        commands += free_orphans(self.state)
        return commands + planner.plan(self.state, now_ns)

    def on_report(self, report: Report, now_ns: int) -> list[Command]:
        worker = self._heard(report.worker, now_ns)
        if worker is None:
            return []
        self.state.fleet.apply(report, worker)
        for chunk in report.chunks:
            self._on_chunk(worker, chunk)
        commands: list[Command] = []
        for progress in report.progress:
            commands += self._on_progress(worker, progress, now_ns)
        commands += planner.plan(self.state, now_ns)
        if worker.draining and not worker.held:
            commands.append(ToWorker(worker.id, Goodbye(worker.id)))
        return commands

    def on_parked(self, handoff: Handoff, worker: WorkerId, now_ns: int) -> list[Command]:
        decode = self._heard(worker, now_ns)
        if decode is None:
            return []
        request = handoff.request
        entry = self._entry(request.request, request.attempt)
        if entry is None or entry.decode != worker:
            self.state.counters["stale_events"] += 1
            return free_ticket(self.state, handoff)
        self._imply(entry, Event.PARKED)
        self.state.park(entry, handoff)
        return planner.plan(self.state, now_ns)

    def on_failed(self, failed: WorkerFailed, worker: WorkerId, now_ns: int) -> list[Command]:
        if self._heard(worker, now_ns) is None:
            return []
        entry = self._entry(failed.request, failed.attempt)
        if entry is None or worker not in _may_fail(entry):
            self.state.counters["stale_events"] += 1
            return []
        self.state.counters["worker_failures"] += 1
        return lose(self.state, entry, worker) + planner.plan(self.state, now_ns)

    def on_worker_lost(self, worker: WorkerId, now_ns: int) -> list[Command]:
        known = self.state.fleet.get(worker)
        if known is None:
            return []
        commands = self._forget_worker(known) + self._lose_storeless()
        return commands + planner.plan(self.state, now_ns)

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    def on_tick(self, now_ns: int) -> list[Command]:
        """Deadlines, silent workers, gateways that did not come back."""
        commands: list[Command] = []
        for request in self.state.deadlines.due(now_ns):
            entry = self.state.entries[request]
            error = DeadlineExceeded(f"the deadline passed while the request was {entry.phase}")
            commands += drop(self.state, entry, Event.GAVE_UP, "refused")
            commands.append(_refused(entry.request, error))
            self.state.counters["deadlines_passed"] += 1
        for worker in self.state.fleet.all():
            if worker.last_heard_ns + self._silence_ns <= now_ns:
                self.state.counters["workers_silent"] += 1
                commands += self._forget_worker(worker) + self._lose_storeless()
        for gateway in [g for g, until_ns in self._gone_gateways.items() if until_ns <= now_ns]:
            del self._gone_gateways[gateway]
            for entry in list(self.state.entries.values()):
                if entry.request.reply_to == gateway:
                    commands += drop(self.state, entry, Event.CLIENT_GONE, "cancelled")
        return commands + planner.plan(self.state, now_ns)

    def next_tick_ns(self) -> int | None:
        """When ``on_tick`` has something to do, unless an event comes first; None: never."""
        deadline_ns = self.state.deadlines.next_ns()
        instants = [] if deadline_ns is None else [deadline_ns]
        instants += [w.last_heard_ns + self._silence_ns for w in self.state.fleet.all()]
        instants += self._gone_gateways.values()
        return min(instants, default=None)

    def snapshot(self, now_ns: int) -> RouterSnapshot:
        return snapshot_of(self.state, now_ns)

    @property
    def _silence_ns(self) -> int:
        return self.state.settings.worker_silence_ms * MS

    # ── what workers report ──────────────────────────────────────────────────────────────────────

    def _heard(self, worker: WorkerId, now_ns: int) -> Worker | None:
        known = self.state.fleet.get(worker)
        if known is None:
            self.state.counters["stale_events"] += 1  # taken for lost; it has to say hello again
        else:
            known.last_heard_ns = now_ns
        return known

    def _entry(self, request: RequestId, attempt: int) -> Entry | None:
        entry = self.state.entries.get(request)
        return entry if entry is not None and entry.request.attempt == attempt else None

    def _on_chunk(self, worker: Worker, chunk: ChunkDone) -> None:
        entry = self._entry(chunk.request, chunk.attempt)
        if entry is None or entry.prefill != worker.id:
            self.state.counters["stale_events"] += 1
            return
        tokens = chunk.computed_tokens - max(entry.computed_tokens, entry.cached_tokens)
        # The first chunk begins where the cached prefix really ended, which only the worker knows:
        # what cannot have been one chunk is no measurement.
        if 0 < tokens <= worker.hello.chunk_tokens and chunk.elapsed_us > 0:
            worker.rate.observe(tokens, chunk.elapsed_us)
            self.state.fleet.rate.observe(tokens, chunk.elapsed_us)
        self.state.computed(entry, chunk)

    def _on_progress(self, worker: Worker, progress: Progress, now_ns: int) -> list[Command]:
        entry = self._entry(progress.request, progress.attempt)
        if entry is None or worker.id not in (entry.prefill, entry.decode):
            if progress.event is Event.ADOPTED:
                return self._unwanted(worker, progress.request, progress.attempt)
            self.state.counters["stale_events"] += 1
            return []
        at_prefill = worker.id == entry.prefill
        match progress.event:
            case Event.PREEMPTED if at_prefill:
                self._on_preempted(entry, progress, now_ns)
            case Event.PREFILL_DONE if at_prefill:
                self.state.prefill_done(entry)
            case Event.ADOPTED if not at_prefill and entry.phase is not Phase.DECODING:
                self._imply(entry, Event.ADOPTED)
                self.state.adopt(entry)
            case Event.ENDED:
                if not at_prefill:
                    self._imply(entry, Event.ENDED)
                self.state.leave(entry, Event.ENDED, "finished")
            case _:
                self.state.counters["stale_events"] += 1
        return []

    def _on_preempted(self, entry: Entry, progress: Progress, now_ns: int) -> None:
        if entry.chunk_seen or progress.computed_tokens > 0:
            entry.preempted_count += 1
            self.state.counters["preemptions"] += 1
        else:
            self.state.counters["handed_back"] += 1  # before it began
        entry.computed_tokens = max(entry.computed_tokens, progress.computed_tokens)
        self.state.requeue(entry, now_ns)

    def _imply(self, entry: Entry, event: Event) -> None:
        """Enter what must have come before decode's ``event``, though prefill's word is late."""
        if entry.phase is Phase.PREFILLING:
            self.state.prefill_done(entry)
        if entry.phase is Phase.HANDING_OFF and event is Event.ENDED:
            self.state.adopt(entry)

    def _unwanted(self, worker: Worker, request: RequestId, attempt: int) -> list[Command]:
        """A worker took up an attempt that is not its own to have; one given up is stopped."""
        self.state.counters["stale_events"] += 1
        entry = self.state.entries.get(request)
        if entry is None or attempt < entry.request.attempt:
            return [ToWorker(worker.id, Cancel(request, attempt))]
        return []

    # ── ways out ─────────────────────────────────────────────────────────────────────────────────

    def _forget_worker(self, worker: Worker) -> list[Command]:
        commands: list[Command] = []
        for request in list(worker.held):
            commands += lose(self.state, self.state.entries[request], worker.id)
        self.state.fleet.remove(worker)
        return commands

    def _lose_storeless(self) -> list[Command]:
        """Parked requests whose blocks lie where no worker is left to reach them for us."""
        commands: list[Command] = []
        for request in list(self.state.parked):
            entry = self.state.entries[request]
            handoff = entry.handoff
            assert handoff is not None
            if not self.state.fleet.has_store(handoff.store):
                commands += lose(self.state, entry, handoff.route.decode)
        return commands


def _may_fail(entry: Entry) -> tuple[WorkerId | None, ...]:
    """Whose failure ends this attempt: until decode has it, also who hands it over."""
    handing_off = entry.phase is Phase.HANDING_OFF
    return (entry.prefill, entry.decode, entry.prefilled_by if handing_off else None)


def _refused(request: Request, error: PdserveError) -> Command:
    refused = Refused(request.request, request.attempt, ErrorInfo.of(error))
    return ToGateway(request.reply_to, refused)
