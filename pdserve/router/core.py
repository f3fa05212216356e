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

from collections import Counter
from collections.abc import Callable

from pdserve import clock
from pdserve.clock import MS, US, S
from pdserve.errors import ConfigError, DeadlineExceeded, ErrorInfo, PdserveError
from pdserve.ids import RequestId, WorkerId
from pdserve.lifecycle import Event, Phase
from pdserve.messages import (
    Address,
    Cancel,
    ChunkDone,
    FetchAhead,
    Goodbye,
    Handoff,
    Hello,
    Progress,
    Refused,
    Report,
    Request,
    WorkerFailed,
)
from pdserve.prompt_tasks import Scoring
from pdserve.router import duties, parking, planner
from pdserve.router.admission import Admission, candidates
from pdserve.router.bindings import binding_of
from pdserve.router.commands import Command, ToGateway, ToWorker
from pdserve.router.costs import CostModel, believed
from pdserve.router.decode_orders import decode_order_of
from pdserve.router.duties import Duty
from pdserve.router.ended import EndedBook
from pdserve.router.endings import (
    drop,
    fail,
    free_orphans,
    free_ticket,
    lose_storeless,
    lose_with,
)
from pdserve.router.entry import Entry
from pdserve.router.goals import GoalControl
from pdserve.router.orders.base import Order
from pdserve.router.orders.skip_join import SkipJoin
from pdserve.router.orders.table import order_of
from pdserve.router.scaling import Observation
from pdserve.router.signals import observation_of
from pdserve.router.slot_arrays import slots_of
from pdserve.router.snapshot import RouterSnapshot, snapshot_of
from pdserve.router.state import RouterState
from pdserve.router.worker import Worker
from pdserve.router_config import RouterConfig

__all__ = ["Command", "RouterCore", "ToGateway", "ToWorker"]

GATEWAY_GRACE_NS = 10 * S
"""How long requests of a gateway that hung up run on, in case it comes back."""


DECODE_TAIL_RATIOS = {"mean": 3.0, "balanced": 1.25, "tail": 1.0, "slo": 1.25}
"""How much worse than first come, first served the slowest answers may be predicted to become."""


class RouterCore:
    def __init__(
        self,
        settings: RouterConfig,
        *,
        costs: CostModel | None = None,
        oracle: Callable[[RequestId], int] | None = None,
        unix_zero_ms: int | None = None,
    ) -> None:
        """
        Args:
            settings: levels, bounds and limits.
            costs: predicted times of prefills, steps and moves; None: learned as it goes.
            oracle: how many tokens a request will generate, for ``decode_policy: oracle`` alone.
            unix_zero_ms: wall time at the instant 0 of ``now_ns``, by which deadlines are turned
                into instants; None takes it from this host's clocks, once.
        """
        if unix_zero_ms is None:
            unix_zero_ms = clock.steady_unix_ms() - clock.monotonic() // MS
        costs = believed(settings.prefill_tokens_per_s) if costs is None else costs
        self._goal = GoalControl(settings)
        self.state = RouterState(
            settings,
            costs,
            new_order=lambda counters: self._new_order(settings, costs, counters),
            decode_order=decode_order_of(
                settings.decode_policy,
                costs,
                moves_max=settings.preempted_max,
                tail_ratio=DECODE_TAIL_RATIOS[settings.goal],
            ),
            oracle=oracle,
            unix_zero_ms=unix_zero_ms,
        )
        self._admission = Admission()
        self._binding = binding_of(
            settings.placement, costs, stale_ns=round(settings.placement_stale_ms * MS)
        )
        self._some_disk = False  # below the store of a worker, now or earlier
        self._gone_gateways: dict[Address, int] = {}  # until when their requests run on
        self._ended = EndedBook()

    def _new_order(self, settings: RouterConfig, costs: CostModel, counters: Counter[str]) -> Order:
        if settings.policy in ("skip_join", "fcfs"):
            return SkipJoin(settings, self._goal.gamma_per_s, counters)
        return order_of(settings, costs)

    # ── gateways ─────────────────────────────────────────────────────────────────────────────────

    def on_submit(self, request: Request, now_ns: int) -> list[Command]:
        self._gone_gateways.pop(request.reply_to, None)
        known = self.state.entries.get(request.request)
        if known is not None and known.request.attempt >= request.attempt:
            self.state.counters["stale_submits"] += 1  # sent again after we seemed to be gone
            return []
        commands = (
            [] if known is None else drop(self.state, known, Event.CLIENT_GONE, "replaced", now_ns)
        )
        self.state.counters["arrived"] += 1
        refusal = self._admission.refusal(self.state, request, now_ns)
        if refusal is None:
            self._admit(request, now_ns)
        else:
            self.state.counters["refused"] += 1
            commands.append(_refused(request, refusal))
        commands += planner.plan(self.state, now_ns)
        return commands + self._fetch_ahead(request)

    def _fetch_ahead(self, request: Request) -> list[Command]:
        """A prompt that waits, and of which some store knows a prefix: one that has a disk may
        bring it up meanwhile. Which of several will compute the prompt is not decided yet."""
        entry = self.state.entries.get(request.request)
        if not self._some_disk or entry is None or entry.phase is not Phase.QUEUED:
            return []
        fleet = self.state.fleet
        hits = fleet.hits(request.block_keys)
        blocks, workers = hits[-1] if hits else (0, 0)
        for slot in slots_of(workers):
            worker = fleet.at(int(slot))
            if blocks and worker.hello.store_has_disk:
                message = FetchAhead(request.block_keys[:blocks], request.tenant)
                return [ToWorker(worker.id, message)]
        return []

    def _admit(self, request: Request, now_ns: int) -> None:
        entry = self.state.admit(request, now_ns)
        entry.shadow_job = self._goal.arrived(now_ns, entry.work_ns)
        self.state.enqueue(entry, self._bind(entry, now_ns), now_ns)

    def _bind(self, entry: Entry, now_ns: int) -> WorkerId | None:
        """The prefill worker it has to wait for, where placement does not wait."""
        if self._binding is None:
            return None
        found = candidates(self.state, entry)
        return self._binding.choose(entry.id, found, now_ns) if found else None

    def _bind_again(self, worker: WorkerId, now_ns: int) -> None:
        """Those who wait for that worker had better wait for another."""
        for entry in list(self.state.lines.own(worker).ranked(now_ns)):
            self.state.unbind(entry)
            self.state.enqueue(entry, self._bind(entry, now_ns), now_ns)

    def on_cancel(self, request: RequestId, now_ns: int) -> list[Command]:
        entry = self.state.entries.get(request)
        if entry is None:
            self.state.counters["stale_cancels"] += 1
            return []
        self._gone_gateways.pop(entry.request.reply_to, None)
        commands = drop(self.state, entry, Event.CLIENT_GONE, "cancelled", now_ns)
        return commands + planner.plan(self.state, now_ns)

    def on_gateway_hello(self, gateway: Address, now_ns: int) -> list[Command]:
        """It is back: its requests run on without a limit."""
        self._gone_gateways.pop(gateway, None)
        return planner.plan(self.state, now_ns)

    def on_gateway_lost(self, gateway: Address, now_ns: int) -> list[Command]:
        """Its requests run on for a grace; ``on_tick`` ends them unless it has come back."""
        self._gone_gateways[gateway] = now_ns + GATEWAY_GRACE_NS
        return []

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
            commands = self._forget_worker(known, now_ns, left=True)
            commands += [ToWorker(known.id, Cancel(r.request, r.attempt)) for r in held]
        come = self.state.fleet.add(hello, now_ns)
        duties.relieve(self.state, come, now_ns)
        self._some_disk = self._some_disk or hello.store_has_disk
        self._count_workers()
        commands += free_orphans(self.state)
        return commands + planner.plan(self.state, now_ns)

    def on_report(self, report: Report, now_ns: int) -> list[Command]:
        worker = self._heard(report.worker, now_ns)
        if worker is None:
            return []
        was_draining = worker.draining
        self.state.fleet.apply(report, worker)
        if worker.draining != was_draining:
            self._count_workers()
        for chunk in report.chunks:
            self._on_chunk(worker, chunk, now_ns)
        for attained in report.attained:
            entry = self._entry(attained.request, attained.attempt)
            if entry is None:
                continue
            if worker.id not in entry.vouched_by:
                entry.vouched_by = (*entry.vouched_by, worker.id)
            if entry.decode == worker.id:
                self.state.attained(entry, worker, attained.generated_tokens)
        commands: list[Command] = []
        for progress in report.progress:
            commands += self._on_progress(worker, progress, now_ns)
        self.state.fleet.changed(worker)
        if self._binding is not None and (worker.draining or not worker.prefills):
            self._bind_again(worker.id, now_ns)  # also what it has just handed back
        if report.store_added:
            self.state.blocks_came(report.store_added, now_ns)
        if report.blocks_added and worker.prefills:
            self.state.blocks_came(report.blocks_added, now_ns)
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
        self._imply(entry, Event.PARKED, now_ns)
        self.state.park(entry, handoff, now_ns)
        return planner.plan(self.state, now_ns)

    def on_failed(self, failed: WorkerFailed, worker: WorkerId, now_ns: int) -> list[Command]:
        if self._heard(worker, now_ns) is None:
            return []
        entry = self._entry(failed.request, failed.attempt)
        if entry is None or worker not in _may_fail(entry):
            self.state.counters["stale_events"] += 1
            return self._ended.undelivered(failed.request, failed.attempt, worker)
        self.state.counters["worker_failures"] += 1
        commands = fail(self.state, entry, failed, worker, now_ns)
        return commands + planner.plan(self.state, now_ns)

    def on_worker_lost(self, worker: WorkerId, now_ns: int, *, left: bool = False) -> list[Command]:
        """``left``: it said goodbye, and hung up."""
        known = self.state.fleet.get(worker)
        if known is None:
            return []
        commands = self._forget_worker(known, now_ns, left=left)
        commands += lose_storeless(self.state, now_ns)
        if not left:
            self._stand_in(known)
        return commands + planner.plan(self.state, now_ns)

    def knows(self, worker: WorkerId) -> bool:
        """False after it was taken for lost: what it says is ignored until it says hello again."""
        return self.state.fleet.get(worker) is not None

    def assign(self, worker: WorkerId, duty: Duty, now_ns: int) -> list[Command]:
        """Give a live worker another role; what it has of the former one moves elsewhere.

        Raises:
            ConfigError: it is not there, or nobody else would be left to do what it did.
        """
        known = self.state.fleet.get(worker)
        if known is None:
            there = ", ".join(other.id for other in self.state.fleet.all())
            raise ConfigError(
                f"worker is {worker!r}, which is not there; there are {there or 'none'}"
            )
        duties.assign(self.state, known, duty, now_ns)
        self._count_workers()
        if self._binding is not None and not known.prefills:
            self._bind_again(worker, now_ns)
        return planner.plan(self.state, now_ns)

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    def on_tick(self, now_ns: int) -> list[Command]:
        """Deadlines, silent workers, gateways that did not come back."""
        commands: list[Command] = []
        for request in self.state.deadlines.due(now_ns):
            entry = self.state.entries[request]
            error = DeadlineExceeded(f"the deadline passed while the request was {entry.phase}")
            commands += drop(self.state, entry, Event.GAVE_UP, "refused", now_ns)
            commands.append(_refused(entry.request, error))
            self.state.counters["deadlines_passed"] += 1
        for request in self.state.patience.due(now_ns):
            entry = self.state.entries[request]
            too_old = self._admission.too_old(self.state, entry, now_ns)
            commands += drop(self.state, entry, Event.GAVE_UP, "refused", now_ns)
            commands.append(_refused(entry.request, too_old))
            self.state.counters["shed_by_age"] += 1
        for worker in self.state.fleet.silent(self._silence_ns, now_ns):
            self.state.counters["workers_silent"] += 1
            # Silence is no death: it accuses nobody (``suspicion``).
            commands += self._forget_worker(worker, now_ns, left=True)
            commands += lose_storeless(self.state, now_ns)
            self._stand_in(worker)
        for gateway in [g for g, until_ns in self._gone_gateways.items() if until_ns <= now_ns]:
            del self._gone_gateways[gateway]
            for entry in list(self.state.entries.values()):
                if entry.request.reply_to == gateway:
                    commands += drop(self.state, entry, Event.CLIENT_GONE, "cancelled", now_ns)
        self._steer(now_ns)
        return commands + planner.plan(self.state, now_ns)

    def _steer(self, now_ns: int) -> None:
        """Turn the boost a little further to the operator's goal."""
        if self._goal.tick(now_ns):
            for order in self.state.lines.all():
                if isinstance(order, SkipJoin):
                    order.set_gamma(self._goal.gamma_per_s)

    def slept(self, elapsed_ns: int) -> None:
        """Nobody was heard for so long because nobody listened."""
        self.state.fleet.excuse(elapsed_ns)

    def next_tick_ns(self) -> int | None:
        """When ``on_tick`` has something to do, unless an event comes first; None: never."""
        deadline_ns = self.state.deadlines.next_ns()
        instants = [] if deadline_ns is None else [deadline_ns]
        if (patience_ns := self.state.patience.next_ns()) is not None:
            instants.append(patience_ns)
        if self.state.fleet.all():
            instants.append(self.state.fleet.heard_all_ns + self._silence_ns)
        instants += self._gone_gateways.values()
        instants += [ns for ns in (self._goal.due_ns(), self.state.look_again_ns) if ns is not None]
        return min(instants, default=None)

    def snapshot(self, now_ns: int) -> RouterSnapshot:
        return snapshot_of(self.state, now_ns)

    def observation(self, now_ns: int) -> Observation:
        return observation_of(self.state, now_ns)

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

    def _on_chunk(self, worker: Worker, chunk: ChunkDone, now_ns: int) -> None:
        entry = self._entry(chunk.request, chunk.attempt)
        if entry is None or entry.prefill != worker.id:
            self.state.counters["stale_events"] += 1
            return
        before = max(entry.computed_tokens, entry.cached_tokens)
        tokens = chunk.computed_tokens - before
        # The first chunk begins where the cached prefix really ended, which only the worker knows:
        # what cannot have been one chunk is no measurement. Scores take a time of their own.
        is_plain = not isinstance(entry.request.task, Scoring)
        if is_plain and 0 < tokens <= worker.chunk_tokens and chunk.elapsed_us > 0:
            is_first = worker.prompts[entry.id].is_new
            predicted_ns = self.state.fleet.costs.chunk_ns(tokens, before, is_first=is_first)
            worker.correction.observe(predicted_ns, chunk.elapsed_us * US)
            self.state.fleet.correction.observe(predicted_ns, chunk.elapsed_us * US)
        self.state.computed(entry, chunk, worker, now_ns)

    def _on_progress(self, worker: Worker, progress: Progress, now_ns: int) -> list[Command]:
        entry = self._entry(progress.request, progress.attempt)
        if entry is None or worker.id not in (entry.prefill, entry.decode):
            if progress.event is Event.ADOPTED:
                return self._unwanted(worker, progress.request, progress.attempt)
            self.state.counters["stale_events"] += 1
            return []
        at_prefill = worker.id == entry.prefill
        at_decode = worker.id == entry.decode
        match progress.event:
            case Event.PREEMPTED if at_prefill:
                self._on_preempted(entry, progress, now_ns)
            case Event.PREFILL_DONE if at_prefill:
                self.state.prefill_done(entry, now_ns)
            case Event.ADOPTED if at_decode and entry.phase is not Phase.DECODING:
                self._imply(entry, Event.ADOPTED, now_ns)
                self.state.adopt(entry, now_ns)
            case Event.ENDED:
                if not at_prefill:
                    self._imply(entry, Event.ENDED, now_ns)
                    self._learn(entry, progress, now_ns)
                reply_to = entry.request.reply_to
                self._ended.note(entry.id, entry.request.attempt, worker.id, reply_to, now_ns)
                self.state.leave(entry, Event.ENDED, "finished", now_ns)
            case _:
                self.state.counters["stale_events"] += 1
        return []

    def _learn(self, entry: Entry, progress: Progress, now_ns: int) -> None:
        """From an answer that decode has ended."""
        generated_tokens = progress.total_tokens - entry.request.prompt_tokens
        if generated_tokens > 0:
            entry.generated_tokens = generated_tokens
            parking.finished(self.state, entry, now_ns)
            if entry.adopted_ns and not entry.parked_count and entry.request.attempt == 0:
                self._admission.answered(generated_tokens, now_ns - entry.adopted_ns)

    def _on_preempted(self, entry: Entry, progress: Progress, now_ns: int) -> None:
        if entry.begun or progress.computed_tokens > 0:
            entry.preempted_count += 1
            self.state.counters["preemptions"] += 1
        else:
            self.state.counters["handed_back"] += 1  # before it began
        entry.computed_tokens = max(entry.computed_tokens, progress.computed_tokens)
        self.state.requeue(entry, now_ns)

    def _imply(self, entry: Entry, event: Event, now_ns: int) -> None:
        """Enter what must have come before decode's ``event``, though prefill's word is late."""
        if entry.phase is Phase.PREFILLING:
            self.state.prefill_done(entry, now_ns)
        if entry.phase is Phase.HANDING_OFF and event is Event.ENDED:
            self.state.adopt(entry, now_ns)

    def _unwanted(self, worker: Worker, request: RequestId, attempt: int) -> list[Command]:
        """A worker took up an attempt that is not its own to have; one given up is stopped."""
        self.state.counters["stale_events"] += 1
        entry = self.state.entries.get(request)
        if entry is None or attempt < entry.request.attempt:
            return [ToWorker(worker.id, Cancel(request, attempt))]
        return []

    # ── ways out ─────────────────────────────────────────────────────────────────────────────────

    def _forget_worker(self, worker: Worker, now_ns: int, *, left: bool = False) -> list[Command]:
        """``left``: it lives, and died of nothing."""
        commands = lose_with(self.state, worker, self._ended, now_ns, died=not left)
        self.state.fleet.remove(worker)
        self._count_workers()
        if self._binding is not None:
            self._bind_again(worker.id, now_ns)
            self.state.lines.drop(worker.id)
        return commands

    def _stand_in(self, missing: Worker) -> None:
        duties.stand_in(self.state, missing)
        self._count_workers()

    def _count_workers(self) -> None:
        for order in self.state.lines.all():
            if isinstance(order, SkipJoin):
                order.set_workers(self.state.fleet.prefill_count)
        self._goal.set_workers(self.state.fleet.prefill_count)
        self._admission.set_workers(self.state.fleet.serving_count())


def _may_fail(entry: Entry) -> tuple[WorkerId | None, ...]:
    """Whose failure ends this attempt: until decode has it, also who hands it over."""
    handing_off = entry.phase is Phase.HANDING_OFF
    return (entry.prefill, entry.decode, entry.prefilled_by if handing_off else None)


def _refused(request: Request, error: PdserveError) -> Command:
    refused = Refused(request.request, request.attempt, ErrorInfo.of(error))
    return ToGateway(request.reply_to, refused)
