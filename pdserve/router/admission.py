"""What is turned away, on arrival or never: once a prefill has begun, its request is served.

Refused are requests whose deadline has passed, whose attempts are used up, for which there is no
place to wait, or, with an objective for the time to first token, whose first token is predicted to
come later. The prediction is the work that would go before it, over the workers there are. So that
a full queue does not flap, refusing goes on until the prediction is well below the limit; ``BATCH``
work waits as long as it takes.
"""

from pdserve.clock import MS
from pdserve.errors import DeadlineExceeded, PdserveError, QueueFull, WorkerLost
from pdserve.messages import Request, ServiceClass
from pdserve.router.bindings import Candidate
from pdserve.router.entry import Entry
from pdserve.router.orders.skip_join import SkipJoin
from pdserve.router.placement import usable_tokens
from pdserve.router.state import RouterState

RETRY_MS_MIN = 50

RESUME_RATIO = 0.8
"""Of the objective: refusing ends where the prediction is below so much of it."""


class Admission:
    def __init__(self) -> None:
        self._shedding: set[ServiceClass] = set()

    def refusal(self, state: RouterState, request: Request, now_ns: int) -> PdserveError | None:
        settings = state.settings
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
        if len(state.lines) >= settings.waiting_max:
            retry_after_ms = _retry_after_ms(state, state.queued_work_ns)
            return QueueFull(
                f"{len(state.lines)} requests wait already, waiting_max is "
                f"{settings.waiting_max}; try again in {retry_after_ms} ms",
                retry_after_ms=retry_after_ms,
            )
        return self._too_late(state, request)

    def _too_late(self, state: RouterState, request: Request) -> PdserveError | None:
        slo_ms = state.settings.ttft_slo_ms
        service_class = request.service_class
        if slo_ms is None or service_class is ServiceClass.BATCH or not state.fleet.prefill_count:
            return None
        predicted_ms = predicted_ttft_ns(state, request) / MS
        limit_ms = slo_ms * (RESUME_RATIO if service_class in self._shedding else 1.0)
        if predicted_ms <= limit_ms:
            self._shedding.discard(service_class)
            return None
        self._shedding.add(service_class)
        retry_after_ms = max(RETRY_MS_MIN, round(predicted_ms - RESUME_RATIO * slo_ms))
        state.counters["shed"] += 1
        return QueueFull(
            f"the first token is predicted in {round(predicted_ms)} ms, ttft_slo_ms is "
            f"{slo_ms:g}; try again in {retry_after_ms} ms",
            retry_after_ms=retry_after_ms,
        )


def predicted_ttft_ns(state: RouterState, request: Request) -> int:
    """What goes before it, shared by all workers, and its own prefill."""
    fleet = state.fleet
    hits = fleet.hits(request.block_keys)
    cached_tokens = min(hits[-1][0] * state.fleet.block_tokens, request.length - 1)
    work_ns = fleet.work_ns(request.length - cached_tokens, cached_tokens)
    shared = state.lines.shared
    waiting_ns = state.queued_work_ns
    if isinstance(shared, SkipJoin):
        waiting_ns = shared.work_before_ns(work_ns)
    running_ns = sum(fleet.work_ns(tokens, 0) for w in fleet.all() for tokens in w.prompts.values())
    return (waiting_ns + running_ns) // fleet.prefill_count + work_ns


def candidates(state: RouterState, entry: Entry) -> list[Candidate]:
    """The prefill workers in the eyes of a request that has just arrived."""
    found = []
    for blocks, bits in state.hits(entry):
        cached_tokens = usable_tokens(entry, blocks, state.fleet.block_tokens)
        uncached_tokens = entry.total_tokens - cached_tokens
        for worker in state.fleet.all():
            if not bits >> worker.slot & 1 or worker.draining:
                continue
            running_ns = sum(state.fleet.work_ns(tokens, 0) for tokens in worker.prompts.values())
            found.append(
                Candidate(
                    worker=worker.id,
                    queued_requests=len(state.lines.own(worker.id)) + len(worker.prompts),
                    queued_work_ns=running_ns + state.bound_work_ns[worker.id],
                    uncached_tokens=uncached_tokens,
                    cached_tokens=cached_tokens,
                    work_ns=state.fleet.work_ns(uncached_tokens, cached_tokens),
                    active_decode_blocks=worker.hello.block_count - worker.free_blocks
                    if worker.decodes
                    else 0,
                )
            )
    return sorted(found, key=lambda candidate: candidate.worker)


def _retry_after_ms(state: RouterState, work_ns: int) -> int:
    workers = max(1, state.fleet.prefill_count)
    return max(RETRY_MS_MIN, work_ns // workers // MS)
