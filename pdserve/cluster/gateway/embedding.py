"""Texts to vectors: the calls that pool prompts, and what comes back. For both fronts.

Each input is a call of its own, so the router places it, and a long one is computed beside short
ones, as any prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdserve.cluster.gateway.calls import Call, Session
from pdserve.cluster.gateway.parameters import Limits, shown
from pdserve.cluster.gateway.side_by_side import answered_each
from pdserve.cluster.http.metrics import Meter
from pdserve.errors import FrameError, PromptTooLong, UnusableValue
from pdserve.messages import Sampling, ServiceClass, Stop, Timing
from pdserve.prompt_tasks import Pooling

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
    answers = await answered_each(session, calls, meter)
    return [
        Embedded(vector_of(piece.vector), piece.timing)
        for pieces in answers
        for piece in pieces
        if piece.finish is not None
    ]


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
