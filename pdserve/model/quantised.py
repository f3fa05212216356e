"""Weights quantised in groups of 32 channels of an output, as GGUF files hold them.

A group is a *block* of bytes: a scale, perhaps a minimum, and a whole number q for each channel;
``weight = scale * q + minimum``. Two formats are enough, Q4_1 (q from 0 to 15, a minimum) and Q8_0
(q from -128 to 127, no minimum): a block of Q4_0, whose weights are ``scale * (q - 8)``, is one of
Q4_1 with the minimum ``-8 * scale``. An output's row is a sequence of blocks, so rows may be put in
another order and below one another without a change.

Arithmetic on blocks is that of the ``gguf`` package.

Shape letters: O outputs, C channels, B bytes of a row, G groups of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pdserve.model.ops import LinearWeight

GROUP = 32
"""Channels with one scale."""

_SCALE_MAX = 65504.0
"""The largest float16: nothing beyond it can be a minimum."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    name: str
    """As GGUF says it."""

    block_bytes: int


Q4_1 = BlockFormat("Q4_1", 20)
Q8_0 = BlockFormat("Q8_0", 34)


@dataclass(frozen=True, slots=True)
class QuantisedWeight(LinearWeight):
    """``weight_OC`` is [O, B] uint8: the blocks of each row in order."""

    format: BlockFormat = Q8_0

    @property
    def shape(self) -> tuple[int, int]:
        """O and C."""
        rows, row_bytes = self.weight_OC.shape
        return rows, row_bytes // self.format.block_bytes * GROUP

    def dequantised(self) -> Tensor:
        """[O, C] in float32."""
        from gguf import GGMLQuantizationType, dequantize

        values = dequantize(self.weight_OC.numpy(), GGMLQuantizationType[self.format.name])
        return torch.from_numpy(np.asarray(values, dtype=np.float32))


def from_blocks(type_name: str, blocks_OB: Tensor) -> QuantisedWeight | None:
    """Rows of blocks as a GGUF file has them; None if the type is none of ours.

    Args:
        type_name: GGUF's.
        blocks_OB: uint8.
    """
    if type_name == "Q4_0":
        return _with_minimum(blocks_OB)
    for known in (Q4_1, Q8_0):
        if type_name == known.name:
            return QuantisedWeight(blocks_OB, format=known)
    return None


def quantised(values_OC: Tensor, target: BlockFormat) -> QuantisedWeight | None:
    """The nearest in ``target``, group by group; None where that has no such weights: channels
    that do not fill their last group, or values that are beyond float16 or no numbers."""
    from gguf import GGMLQuantizationType, quantize

    if values_OC.ndim != 2 or values_OC.shape[1] % GROUP:
        return None
    if not values_OC.abs().max() <= _SCALE_MAX:
        return None
    blocks = quantize(values_OC.float().contiguous().numpy(), GGMLQuantizationType[target.name])
    return QuantisedWeight(torch.from_numpy(blocks), format=target)


def joined(parts: Sequence[QuantisedWeight]) -> QuantisedWeight | None:
    """One below the other; None if their formats differ."""
    if len({part.format for part in parts}) != 1:
        return None
    return QuantisedWeight(torch.cat([part.weight_OC for part in parts]), format=parts[0].format)


def _with_minimum(blocks_OB: Tensor) -> QuantisedWeight | None:
    """Q4_0 as Q4_1, or None. The minimum is exact, since eight times a float16 has the same digits;
    but that of a scale beyond 8,188, which no model has, is no float16."""
    blocks_OGB = blocks_OB.reshape(blocks_OB.shape[0], -1, Q4_1.block_bytes - 2)
    scale_OG = blocks_OGB[..., :2].contiguous().view(torch.float16)
    minimum_OG = (scale_OG.float() * -8).half()
    if not minimum_OG.isfinite().all():
        return None
    parts = (blocks_OGB[..., :2], minimum_OG.view(torch.uint8), blocks_OGB[..., 2:])
    return QuantisedWeight(torch.cat(parts, dim=-1).flatten(1), format=Q4_1)
