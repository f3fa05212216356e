"""The two choices that make a route: a prefill worker, and a decode worker. Pure.

A prefill worker's *price* is time: how long the request waits there, and how long its uncached
part takes there. Cache hits and load in one currency, so neither needs a weight.

A decode worker must have *room*, in sequences and in blocks. Blocks are counted for the tokens a
request has now and a little growth, not for the most it might generate: what does not fit in the
end is parked, and that is rarer than memory kept for tokens that never come.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.ids import WorkerId


@dataclass(frozen=True, slots=True)
class PrefillOption:
    """One prefill worker, in the eyes of one request."""

    worker: WorkerId
    wait_ns: int  # until it would begin there
    work_ns: int  # of its uncached tokens, at that worker's rate
    cached_tokens: int
    is_idle: bool
    has_room: bool


def choose_prefill(options: Sequence[PrefillOption]) -> PrefillOption | None:
    """Where the request would be done first, or None: it had better wait.

    It waits when a worker that is full now would still be done with it sooner than any that has
    room; an idle worker, however, is never left idle. Ties go to the longer cached prefix, then to
    the lower id.
    """
    ranked = sorted(options, key=lambda o: (o.wait_ns + o.work_ns, -o.cached_tokens, o.worker))
    if ranked and ranked[0].has_room:
        return ranked[0]
    return next((option for option in ranked if option.is_idle and option.has_room), None)


@dataclass(frozen=True, slots=True)
class DecodeOption:
    """One decode worker. Blocks promised to requests on their way count as used."""

    worker: WorkerId
    free_blocks: int
    used_blocks: int
    bound: int  # sequences that run there or are on their way
    running_max: int


def blocks_of(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)  # ceil


def choose_decode(options: Sequence[DecodeOption], *, least_blocks: int) -> DecodeOption | None:
    """The least loaded worker with room for a new request, or None. Ties go to the lower id."""
    fitting = [option for option in options if _has_room(option, least_blocks)]
    return min(fitting, key=lambda o: (o.used_blocks, o.worker), default=None)


def choose_resume(
    options: Sequence[DecodeOption], *, least_blocks: int, parked_by: WorkerId
) -> DecodeOption | None:
    """Where a parked request goes on, or None.

    The worker that parked it comes last, because it was short of blocks a moment ago.
    """
    fitting = [option for option in options if _has_room(option, least_blocks)]
    return min(
        fitting, key=lambda o: (o.worker == parked_by, o.used_blocks, o.worker), default=None
    )


def _has_room(option: DecodeOption, least_blocks: int) -> bool:
    """Room for the blocks it needs now, and for one more for each sequence then there.

    So every one of them can fill at least one more block before somebody is parked: no ping-pong.
    A worker that has nothing else to do takes what fits.
    """
    if option.bound >= option.running_max:
        return False
    growth_blocks = option.bound + 1 if option.bound else 0
    return least_blocks + growth_blocks <= option.free_blocks
