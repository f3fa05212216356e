"""The router at one moment, in plain values: for status, metrics and scaling."""

from dataclasses import dataclass

from pdserve.clock import MS, S
from pdserve.ids import HostId, RequestId, StoreId, WorkerId
from pdserve.lifecycle import Phase
from pdserve.messages import Address, Role
from pdserve.router.duties import Duty, duty_of
from pdserve.router.state import RouterState
from pdserve.router.worker import Worker


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    worker: WorkerId
    role: Role
    pool: Role  # whose replica it is; another one than its role after `pdserve role`
    duty: Duty  # what it is sent: one of the two, both, or none
    pid: int
    host: HostId
    running: int
    waiting: int
    held: int  # requests the router sent there and has not seen leave
    reserved_blocks: int
    free_blocks: int
    block_count: int
    running_max: int
    draining: bool
    store_id: StoreId
    store: Address  # of its host's store node
    counters: dict[str, int]  # the worker's own


@dataclass(frozen=True, slots=True)
class RouterSnapshot:
    mode: str  # as in ``router.mode``: which roles a worker may have
    workers: tuple[WorkerSnapshot, ...]
    queue_lengths: tuple[int, ...]  # level 0 first
    queued_work_ms: int  # predicted prefill time of all who wait
    oldest_wait_ms: int  # 0 when nobody waits
    oldest_request: RequestId | None
    parked: int
    phases: dict[str, int]  # live requests by phase
    prefill_tokens_per_s: int
    counters: dict[str, int]  # the router's own, since it started


def snapshot_of(state: RouterState, now_ns: int) -> RouterSnapshot:
    """Linear in live requests and workers; for a few times a second."""
    waiting = [entry for entry in state.entries.values() if entry.phase is Phase.QUEUED]
    oldest = min(waiting, key=lambda entry: (entry.queued_at_ns, entry.order), default=None)
    phases = dict.fromkeys(map(str, Phase), 0)
    for entry in state.entries.values():
        phases[str(entry.phase)] += 1
    return RouterSnapshot(
        mode=state.settings.mode,
        workers=tuple(_worker(worker) for worker in state.fleet.all()),
        queue_lengths=state.lines.lengths(),
        queued_work_ms=state.queued_work_ns // MS,
        oldest_wait_ms=0 if oldest is None else (now_ns - oldest.queued_at_ns) // MS,
        oldest_request=None if oldest is None else oldest.id,
        parked=len(state.parked),
        phases=phases,
        prefill_tokens_per_s=_tokens_per_s(state),
        counters=dict(sorted(state.counters.items())),
    )


RATE_TOKENS = 1024
"""The length of prompt whose speed is shown."""


def _tokens_per_s(state: RouterState) -> int:
    return round(RATE_TOKENS * S / state.fleet.work_ns(RATE_TOKENS, 0))


def _worker(worker: Worker) -> WorkerSnapshot:
    return WorkerSnapshot(
        worker=worker.id,
        role=worker.hello.role,
        pool=worker.pool,
        duty=duty_of(worker),
        pid=worker.hello.pid,
        host=worker.hello.address.host,
        running=worker.running,
        waiting=worker.waiting,
        held=len(worker.held),
        reserved_blocks=worker.reserved_blocks,
        free_blocks=worker.free_blocks,
        block_count=worker.hello.block_count,
        running_max=worker.hello.running_max,
        draining=worker.draining,
        store_id=worker.hello.store_id,
        store=worker.hello.store,
        counters=dict(sorted(worker.counters.items())),
    )
