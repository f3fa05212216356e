"""What is made of a prompt while it is computed, where that is all its client wants of it.

    step ──hidden states──► PoolingReading ──vector──►  PromptDelta
    step ──logits─────────► ScoringReading ──scores──►  PromptDelta, after every chunk

A reading sees the chunks of its prompt in order, each once. It belongs to one stay at one worker: a
prompt that is preempted, or lost, is read from its beginning when it comes back, and the gateway
leaves out what it has. What it has to see of a prompt, from ``reads_from`` on, is computed again
where it is cached.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdserve.messages import Request
from pdserve.model.runner import Reader
from pdserve.model.scoring import score_of_candidates, scores_of
from pdserve.prompt_tasks import Pooling, PoolingKind, PromptDelta, PromptScore, Scoring

SCORES_MAX = 4096
"""In one delta. With 20 of the best each they take 1.5 MB."""

LENGTH_MIN = 1e-12
"""A vector no longer than this has no direction; it stays as it is."""

Vector = NDArray[np.float64]


class Reading(Protocol):
    reads_from: int  # the first token that has to be computed, whatever is cached

    def reader(self, *, start: int, end: int) -> Reader | None:
        """For a run with the tokens from ``start`` to before ``end``."""
        ...

    def deltas(self, *, last: bool) -> Iterator[PromptDelta]:
        """What has become known with the chunk that was computed."""
        ...


def reading_of(request: Request) -> Reading | None:
    """None: the request generates."""
    match request.task:
        case Pooling():
            return PoolingReading(request, request.task)
        case Scoring():
            return ScoringReading(request, request.task)
        case None:
            return None


class PoolingReading:
    def __init__(self, request: Request, task: Pooling) -> None:
        self.reads_from = 0 if task.reads_all else request.length - 1
        self._request = request
        self._task = task
        self._parts: list[Tensor] = []  # float64 [C], of each chunk

    def reader(self, *, start: int, end: int) -> Reader | None:  # noqa: ARG002
        wanted = end == self._request.length or self._task.kind is PoolingKind.MEAN
        return Reader(hidden=self._read) if wanted else None

    def _read(self, hidden_NC: Tensor) -> None:
        if self._task.kind is PoolingKind.MEAN:
            self._parts.append(hidden_NC.sum(dim=0, dtype=torch.float64))
        else:
            self._parts = [hidden_NC[-1].double()]

    def deltas(self, *, last: bool) -> Iterator[PromptDelta]:
        if last:
            # A sum and a mean have the same direction, but not the same length.
            count = self._request.length if self._task.kind is PoolingKind.MEAN else 1
            vector_C: Vector = torch.stack(self._parts).sum(dim=0).cpu().numpy() / count
            if self._task.normalize:
                vector_C = normalized(vector_C)
            data = vector_C.astype("<f4").tobytes()
            yield PromptDelta(self._request.request, self._request.attempt, vector=data)


class ScoringReading:
    def __init__(self, request: Request, task: Scoring) -> None:
        self.reads_from = task.first - 1  # its logits are about the next one
        self._request = request
        self._task = task
        self._given = request.tokens[: request.prompt_tokens]
        self._next = task.first  # of the prompt, the first token not yet told
        self._scores: list[PromptScore] = []
        self._at = 0  # whose logits come next

    def reader(self, *, start: int, end: int) -> Reader | None:
        self._at = start
        return Reader(logits=self._read) if end > self.reads_from else None

    def _read(self, logits_MV: Tensor) -> None:
        """The last token's logits are about a token that is not there."""
        first, end = max(self._at, self.reads_from), self._at + len(logits_MV)
        wanted_MV = logits_MV[first - self._at :]
        self._at = end
        tokens: Sequence[int] = self._given[first + 1 : end + 1]
        self._scores += scores_of(wanted_MV[: len(tokens)], tokens, self._task.top)
        if self._task.candidates and len(tokens) < len(wanted_MV):
            self._scores.append(score_of_candidates(wanted_MV[-1], self._task.candidates))

    def deltas(self, *, last: bool) -> Iterator[PromptDelta]:  # noqa: ARG002
        request, scores = self._request, self._scores
        for first in range(0, len(scores), SCORES_MAX):
            part = tuple(scores[first : first + SCORES_MAX])
            yield PromptDelta(request.request, request.attempt, self._next + first, part)
        self._next += len(scores)
        self._scores = []


def normalized(vector_C: Vector) -> Vector:
    """``vector_C`` at length 1."""
    length = float(np.linalg.norm(vector_C))
    return vector_C / length if length > LENGTH_MIN else vector_C
