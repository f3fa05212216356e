"""The messages that both loops send about a sequence. Pure."""

from pdserve.engine.sequence import Sequence
from pdserve.errors import ErrorInfo, PdserveError
from pdserve.lifecycle import Event
from pdserve.messages import Progress, Token, TokenDelta, WorkerFailed


def progress(sequence: Sequence, event: Event) -> Progress:
    request = sequence.request
    return Progress(
        request.request,
        request.attempt,
        event,
        computed_tokens=sequence.kv_count,
        total_tokens=len(sequence.tokens),
    )


def failed(sequence: Sequence, error: PdserveError) -> WorkerFailed:
    request = sequence.request
    return WorkerFailed(request.request, request.attempt, ErrorInfo.of(error))


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
        timing=sequence.timing if timed else None,
    )
