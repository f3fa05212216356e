"""What the autoscaler sees of the router: figures of both pools at one moment."""

from pdserve.clock import MS
from pdserve.lifecycle import Phase
from pdserve.messages import Role
from pdserve.router.entry import Entry
from pdserve.router.placement import blocks_of
from pdserve.router.scaling import DecodeSignals, Observation, PrefillSignals
from pdserve.router.state import RouterState
from pdserve.router.worker import Worker


def observation_of(state: RouterState, now_ns: int) -> Observation:
    """Linear in live requests and workers; for once or twice a second."""
    waiting, parked = [], []
    for entry in state.entries.values():
        if entry.phase is Phase.QUEUED:
            waiting.append(entry)
        elif entry.phase is Phase.PARKED:
            parked.append(entry)
    return Observation(
        at_ms=now_ns // MS,
        live=len(state.entries),
        arrived=state.counters["arrived"],
        prefill=_prefill(state, waiting, now_ns),
        decode=_decode(state, waiting, parked),
    )


def _prefill(state: RouterState, waiting: list[Entry], now_ns: int) -> PrefillSignals:
    # Where roles are shared, a pool is still of those that mostly do its work.
    mine = state.fleet.all() if state.fleet.aggregated else state.fleet.of(Role.PREFILL)
    workers = [worker for worker in mine if not worker.draining and not worker.rests]
    oldest_ns = min((entry.queued_at_ns for entry in waiting), default=now_ns)
    running_ns = sum(max(0, w.free_at_ns - now_ns) for w in workers if w.prompts)
    return PrefillSignals(
        workers=len(workers),
        busy=sum(bool(worker.prompts) for worker in workers),
        queued=len(waiting),
        oldest_wait_ms=(now_ns - oldest_ns) // MS,
        work_ms=(state.queued_work_ns + running_ns) // MS,
        arrived_work_ms=state.arrived_work_ns // MS,
        shed_count=state.counters["shed"],
        lent=0 if state.fleet.aggregated else _lent(state, Role.PREFILL),
    )


def _decode(state: RouterState, waiting: list[Entry], parked: list[Entry]) -> DecodeSignals:
    workers = state.fleet.of(Role.DECODE)
    staying = [worker for worker in workers if not worker.draining and not worker.rests]
    room_blocks = max((worker.room_blocks for worker in staying), default=-1)
    is_full = any(_blocks(state, entry) > room_blocks for entry in (parked or waiting)[:1])
    # What waits for decode is demand of decode; what waits for prefill is none yet.
    outside = [*parked, *(waiting if is_full else ())]
    blocks = sum(worker.hello.block_count - worker.free_blocks for worker in workers)
    blocks += sum(worker.reserved_blocks for worker in workers)
    sequences = sum(map(_sequences, workers))
    context_tokens = sum(worker.context_tokens for worker in workers)
    step = state.fleet.costs.decode
    fixed_ns = step.step_ns(1, 0)
    return DecodeSignals(
        workers=len(staying),
        blocks=blocks + sum(_blocks(state, entry) for entry in outside),
        worker_blocks=max((worker.hello.block_count for worker in workers), default=0),
        sequences=sequences + len(outside),
        worker_sequences=max((worker.hello.running_max for worker in workers), default=0),
        parked=len(parked),
        is_full=is_full,
        step_fixed_ms=round(fixed_ns / MS, 3),
        step_shared_ms=round((step.step_ns(max(1, sequences), context_tokens) - fixed_ns) / MS, 3),
        lent=_lent(state, Role.DECODE),
    )


def _lent(state: RouterState, role: Role) -> int:
    """Workers of the other pool that do this one's work, less those of this one that do not."""
    workers = [worker for worker in state.fleet.all() if not worker.draining]
    return sum((w.hello.role is role and not w.rests) - (w.pool is role) for w in workers)


def _sequences(worker: Worker) -> int:
    reported = worker.running + worker.waiting if not worker.prefills else 0
    return max(len(worker.streams), reported)


def _blocks(state: RouterState, entry: Entry) -> int:
    """What it will take at a decode worker when it comes there."""
    handoff = entry.handoff
    tokens = entry.total_tokens if handoff is None else handoff.length
    return blocks_of(tokens + 1, state.fleet.block_tokens) + entry.beam_blocks
