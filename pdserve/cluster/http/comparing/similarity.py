"""How alike two texts are: the cosine of the angle between their vectors. Pure.

A causal language model has no head that was trained to judge a pair, as a cross-encoder's is. What
it has is a vector of each text, the one that ``/v1/embeddings`` gives. The score is their cosine,
from -1 to 1, as vLLM's is for models that embed: it orders texts, and is no probability.
"""

from collections.abc import Sequence

import numpy as np

from pdserve.cluster.gateway.embedding import Vector


def cosine(one: Vector, other: Vector) -> float:
    """From -1 to 1; 0 where one of them has no length, and so no direction.

    Args:
        one: float32 [C], of any length; summed in float64, so that a text is as near to itself as
            can be told.
    """
    a, b = one.astype(np.float64), other.astype(np.float64)
    lengths = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    if lengths == 0.0:
        return 0.0
    return min(1.0, max(-1.0, float(a @ b) / lengths))


def scores_of_pairs(left: Sequence[Vector], right: Sequence[Vector]) -> list[float]:
    """Of each on the right with the one beside it, or with the only one on the left."""
    beside = [*left] * len(right) if len(left) == 1 else left
    return [cosine(*pair) for pair in zip(beside, right, strict=True)]


def ranked(scores: Sequence[float], top: int | None) -> list[int]:
    """The indices of the ``top`` best, best first; equals keep the order they came in.

    Args:
        top: None: all.
    """
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return order[:top]
