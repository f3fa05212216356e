"""What may be asked of a prompt itself. Such a request generates nothing: it ends where its prompt
is computed, at a prefill worker, and decode never hears of it.

    Pooling   one vector of the whole prompt, for searching and comparing texts
    Scoring   how likely each of its tokens was where it stands, from one of them on, and how likely
              some would be behind the last

Values of these travel in ``messages.Request``; ``PromptDelta`` is the answer's way back.
"""

from dataclasses import dataclass
from enum import StrEnum

from pdserve.ids import RequestId


class PoolingKind(StrEnum):
    """Which of the last layer's hidden states make the vector."""

    LAST = "last"  # the last token's, which has seen all others
    MEAN = "mean"  # the mean of all


@dataclass(frozen=True, slots=True)
class Pooling:
    kind: PoolingKind = PoolingKind.LAST
    normalize: bool = True  # to length 1

    @property
    def reads_all(self) -> bool:
        """Whether each token has to be computed for it: cached blocks hold no hidden states."""
        return self.kind is PoolingKind.MEAN


@dataclass(frozen=True, slots=True)
class Scoring:
    """``PromptScore`` of the tokens from ``first`` on, and one more where there are candidates."""

    top: int = 0  # beside each token's own score, the so many best in its place
    first: int = 1  # of the prompt's tokens; what is cached before it need not be computed
    candidates: tuple[int, ...] = ()
    """To be scored behind the prompt: the score's ``top`` has them in this order, whatever else
    could stand there, and its own logprob and rank are those of the likeliest."""

    @property
    def reads_all(self) -> bool:
        """As ``Pooling.reads_all``: cached blocks hold no logits."""
        return self.first <= 1

    def end(self, prompt_tokens: int) -> int:
        """Behind the last token that has a score, which may be one behind the prompt."""
        return prompt_tokens + bool(self.candidates)


PromptTask = Pooling | Scoring


@dataclass(frozen=True, slots=True)
class PromptScore:
    """Of one token, by the model alone, after all tokens before it."""

    logprob: float
    rank: int  # among the whole vocabulary, from 1; equals share the best rank of them
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), best first, or as they were asked


@dataclass(frozen=True, slots=True)
class PromptDelta:
    """Prefill → gateway: what is known of a prompt so far. The ``TokenDelta`` without tokens that
    ends the request comes behind the last one. Exactly-once by (request, attempt, first)."""

    request: RequestId
    attempt: int
    first: int = 1  # scores[0] is that of the prompt's token with this index
    scores: tuple[PromptScore, ...] = ()
    vector: bytes = b""  # float32, little-endian
