"""What may be asked of a prompt itself. Such a request generates nothing: it ends where its prompt
is computed, at a prefill worker, and decode never hears of it.

    Pooling   one vector of the whole prompt, for searching and comparing texts
    Scoring   how likely each of its tokens was where it stands

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
    top: int = 0  # beside each token's own score, the so many best in its place

    @property
    def reads_all(self) -> bool:
        """As ``Pooling.reads_all``: cached blocks hold no logits."""
        return True


PromptTask = Pooling | Scoring


@dataclass(frozen=True, slots=True)
class PromptScore:
    """Of one token, by the model alone, after all tokens before it."""

    logprob: float
    rank: int  # among the whole vocabulary, from 1; equals share the best rank of them
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), best first


@dataclass(frozen=True, slots=True)
class PromptDelta:
    """Prefill → gateway: what is known of a prompt so far. The ``TokenDelta`` without tokens that
    ends the request comes behind the last one. Exactly-once by (request, attempt, first)."""

    request: RequestId
    attempt: int
    first: int = 1  # scores[0] is that of the prompt's token with this index
    scores: tuple[PromptScore, ...] = ()
    vector: bytes = b""  # float32, little-endian
