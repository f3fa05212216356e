"""Several calls as one stream of batches: whatever is ready at once comes out together.

    answered(session, call 0) ──pump──┐
    answered(session, call 1) ──pump──┼─► bounded list of ready pieces ──► batches()
    …                         ──pump──┘

One pump task per call. A consumer that is slow to write finds several pieces waiting and sends
them in one write; one that is far too slow stops the pumps. Leaving the generator, in whatever
way, cancels the pumps and so closes every call's iterator before it returns.

One call alone, which is what most clients send, needs no pump: its iterator has what is ready, and
a task less is woken for every token. Then what a slow client leaves waits in the session.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from pdserve.cluster.gateway.calls import Call, Piece, Session
from pdserve.cluster.gateway.ranking import answered
from pdserve.cluster.why import WhyLog, why_log
from pdserve.errors import PdserveError

PENDING_PIECES_MAX = 256
"""Pieces that wait for one slow client before its calls are no longer read."""

Numbered = tuple[int, Piece]  # which call, and its piece


def batches(session: Session, calls: Sequence[Call]) -> AsyncGenerator[list[Numbered]]:
    """The pieces of all calls, in order per call, as many at once as are ready.

    Raises:
        PdserveError: of a call that fails, after what was ready before; the others are then
            cancelled.
    """
    return _alone(session, calls[0]) if len(calls) == 1 else _together(session, calls)


async def _together(session: Session, calls: Sequence[Call]) -> AsyncGenerator[list[Numbered]]:
    ready: list[Numbered] = []
    room = asyncio.Semaphore(PENDING_PIECES_MAX)
    wake = asyncio.Event()

    async def pump(index: int, call: Call) -> None:
        async with aclosing(_logged(session, call)) as bursts:
            async for pieces in bursts:
                for piece in pieces:
                    await room.acquire()
                    ready.append((index, piece))
                    wake.set()

    pumps = [asyncio.create_task(pump(index, call)) for index, call in enumerate(calls)]
    for task in pumps:
        task.add_done_callback(lambda _: wake.set())
    try:
        while True:
            if ready:
                batch = ready.copy()
                ready.clear()
                for _ in batch:
                    room.release()
                yield batch
            elif _all_ended(pumps):
                return
            else:
                wake.clear()
                await wake.wait()
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _alone(session: Session, call: Call) -> AsyncGenerator[list[Numbered]]:
    try:
        async with aclosing(_logged(session, call)) as bursts:
            async for pieces in bursts:
                yield [(0, piece) for piece in pieces]
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise _given_up() from None


def _logged(session: Session, call: Call) -> AsyncGenerator[Sequence[Piece]]:
    """What the call's client gets, as the log and traces are told of it too."""
    why = why_log(call)
    bursts = answered(session, call)
    return bursts if why is None else _noted(why, bursts)


async def _noted(
    why: WhyLog, answer: AsyncGenerator[Sequence[Piece]]
) -> AsyncGenerator[Sequence[Piece]]:
    try:
        async with aclosing(answer) as bursts:
            async for pieces in bursts:
                for piece in pieces:
                    why.note(piece)
                yield pieces
    except PdserveError as error:
        why.failed(error)
        raise


def _given_up() -> PdserveError:
    return PdserveError("the call was given up inside the gateway; send it again")


def _all_ended(pumps: Sequence["asyncio.Task[None]"]) -> bool:
    """Whether nothing more can come; raises the error of a pump that failed."""
    ended = [task for task in pumps if task.done()]
    for task in ended:
        if task.cancelled():  # not by us: we cancel only on the way out
            raise _given_up()
        task.result()
    return len(ended) == len(pumps)
