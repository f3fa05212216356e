"""The output layer of a split model: each part has the logits of a stretch of the vocabulary.

Shape letters: N tokens, C channels, V vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from pdserve.model.ops import LinearWeight, Ops
from pdserve.model.parallel.group import Group
from pdserve.model.parallel.parts import Split


class HeadOfParts:
    def __init__(
        self,
        ops: Ops,
        heads: Sequence[LinearWeight],
        split: Split,
        vocab_size: int,
        group: Group,
    ) -> None:
        """``heads``: of each part of this rank."""
        self._ops = ops
        self._heads = heads
        self._group = group
        self._vocab_size = vocab_size
        self._width = len(split.tokens_of_vocabulary(vocab_size, 0))

    def __call__(self, x_NC: Tensor) -> Tensor:
        """[N, V]: all logits, on every rank."""
        parts = [self._ops.linear(x_NC, head) for head in self._heads]
        # The last part may be narrower, and what is exchanged must be equally wide.
        padded = [functional.pad(part, (0, self._width - part.shape[1])) for part in parts]
        return self._group.side_by_side(padded)[:, : self._vocab_size]
