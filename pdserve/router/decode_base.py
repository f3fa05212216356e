"""The seam between the router and an order of decoding: whom to resume, whom to park for whom.

A *stream* is a request that decodes, or that is parked and could. An order ranks streams. It knows
no worker but by its *room*, has neither clock nor chance, and moves nobody: what it returns are
wishes, which the router carries out as far as workers agree.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.ids import RequestId, WorkerId


@dataclass(frozen=True, slots=True)
class Stream:
    """One request that decodes, or is parked and could."""

    request: RequestId
    cls: Hashable  # of its length: ``lengths.length_class``
    arrived_ns: int
    generated_tokens: int
    context_tokens: int  # prompt and generated: what its KV takes
    worker: WorkerId | None  # None: parked
    since_ns: int  # running or parked since
    moves: int  # how often it was parked already
    oracle_tokens: int | None  # generated tokens it will have in the end; only for "oracle"


@dataclass(frozen=True, slots=True)
class DecodeRoom:
    """One decode worker."""

    worker: WorkerId
    sequences: int
    running_max: int
    free_tokens: int
    capacity_tokens: int

    def takes(self, context_tokens: int) -> bool:
        return self.sequences < self.running_max and self.free_tokens >= context_tokens


@dataclass(frozen=True, slots=True)
class Swap:
    """Park ``out`` so that ``into`` can run."""

    out: RequestId
    into: RequestId | None


class DecodeOrder(Protocol):
    def resume_order(self, parked: Sequence[Stream], now_ns: int) -> list[Stream]:
        """Whom to resume first."""

    def swaps(
        self,
        running: Sequence[Stream],
        parked: Sequence[Stream],
        rooms: Sequence[DecodeRoom],
        now_ns: int,
    ) -> list[Swap]:
        """Whom to park for whom, so that nobody is in two of them; empty most of the time."""

    def finished(
        self,
        cls: Hashable,
        generated_tokens: int,
        now_ns: int,
        *,
        context_tokens: int = 0,
        arrived_ns: int | None = None,
    ) -> None:
        """An answer has ended.

        Args:
            context_tokens: prompt and generated.
            arrived_ns: as in its stream. None: it counts as a length, and cannot be replayed.
        """


SWAPS_MAX = 16
"""Swaps of one call; the next call goes on."""

OUTS_TRIED_MAX = 16
"""Running streams looked at for one parked one, worst first, until one leaves room enough."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A stream and its key; the least key first."""

    key: tuple[float, int, RequestId]
    stream: Stream


def ranked(streams: Sequence[Stream], key: Callable[[Stream], float]) -> list[Ranked]:
    """Best first; ties by arrival."""
    keyed = [Ranked((key(one), one.arrived_ns, one.request), one) for one in streams]
    return sorted(keyed, key=lambda one: one.key)


def exchange(
    running: Sequence[Ranked],
    parked: Sequence[Ranked],
    rooms: Sequence[DecodeRoom],
) -> list[Swap]:
    """Swaps of the best parked with the worst running streams, where that makes room.

    Who fits beside the running ones needs no swap and gets none; his room is taken as gone.

    A parked stream is worth the place of a running one if its key is less; both are given best
    first.
    """
    spaces = {room.worker: [room.running_max - room.sequences, room.free_tokens] for room in rooms}
    outs = [one for one in reversed(running) if one.stream.worker in spaces]
    swaps: list[Swap] = []
    for into in parked:
        if _fits_beside(into.stream, spaces):
            continue
        if len(swaps) == SWAPS_MAX or not outs or into.key[0] >= outs[0].key[0]:
            break
        for place, out in enumerate(outs[:OUTS_TRIED_MAX]):
            if into.key[0] >= out.key[0]:
                break
            assert out.stream.worker is not None
            space = spaces[out.stream.worker]
            left = space[1] + out.stream.context_tokens - into.stream.context_tokens
            if left >= 0:
                space[1] = left
                swaps.append(Swap(out.stream.request, into.stream.request))
                del outs[place]
                break
    return swaps


def _fits_beside(stream: Stream, spaces: dict[WorkerId, list[int]]) -> bool:
    free = [space for space in spaces.values() if space[0] > 0]
    space = max(free, key=lambda space: space[1], default=None)
    if space is None or space[1] < stream.context_tokens:
        return False
    space[0] -= 1
    space[1] -= stream.context_tokens
    return True


def memory_binds(rooms: Sequence[DecodeRoom]) -> bool:
    """Whether memory, not the number of sequences, is what keeps streams waiting."""
    full = sum(room.sequences >= room.running_max for room in rooms)
    return 2 * full < len(rooms)
