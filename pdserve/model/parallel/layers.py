"""The layers of a split model: what parts compute is summed after attention and feed-forward.

Residual, norms and the routing of experts are computed by every rank, from the same bits to the
same bits. The pool is ``pool.PartedPool``'s: the blocks of this rank's parts, part after part.

Shape letters as in ``ops.py``; S parts of this rank.
"""

from collections.abc import Sequence

from torch import Tensor

from pdserve.model.architecture import Architecture
from pdserve.model.layers import LayerByLayer
from pdserve.model.ops import BatchLayout, LayerWeights, Ops
from pdserve.model.parallel.group import Group


class LayersOfParts(LayerByLayer):
    def __init__(
        self,
        ops: Ops,
        parts: Sequence[Sequence[LayerWeights]],
        architecture: Architecture,
        group: Group,
    ) -> None:
        """``parts``: the layers of each part of this rank. ``architecture`` is a part's; the norms
        are the same in all of them."""
        super().__init__(ops, parts[0], architecture)
        self._parts = [LayerByLayer(ops, layers, architecture) for layers in parts]
        self._group = group

    def attention(
        self,
        x_NC: Tensor,
        index: int,
        batch: BatchLayout,
        rope_PD: Tensor,
        pool_PL2GTD: Tensor,
    ) -> Tensor:
        pools = pool_PL2GTD.chunk(len(self._parts))
        return self._group.summed(
            [
                part.attention(x_NC, index, batch, rope_PD, pool)
                for part, pool in zip(self._parts, pools, strict=True)
            ]
        )

    def feed_forward(self, x_NC: Tensor, index: int, batch: BatchLayout) -> Tensor:
        return self._group.summed([part.feed_forward(x_NC, index, batch) for part in self._parts])
