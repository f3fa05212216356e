"""Beam search as one would write it down: no blocks, no sharing, every step a whole forward pass.

The rules are vLLM's (``vllm/beam_search.py`` and its OpenAI front): 2 * width candidates for each
beam, an end-of-sequence candidate completes its beam however it ranks, the ``width`` best of the
others go on, all steps are made, and in the end everything is ranked by its score.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LogitsOf = Callable[[Sequence[int]], NDArray[np.float32]]
"""The logits of the token after prompt and answer so far."""


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    logprob: float
    score: float


def beam_search(
    logits_of: LogitsOf,
    prompt: Sequence[int],
    *,
    width: int,
    max_tokens: int,
    eos: Collection[int] = (),
    length_penalty: float = 1.0,
    candidate_count: int | None = None,
) -> list[Answer]:
    """The ``width`` best answers, best first; ``candidate_count`` other than 2 * width."""

    def answer(tokens: tuple[int, ...], logprob: float) -> Answer:
        length = len(prompt) + len(tokens) - (tokens[-1] in eos)
        return Answer(tokens, logprob, logprob / length**length_penalty)

    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    completed: list[Answer] = []
    for _ in range(max_tokens):
        candidates = []
        for tokens, logprob in beams:
            logprobs = _log_softmax(logits_of((*prompt, *tokens)))
            for token in np.argsort(-logprobs, kind="stable")[: candidate_count or 2 * width]:
                candidates.append(((*tokens, int(token)), logprob + float(logprobs[token])))
        completed += [answer(*one) for one in candidates if one[0][-1] in eos]
        going_on = [one for one in candidates if one[0][-1] not in eos]
        beams = sorted(going_on, key=lambda one: -one[1])[:width]
    completed += [answer(*one) for one in beams]
    return sorted(completed, key=lambda one: -one.score)[:width]


def _log_softmax(logits_V: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted_V = logits_V.astype(np.float64) - float(logits_V.max())
    logprobs_V: NDArray[np.float64] = shifted_V - np.log(np.exp(shifted_V).sum())
    return logprobs_V
