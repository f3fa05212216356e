"""The messages that both loops send about a sequence. Pure."""

from collections.abc import Iterator

from pdserve.engine.sequence import Ending, Sequence
from pdserve.errors import ErrorInfo, PdserveError
from pdserve.lifecycle import Event
from pdserve.messages import FinishReason, Progress, Token, TokenDelta, WorkerFailed

DELTA_TOKENS_MAX = 4096
"""In one delta. With 20 logprobs each, 32 as a beam search may have, they take 2 MB."""


def progress(sequence: Sequence, event: Event) -> Progress:
    request = sequence.request
    return Progress(
        request.request,
        request.attempt,
        event,
        computed_tokens=sequence.kv_count,
        total_tokens=len(sequence.tokens),
    )


def failed(sequence: Sequence, error: PdserveError, *, alone: bool = False) -> WorkerFailed:
    request = sequence.request
    return WorkerFailed(request.request, request.attempt, ErrorInfo.of(error), alone)


def delta(sequence: Sequence, tokens: tuple[Token, ...], *, timed: bool) -> TokenDelta:
    """The last ``tokens`` of the sequence; with its ending, if it has ended."""
    request, ending = sequence.request, sequence.ending
    return TokenDelta(
        request=request.request,
        attempt=request.attempt,
        offset=sequence.generated_count - len(tokens),
        tokens=tokens,
        finish=ending.finish if ending else None,
        stop_reason=ending.stop_reason if ending else None,
        error=ErrorInfo.of(ending.error) if ending and ending.error else None,
        timing=sequence.timing if timed else None,
    )


def hypothesis_deltas(
    sequence: Sequence, index: int, tokens: tuple[Token, ...], ending: Ending
) -> Iterator[TokenDelta]:
    """A whole answer of a beam search over the prompt that ``sequence`` has."""
    request = sequence.request
    for offset in range(0, len(tokens), DELTA_TOKENS_MAX):
        is_last = offset + DELTA_TOKENS_MAX >= len(tokens)
        yield TokenDelta(
            request=request.request,
            attempt=request.attempt,
            offset=offset,
            tokens=tokens[offset : offset + DELTA_TOKENS_MAX],
            finish=ending.finish if is_last else None,
            stop_reason=ending.stop_reason if is_last else None,
            timing=sequence.timing if is_last else None,
            hypothesis=index,
        )


def error_delta(sequence: Sequence, error: PdserveError) -> TokenDelta:
    request = sequence.request
    return TokenDelta(
        request=request.request,
        attempt=request.attempt,
        offset=request.emitted_count,
        tokens=(),
        finish=FinishReason.ERROR,
        error=ErrorInfo.of(error),
    )
