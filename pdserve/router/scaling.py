"""How many workers each pool wants: pure figures in, a number out.

Prefill is short of workers when its oldest request waits too long, decode when its blocks or its
places are nearly used up or requests are parked. A pool grows by one at a time.

It shrinks by one when what it has would fit easily into one worker fewer: into ``SHRINK_RATIO``
of what would make that smaller pool grow. The gap between the two is what keeps a constant load
from moving the number to and fro: growing from n to n + 1 means the load exceeds what n take, and
shrinking back would need it to be far below that.

Bounds and delays are the caller's (Ray Serve's own).
"""

from dataclasses import dataclass

from pdserve.config import AutoscalingConfig
from pdserve.messages import Role
from pdserve.router.snapshot import RouterSnapshot

SHRINK_RATIO = 0.6


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    oldest_wait_ms: int
    queued: int  # requests that wait in the router
    busy_workers: int  # workers that have something to do


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    used_blocks: int  # of all workers, what is promised to requests on their way included
    worker_blocks: int  # of one worker
    sequences: int
    worker_sequences: int  # that one worker runs at once
    parked: int


def wanted_replicas(
    role: Role,
    snapshot: RouterSnapshot,
    settings: AutoscalingConfig,
    *,
    current: int,
    aggregated: bool = False,
) -> int:
    """How many workers the pool of ``role`` should have, given that it is to have ``current``.

    ``aggregated``: one pool does both, and needs what the busier of its two jobs needs.
    """
    if role is Role.PREFILL:
        return wanted_prefill(prefill_load(snapshot, role), settings, current=current)
    wanted = wanted_decode(decode_load(snapshot), settings, current=current)
    if aggregated:
        waiting = wanted_prefill(prefill_load(snapshot, role), settings, current=current)
        wanted = max(wanted, waiting)
    return wanted


def wanted_prefill(load: PrefillLoad, settings: AutoscalingConfig, *, current: int) -> int:
    if load.queued and (load.oldest_wait_ms > settings.queue_age_ms or current == 0):
        return current + 1
    if load.queued == 0 and load.busy_workers <= (current - 1) * SHRINK_RATIO:
        return max(current - 1, 0)
    return current


def wanted_decode(load: DecodeLoad, settings: AutoscalingConfig, *, current: int) -> int:
    needed = max(load.used_blocks / load.worker_blocks, load.sequences / load.worker_sequences)
    if load.parked or needed > current * settings.kv_pressure_ratio:
        return current + 1
    if needed <= (current - 1) * settings.kv_pressure_ratio * SHRINK_RATIO:
        return max(current - 1, 0)
    return current


def prefill_load(snapshot: RouterSnapshot, role: Role) -> PrefillLoad:
    """Of the pool of ``role``, which computes prompts."""
    return PrefillLoad(
        oldest_wait_ms=snapshot.oldest_wait_ms,
        queued=sum(snapshot.queue_lengths),
        busy_workers=sum(
            max(worker.held, worker.running + worker.waiting) > 0
            for worker in snapshot.workers
            if worker.role is role
        ),
    )


def decode_load(snapshot: RouterSnapshot) -> DecodeLoad:
    """With no worker there, one is taken to be of any size: only what is parked counts then."""
    workers = [worker for worker in snapshot.workers if worker.role is Role.DECODE]
    return DecodeLoad(
        used_blocks=sum(w.block_count - w.free_blocks + w.reserved_blocks for w in workers),
        worker_blocks=max((worker.block_count for worker in workers), default=1),
        sequences=sum(max(worker.held, worker.running + worker.waiting) for worker in workers),
        worker_sequences=max((worker.running_max for worker in workers), default=1),
        parked=snapshot.parked,
    )
