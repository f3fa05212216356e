"""Streams and rooms with the figures that tests do not care about filled in."""

from collections.abc import Hashable

from pdserve.ids import RequestId, WorkerId
from pdserve.router.decode_base import DecodeRoom, Stream

ONLY = WorkerId("d0")


def stream(
    name: str,
    *,
    generated: int = 0,
    context: int = 100,
    arrived_ns: int = 0,
    worker: WorkerId | None = None,
    since_ns: int = 0,
    moves: int = 0,
    total: int | None = None,
    cls: Hashable = "all",
) -> Stream:
    return Stream(
        request=RequestId(name),
        cls=cls,
        arrived_ns=arrived_ns,
        generated_tokens=generated,
        context_tokens=context,
        worker=worker,
        since_ns=since_ns,
        moves=moves,
        oracle_tokens=total,
    )


def room(
    sequences: int,
    *,
    running_max: int = 8,
    free_tokens: int = 1 << 20,
    worker: WorkerId = ONLY,
) -> DecodeRoom:
    return DecodeRoom(worker, sequences, running_max, free_tokens, 1 << 21)
