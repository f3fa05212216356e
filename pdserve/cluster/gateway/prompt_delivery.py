"""What one request about its prompt has delivered: each score once, or one vector. Pure.

Where ``delivery.Delivery`` counts tokens, this counts the prompt's tokens that have a score. A next
attempt, and one that was preempted, says them again from the first one on; what is known is left
out, and is equal anyway, since a score depends on the tokens before it alone.
"""

from collections.abc import Sequence
from dataclasses import replace

from pdserve.cluster.gateway.calls import Piece
from pdserve.errors import FrameError, PdserveError
from pdserve.ids import BlockKey
from pdserve.messages import Request, Timing, TokenDelta
from pdserve.prompt_tasks import PromptDelta, Scoring


class PromptDelivery:
    open_choices: tuple[int, ...] = ()  # it is none

    def __init__(self, request: Request) -> None:
        assert request.task is not None, f"{request.request} asks nothing of its prompt"
        self.request = request
        self.finished = False
        self.timing: Timing | None = None  # once it is finished
        task = request.task
        self._known = task.first if isinstance(task, Scoring) else 1  # the first has no score
        self._vector = b""

    def next_attempt(self, keys: Sequence[BlockKey]) -> Request:
        """``keys`` are those of the full blocks of ``tokens_so_far()``."""
        assert self.request.task is not None
        self.request = replace(
            self.request,
            attempt=self.request.attempt + 1,
            block_keys=() if self.request.task.reads_all else tuple(keys),
        )
        return self.request

    def tokens_so_far(self) -> tuple[int, ...]:
        return self.request.tokens

    def on_prompt(self, delta: PromptDelta) -> list[Piece]:
        """What is new in ``delta``.

        Raises:
            FrameError: scores are missing before it.
        """
        if delta.attempt != self.request.attempt or self.finished:
            return []
        self._vector = delta.vector
        if delta.first > self._known:
            raise FrameError(f"{delta.request} has no score of token {self._known} of its prompt")
        fresh = delta.scores[self._known - delta.first :]
        self._known += len(fresh)
        return [Piece(self.request.choice, "", (), scores=fresh)] if fresh else []

    def on_delta(self, delta: TokenDelta) -> list[Piece]:
        """The end: the vector, or nothing more.

        Raises:
            PdserveError: the worker's error, where the delta carries one.
            FrameError: something is missing.
        """
        if delta.attempt != self.request.attempt or self.finished:
            return []
        self.finished = True
        if delta.error is not None:
            error: PdserveError = delta.error.to_error()
            raise error
        self.timing = delta.timing
        task = self.request.task
        if isinstance(task, Scoring):
            if self._known < task.end(self.request.prompt_tokens):
                raise FrameError(f"{delta.request} ended before its prompt was scored")
            return []
        if not self._vector:
            raise FrameError(f"{delta.request} ended without a vector")
        return [
            Piece(
                self.request.choice,
                "",
                (),
                delta.finish,
                timing=delta.timing,
                vector=self._vector,
            )
        ]


def with_task(piece: Piece, task: PromptDelivery | None) -> Piece:
    """``piece`` of a choice, with what its prompt took before it began: the blocks that it found
    cached then were computed for it."""
    spent = task.timing if task else None
    if spent is None or piece.timing is None or piece.timing is spent:
        return piece
    return replace(piece, timing=_together(spent, piece.timing))


def _together(first: Timing, then: Timing) -> Timing:
    """Two requests of one call, one after the other."""
    return replace(
        then,
        queued_us=first.queued_us + then.queued_us,
        prefill_us=first.prefill_us + then.prefill_us,
        step_us=first.step_us + then.step_us,
        cached_tokens=first.cached_tokens,
        preempted_count=first.preempted_count + then.preempted_count,
        decisions=first.decisions + then.decisions,
    )
