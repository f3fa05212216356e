"""``best_of``: more choices are generated than are given, and the likeliest are given.

A choice's rank is its logprob per token, under the model itself, whatever it was drawn with; at
equal ranks the lower index comes first. So nothing is given before everything is there, and what is
kept until then is bounded by what ``best_of`` choices may generate.
"""

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import cast

from pdserve.cluster.gateway.calls import Call, Piece, Session


def answered(session: Session, call: Call) -> AsyncGenerator[Sequence[Piece]]:
    """The pieces that the client of ``call`` gets, as many at once as are ready. Closing it closes
    the session's iterator.

    Raises:
        PdserveError: as ``Session.generate`` does.
    """
    if call.best_of is None:
        return cast("AsyncGenerator[Sequence[Piece]]", session.bursts(call))
    return _best(session, call, call.best_of)


async def _best(session: Session, call: Call, best_of: int) -> AsyncGenerator[Sequence[Piece]]:
    """The pieces of the ``n`` best choices, best first; with logprobs, asked for or not."""
    scored = replace(call.sampling, logprobs=call.sampling.logprobs or 0)
    choices: list[list[Piece]] = [[] for _ in range(best_of)]
    drawn = replace(call, n=best_of, best_of=None, sampling=scored)
    iterator = cast("AsyncGenerator[Piece]", session.generate(drawn))
    async with aclosing(iterator):
        async for piece in iterator:
            if piece.scores:  # of the prompt, and so of all choices
                yield [piece]
                continue
            choices[piece.choice].append(piece)
    choices.sort(key=_mean_logprob, reverse=True)  # stable: equals stay in order
    for rank, pieces in enumerate(choices[: call.n]):
        if pieces:
            yield [replace(piece, choice=rank) for piece in pieces]


def _mean_logprob(pieces: Sequence[Piece]) -> float:
    logprobs = [
        token.logprob.logprob
        for piece in pieces
        for token in piece.tokens
        if token.logprob is not None
    ]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf
