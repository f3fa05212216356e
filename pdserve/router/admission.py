"""What is turned away, on arrival or never: once a prefill has begun, its request is served.

Refused are requests

    poisonous   whose workers died of them (``suspicion``)
    hopeless    whose deadline has passed, or whose attempts are used up
    too many    for which there is no place to wait, or whose tenant has more than its share of
                the places while others wait
    too late    whose first token is predicted to come after their deadline, or later than the
                bound of their class; who waits longer than predicted is refused by its age

The prediction is the work that would go before it, over the pace at which the queue moves
(``overload``). So that a full queue does not flap, refusing goes on until the prediction is well
below the limit. ``BATCH`` work waits as long as its deadline allows. Whoever has been refused
before and asks again goes first when load is shed: admitting a storm of retries is what keeps an
overloaded service from ever answering anybody in time.
"""

from typing import Final

from pdserve.clock import MS, S
from pdserve.errors import (
    CapacityError,
    DeadlineExceeded,
    PdserveError,
    QueueFull,
    RateLimited,
    WorkerLost,
)
from pdserve.messages import Request, ServiceClass
from pdserve.router.bindings import Candidate
from pdserve.router.entry import Entry
from pdserve.router.orders.skip_join import SkipJoin
from pdserve.router.overload import RETURN_MS_MIN, Answers, Pace, Returns
from pdserve.router.placement import usable_tokens
from pdserve.router.state import RouterState

RETRY_MS_MIN = RETURN_MS_MIN

RESUME_RATIO = 0.8
"""Of the bound: refusing ends where the prediction is below so much of it."""

RETRIED_RATIO = 0.5
"""Of every bound: what is left of it to a client that has asked before."""

CROWDED_RATIO = 0.5
"""Of the places to wait: from there on a tenant is held to its share, if others wait too."""

CHECK_NS: Final = 5 * S
"""What is predicted to be late is let in all the same, if nobody is served and nobody has been let
in for so long: else a cost that was learned on a bad day would refuse everybody for ever."""

OBVIOUS_RATIO = 0.25
"""Of a bound: what is below by far need not be predicted with care."""


class Admission:
    def __init__(self) -> None:
        self._shedding: set[ServiceClass] = set()
        self._pace = Pace()
        self._returns = Returns()
        self._answers = Answers()
        self._admitted_ns: int | None = None  # the last one was let in, or the first one came
        self.set_workers(0)  # nobody has come yet

    def set_workers(self, count: int) -> None:
        """So many begin prompts now."""
        self._pace.set_workers(count)

    def answered(self, tokens: int, elapsed_ns: int) -> None:
        """An answer has ended that took so long to decode."""
        self._answers.ended(tokens, elapsed_ns)

    def refusal(self, state: RouterState, request: Request, now_ns: int) -> PdserveError | None:
        settings = state.settings
        self._pace.observe(len(state.lines), state.computed_work_ns, now_ns)
        if request.attempt >= settings.attempts_max:
            return WorkerLost(
                f"attempt {request.attempt} of {settings.attempts_max}: workers died under every "
                "one; see `pdserve status`, and try again"
            )
        if state.deadline_ns(request) <= now_ns:
            return DeadlineExceeded("the deadline had passed when the request arrived")
        # A second attempt has begun to answer: it is never turned away. There are no more of
        # those than requests that ran at once.
        if request.attempt > 0:
            return None
        if request.retries > 0:
            state.counters["retries_arrived"] += 1
        if self._admitted_ns is None:
            self._admitted_ns = now_ns
        refusal = self._too_many(state, request, now_ns) or self._too_late(state, request, now_ns)
        if refusal is None:
            self._admitted_ns = now_ns
            return None
        state.counters["shed"] += 1
        if request.retries > 0:
            state.counters["shed_retries"] += 1
        return refusal

    def _too_many(self, state: RouterState, request: Request, now_ns: int) -> CapacityError | None:
        places, waiting = state.settings.waiting_max, len(state.lines)
        tenants = state.tenants
        has = tenants.count(request.tenant)
        if waiting >= places * CROWDED_RATIO and has > 0 and tenants.others(request.tenant):
            share = places * tenants.share(request.tenant)
            if has >= share:
                retry_after_ms = self._return_ms(state, request, now_ns)
                return RateLimited(
                    f"{has} requests of {request.tenant or 'this tenant'} wait already, its share "
                    f"of waiting_max, which is {places}, is {share:.0f} while others wait; try "
                    f"again in {retry_after_ms} ms",
                    retry_after_ms=retry_after_ms,
                )
        if waiting >= places * (RETRIED_RATIO if request.retries else 1.0):
            retry_after_ms = self._return_ms(state, request, now_ns)
            return QueueFull(
                f"{waiting} requests wait already, waiting_max is {places}; try again in "
                f"{retry_after_ms} ms",
                retry_after_ms=retry_after_ms,
            )
        return None

    def _too_late(self, state: RouterState, request: Request, now_ns: int) -> CapacityError | None:
        if not state.fleet.prefill_count:
            return None
        name, bound_ms = self._bound(state, request, now_ns)
        service_class = request.service_class
        ratio = RESUME_RATIO if service_class in self._shedding else 1.0
        limit_ms = bound_ms * (min(ratio, RETRIED_RATIO) if request.retries else ratio)
        workers = self._pace.workers(state.fleet.prefill_count)
        if name not in ("ttft_slo_ms", "ttft_max_ms"):
            if not len(state.lines):
                return None  # it has the workers' next time: whether it is late, they will show
            longest_ms = state.fleet.work_ns(request.length, 0) / MS
            if state.queued_work_ns / MS / workers + longest_ms < limit_ms * OBVIOUS_RATIO:
                return None
        predicted_ms = predicted_ttft_ns(state, request, workers=workers) / MS
        if predicted_ms > limit_ms and state.tenants.others(request.tenant):
            predicted_ms = predicted_ttft_ns(state, request, workers=workers, turns=True) / MS
        if predicted_ms <= limit_ms:
            if not request.retries:
                self._shedding.discard(service_class)
            return None
        if self._may_check(state, now_ns):
            return None
        if not request.retries:
            self._shedding.add(service_class)
        retry_after_ms = self._returns.after_ms(
            predicted_ms - RESUME_RATIO * bound_ms,
            state.fleet.work_ns(request.length, 0) / workers,
            now_ns,
        )
        return QueueFull(
            f"the first token is predicted in {round(predicted_ms)} ms, {name} is "
            f"{max(0.0, bound_ms):.6g}; try again in {retry_after_ms} ms",
            retry_after_ms=retry_after_ms,
        )

    def _may_check(self, state: RouterState, now_ns: int) -> bool:
        if len(state.lines) or any(worker.prompts for worker in state.fleet.all()):
            return False
        return self._admitted_ns is not None and now_ns - self._admitted_ns >= CHECK_NS

    def _bound(self, state: RouterState, request: Request, now_ns: int) -> tuple[str, float]:
        """The earliest of the bounds on its first token, and what it is called, in milliseconds."""
        settings, service_class = state.settings, request.service_class
        answer_ns = self._answers.expected_ns(request.stop.max_tokens)
        left_ms = (state.deadline_ns(request) - now_ns - answer_ns) / MS
        bounds = [(left_ms, "what its deadline leaves")]
        own_ms = settings.ttft_max_ms.get(str(service_class))
        if own_ms is not None:
            bounds.append((own_ms, "ttft_max_ms"))
        if service_class is not ServiceClass.BATCH:
            if own_ms is None and settings.ttft_slo_ms is not None:
                bounds.append((settings.ttft_slo_ms, "ttft_slo_ms"))
            if settings.queue_age_max_ms is not None:
                bounds.append((settings.queue_age_max_ms, "queue_age_max_ms"))
        bound_ms, name = min(bounds)
        return name, bound_ms

    def too_old(self, state: RouterState, entry: Entry, now_ns: int) -> CapacityError:
        """The refusal of one that has waited as long as its class may."""
        retry_after_ms = self._return_ms(state, entry.request, now_ns)
        return QueueFull(
            f"it has waited for {(now_ns - entry.arrived_ns) // MS} ms, and none of its class may "
            f"wait for more than {state.age_max_ms(entry.request):g}; try again in "
            f"{retry_after_ms} ms",
            retry_after_ms=retry_after_ms,
        )

    def _return_ms(self, state: RouterState, request: Request, now_ns: int) -> int:
        """When what waits now is served."""
        workers = self._pace.workers(max(1, state.fleet.prefill_count))
        spacing_ns = state.fleet.work_ns(request.length, 0) / workers
        return self._returns.after_ms(state.queued_work_ns / MS / workers, spacing_ns, now_ns)


def predicted_ttft_ns(
    state: RouterState, request: Request, *, workers: float | None = None, turns: bool = False
) -> int:
    """What goes before it, shared by all workers, and its own prefill.

    Args:
        workers: by how many the queue is served, as far as is known; None: by all prefill workers.
        turns: count of other tenants only what goes first where tenants take turns.
    """
    fleet = state.fleet
    hits = fleet.hits(request.block_keys)
    cached_tokens = min(hits[-1][0] * state.fleet.block_tokens, request.length - 1)
    work_ns = fleet.work_ns(request.length - cached_tokens, cached_tokens)
    shared = state.lines.shared
    waiting_ns = state.queued_work_ns
    if isinstance(shared, SkipJoin):
        waiting_ns = shared.work_before_ns(work_ns)
        if turns:
            waiting_ns = min(waiting_ns, state.tenants.before_ns(request.tenant, work_ns))
    running_ns = round(sum([worker.left_ns for worker in fleet.all()]))
    if workers is None:
        return (waiting_ns + running_ns) // fleet.prefill_count + work_ns
    return round(waiting_ns / workers) + running_ns // fleet.prefill_count + work_ns


def candidates(state: RouterState, entry: Entry) -> list[Candidate]:
    """The prefill workers in the eyes of a request that has just arrived."""
    found = []
    for blocks, bits in state.hits(entry):
        cached_tokens = usable_tokens(entry, blocks, state.fleet.block_tokens)
        uncached_tokens = entry.total_tokens - cached_tokens
        for worker in state.fleet.all():
            if not bits >> worker.slot & 1 or worker.draining:
                continue
            found.append(
                Candidate(
                    worker=worker.id,
                    queued_requests=len(state.lines.own(worker.id)) + len(worker.prompts),
                    queued_work_ns=round(worker.left_ns) + state.bound_work_ns[worker.id],
                    uncached_tokens=uncached_tokens,
                    cached_tokens=cached_tokens,
                    work_ns=state.fleet.work_ns(uncached_tokens, cached_tokens),
                    active_decode_blocks=worker.hello.block_count - worker.free_blocks
                    if worker.decodes
                    else 0,
                )
            )
    return sorted(found, key=lambda candidate: candidate.worker)
