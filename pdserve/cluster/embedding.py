"""Texts to vectors: the calls that pool prompts, and what comes back. For both fronts.

Each input is a call of its own, so the router places it, and a long one is computed beside short
ones, as any prompt. Some of a request's inputs run at once, the others follow: one request must not
fill the queue that all share.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from pdserve.cluster.calls import Call, Session
from pdserve.cluster.gathering import batches
from pdserve.cluster.http.metrics import Meter
from pdserve.cluster.parameters import Limits, shown
from pdserve.errors import FrameError, PromptTooLong, UnusableValue
from pdserve.messages import Sampling, ServiceClass, Stop, Timing
from pdserve.prompt_tasks import Pooling

AT_ONCE_MAX = 32
"""Inputs of one request that are under way."""

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Embedded:
    vector: Vector
    timing: Timing | None


def pooling_call(
    call: str,
    prompt: tuple[int, ...],
    task: Pooling,
    limits: Limits,
    *,
    prompt_field: str,
    tenant: str,
    service_class: ServiceClass,
    deadline_unix_ms: int,
    model: str = "",
    adapter: str | None = None,
    retries: int = 0,
) -> Call:
    """
    Raises:
        PromptTooLong: the context does not hold it.
    """
    if len(prompt) > limits.context_tokens:
        raise PromptTooLong(len(prompt), limits.context_tokens, field=prompt_field)
    return Call(
        call=call,
        prompt=prompt,
        n=1,
        sampling=Sampling(),
        stop=Stop(max_tokens=1),
        seed=0,
        tenant=tenant,
        service_class=service_class,
        deadline_unix_ms=deadline_unix_ms,
        prompt_field=prompt_field,
        model=model,
        adapter=adapter,
        retries=retries,
        task=task,
    )


async def embedded(session: Session, calls: Sequence[Call], meter: Meter) -> list[Embedded]:
    """The vectors, in the calls' order. Leaving it cancels all that still runs.

    Raises:
        PdserveError: of the first that failed; the others are cancelled.
    """
    found: list[Embedded | None] = [None] * len(calls)
    waiting = iter(enumerate(calls))
    runners = [
        asyncio.create_task(_run(session, waiting, found, meter))
        for _ in range(min(AT_ONCE_MAX, len(calls)))
    ]
    try:
        await asyncio.gather(*runners)
    finally:
        for runner in runners:
            runner.cancel()
        await asyncio.gather(*runners, return_exceptions=True)
    return cast("list[Embedded]", found)


async def _run(
    session: Session,
    waiting: Iterator[tuple[int, Call]],
    found: list[Embedded | None],
    meter: Meter,
) -> None:
    for index, call in waiting:
        async with aclosing(batches(session, [call])) as gathered:
            async for batch in gathered:
                meter.note((index, piece) for _, piece in batch)
                for _, piece in batch:
                    if piece.finish is not None:
                        found[index] = Embedded(vector_of(piece.vector), piece.timing)


def vector_of(data: bytes) -> Vector:
    """From float32, little-endian."""
    if not data:
        raise FrameError("a prompt was answered without its vector")
    vector: Vector = np.frombuffer(data, "<f4").astype(np.float32)
    return vector


def shortened(vector: Vector, dimensions: int | None, *, normalize: bool) -> Vector:
    """The first so many numbers of it, at length 1 again.

    Raises:
        UnusableValue: it has fewer.
    """
    if dimensions is None:
        return vector
    if not 1 <= dimensions <= len(vector):
        raise UnusableValue(
            "dimensions", f"is {shown(dimensions)}, must be from 1 to {len(vector)}"
        )
    kept = vector[:dimensions].astype(np.float64)
    length = float(np.linalg.norm(kept))
    if normalize and length > 0:
        kept /= length
    return kept.astype(np.float32)
