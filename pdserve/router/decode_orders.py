"""In which order streams get their turn to decode: the orders, and the choice among them by name.

    gated    first come, first served, until what was seen proves that another order pays: ``gate``
    fcfs     first come, first served; nobody is parked for another
    mlfq     a plain multi-level feedback queue: who has the fewest tokens goes first
    oracle   knows how long every answer will be: shortest remaining first

The last two are what we compare with. ``oracle`` weighs what remains by the memory it holds while
memory is what binds. ``mlfq`` parks without regard to what a move costs, as its inventors do.
"""

from collections.abc import Hashable, Sequence
from typing import Literal

from pdserve.router.costs import CostModel
from pdserve.router.decode_base import (
    DecodeOrder,
    DecodeRoom,
    Ranked,
    Stream,
    Swap,
    exchange,
    memory_binds,
    ranked,
)
from pdserve.router.gate import GatedOrder

__all__ = ["DecodeOrder", "DecodeRoom", "Stream", "Swap", "decode_order_of"]

MLFQ_QUANTUM_TOKENS = 32


def decode_order_of(
    name: Literal["gated", "fcfs", "mlfq", "oracle"],
    costs: CostModel,
    *,
    moves_max: int,
    tail_ratio: float = 1.25,
) -> DecodeOrder:
    """A new order.

    Args:
        moves_max: a stream parked so often is not parked again; heeded by ``gated``.
        tail_ratio: ``gated`` takes no order whose 99th percentile is predicted to be worse than
            so many times that of first come, first served.
    """
    if name == "gated":
        return GatedOrder(costs, moves_max=moves_max, tail_ratio=tail_ratio)
    plain: dict[str, type[FcfsOrder] | type[MlfqOrder] | type[OracleOrder]] = {
        "fcfs": FcfsOrder,
        "mlfq": MlfqOrder,
        "oracle": OracleOrder,
    }
    return plain[name]()


class _Unlearning:
    """An order that draws no conclusions."""

    def finished(
        self,
        cls: Hashable,
        generated_tokens: int,
        now_ns: int,
        *,
        context_tokens: int = 0,
        arrived_ns: int | None = None,
    ) -> None:
        """Nothing is kept."""


class FcfsOrder(_Unlearning):
    def resume_order(self, parked: Sequence[Stream], now_ns: int) -> list[Stream]:  # noqa: ARG002
        return sorted(parked, key=lambda stream: (stream.arrived_ns, stream.request))

    def swaps(
        self,
        running: Sequence[Stream],  # noqa: ARG002
        parked: Sequence[Stream],  # noqa: ARG002
        rooms: Sequence[DecodeRoom],  # noqa: ARG002
        now_ns: int,  # noqa: ARG002
    ) -> list[Swap]:
        return []


def mlfq_level(generated_tokens: int) -> int:
    """Level 0 lasts a quantum, each further one twice as long as the one before."""
    return (generated_tokens // MLFQ_QUANTUM_TOKENS + 1).bit_length() - 1


class MlfqOrder(_Unlearning):
    def resume_order(self, parked: Sequence[Stream], now_ns: int) -> list[Stream]:  # noqa: ARG002
        return sorted(
            parked,
            key=lambda one: (mlfq_level(one.generated_tokens), one.since_ns, one.request),
        )

    def swaps(
        self,
        running: Sequence[Stream],
        parked: Sequence[Stream],
        rooms: Sequence[DecodeRoom],
        now_ns: int,
    ) -> list[Swap]:
        waiting = [
            Ranked((mlfq_level(one.generated_tokens), one.since_ns, one.request), one)
            for one in self.resume_order(parked, now_ns)
        ]
        return exchange(
            ranked(running, lambda one: mlfq_level(one.generated_tokens)),
            waiting,
            rooms,
        )


class OracleOrder(_Unlearning):
    def __init__(self) -> None:
        self._memory_binds = False

    def resume_order(self, parked: Sequence[Stream], now_ns: int) -> list[Stream]:  # noqa: ARG002
        return [one.stream for one in ranked(parked, self._key)]

    def swaps(
        self,
        running: Sequence[Stream],
        parked: Sequence[Stream],
        rooms: Sequence[DecodeRoom],
        now_ns: int,  # noqa: ARG002
    ) -> list[Swap]:
        self._memory_binds = memory_binds(rooms)
        return exchange(
            ranked(running, self._key),
            ranked(parked, self._key),
            rooms,
        )

    def _key(self, stream: Stream) -> float:
        assert stream.oracle_tokens is not None, f"nobody told how long {stream.request} will be"
        remaining = stream.oracle_tokens - stream.generated_tokens
        return remaining * (stream.context_tokens if self._memory_binds else 1)
