"""Calls whose answers are small and wanted whole: some of a request's run at once, the others
follow, since one request must not fill the queue that all share."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing

from pdserve.cluster.gateway.calls import Call, Piece, Session
from pdserve.cluster.gateway.gathering import batches
from pdserve.cluster.http.metrics import Meter

AT_ONCE_MAX = 32
"""Calls of one request that are under way."""


async def answered_each(
    session: Session, calls: Sequence[Call], meter: Meter, *, after: int = 0
) -> list[list[Piece]]:
    """The pieces of each, in the calls' order. Leaving it cancels all that still runs.

    Args:
        after: so many calls of the meter's come before these.

    Raises:
        PdserveError: of the first that failed; the others are cancelled.
    """
    found: list[list[Piece]] = [[] for _ in calls]
    waiting = iter(enumerate(calls))
    runners = [
        asyncio.create_task(_run(session, waiting, found, meter, after))
        for _ in range(min(AT_ONCE_MAX, len(calls)))
    ]
    try:
        await asyncio.gather(*runners)
    finally:
        for runner in runners:
            runner.cancel()
        await asyncio.gather(*runners, return_exceptions=True)
    return found


async def _run(
    session: Session,
    waiting: Iterator[tuple[int, Call]],
    found: list[list[Piece]],
    meter: Meter,
    after: int,
) -> None:
    for index, call in waiting:
        async with aclosing(batches(session, [call])) as gathered:
            async for batch in gathered:
                meter.note((after + index, piece) for _, piece in batch)
                found[index] += [piece for _, piece in batch]
