"""Weights quantised in groups of 32 channels of an output, as GGUF files hold them.

A group is a *block* of bytes: a scale, perhaps a minimum, and a whole number q for each channel;
``weight = scale * q + minimum``. Two formats are GGUF's, Q4_1 (q from 0 to 15, a minimum) and Q8_0
(q from -128 to 127, no minimum): a block of Q4_0, whose weights are ``scale * (q - 8)``, is one of
Q4_1 with the minimum ``-8 * scale``. Two more are ours, for what has more digits than float16: the
same numbers with scales and minima in float32, and in 8 bits a scale for each 16 channels. Q4_K,
Q6_K, AWQ and GPTQ are kept in them, without a change of any weight. An output's row is a sequence
of blocks, so rows may be put in another order and below one another.

Arithmetic on GGUF's blocks is that of the ``gguf`` package.

Shape letters: O outputs, C channels, B bytes of a row, G groups of a row, H halves of groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pdserve.model.k_quants import unpacked_q4_k, unpacked_q6_k
from pdserve.model.ops import LinearWeight

GROUP = 32
"""Channels with one scale."""

_SCALE_MAX = 65504.0
"""The largest float16: nothing beyond it can be a minimum."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    name: str
    """As GGUF says it, where it is GGUF's."""

    bits: int
    """Of a number."""

    block_bytes: int


Q4_1 = BlockFormat("Q4_1", 4, 20)
Q8_0 = BlockFormat("Q8_0", 8, 34)

Q4_WIDE = BlockFormat("4 bits, float32 scales", 4, 24)
"""Scale and minimum in float32, then the numbers as in Q4_1. A scale has at most 20 significant
bits, so that its products are exact: fused or not, a weight is rounded once."""

Q8_WIDE = BlockFormat("8 bits, float32 scales", 8, 40)
"""Two scales in float32, one for each half of the channels, then the numbers as in Q8_0."""

_WIDE = {4: Q4_WIDE, 8: Q8_WIDE}


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
        if self.format == Q4_WIDE:
            return _dequantised_nibbles(self.weight_OC)
        if self.format == Q8_WIDE:
            return _dequantised_bytes(self.weight_OC)
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
    if type_name == "Q4_K":
        return wide_nibbles(*unpacked_q4_k(blocks_OB))
    if type_name == "Q6_K":
        return wide_bytes(*unpacked_q6_k(blocks_OB))
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


def wide_nibbles(scale_OG: Tensor, minimum_OG: Tensor, number_OC: Tensor) -> QuantisedWeight:
    """``Q4_WIDE`` of float32 scales and minima for each 32 channels, and numbers from 0 to 15."""
    halves_OG2X = number_OC.to(torch.uint8).reshape(number_OC.shape[0], -1, 2, GROUP // 2)
    pairs_OGX = halves_OG2X[:, :, 0] | halves_OG2X[:, :, 1] << 4
    ends_OG2 = torch.stack((scale_OG, minimum_OG), dim=-1)
    return QuantisedWeight(_blocks(ends_OG2, pairs_OGX), format=Q4_WIDE)


def wide_bytes(scale_OH: Tensor, number_OC: Tensor) -> QuantisedWeight:
    """``Q8_WIDE`` of float32 scales for each 16 channels, and numbers of int8."""
    numbers_OGX = _by_group(number_OC.view(torch.uint8), GROUP)
    return QuantisedWeight(_blocks(_by_group(scale_OH, 2), numbers_OGX), format=Q8_WIDE)


def joined(parts: Sequence[QuantisedWeight]) -> QuantisedWeight | None:
    """One below the other, widened where some are; None if their numbers differ in bits."""
    if len({part.format.bits for part in parts}) != 1:
        return None
    if len({part.format for part in parts}) != 1:
        parts = [_widened(part) for part in parts]
    return QuantisedWeight(torch.cat([part.weight_OC for part in parts]), format=parts[0].format)


def _widened(weight: QuantisedWeight) -> QuantisedWeight:
    """The same weights with scales in float32."""
    if weight.format == _WIDE[weight.format.bits]:
        return weight
    blocks_OGX = _by_group(weight.weight_OC, weight.format.block_bytes)
    if weight.format == Q4_1:
        ends_OG2, numbers_OGX = blocks_OGX[..., :4], blocks_OGX[..., 4:]
    else:
        ends_OG2, numbers_OGX = blocks_OGX[..., [0, 1, 0, 1]], blocks_OGX[..., 2:]
    ends_OG2 = ends_OG2.contiguous().view(torch.float16).float()
    return QuantisedWeight(_blocks(ends_OG2, numbers_OGX), format=_WIDE[weight.format.bits])


def _by_group(rows_OX: Tensor, width: int) -> Tensor:
    """[O, G, width]."""
    return rows_OX.reshape(rows_OX.shape[0], -1, width)


def _blocks(ends_OG2: Tensor, numbers_OGX: Tensor) -> Tensor:
    """[O, B]: what stands before a group's numbers in float32, and their bytes."""
    ends = ends_OG2.float().contiguous().view(torch.uint8)
    return torch.cat((ends, numbers_OGX), dim=-1).flatten(1)


def _dequantised_nibbles(blocks_OB: Tensor) -> Tensor:
    blocks_OGX = _by_group(blocks_OB, Q4_WIDE.block_bytes)
    ends_OG2, pairs_OGX = blocks_OGX[..., :8].contiguous().view(torch.float32), blocks_OGX[..., 8:]
    numbers = torch.cat((pairs_OGX & 15, pairs_OGX >> 4), dim=-1).float()
    return (ends_OG2[..., :1] * numbers + ends_OG2[..., 1:]).flatten(1)


def _dequantised_bytes(blocks_OB: Tensor) -> Tensor:
    blocks_OGX = _by_group(blocks_OB, Q8_WIDE.block_bytes)
    scale_OG2 = blocks_OGX[..., :8].contiguous().view(torch.float32)
    numbers_OGC = blocks_OGX[..., 8:].contiguous().view(torch.int8).float()
    return (scale_OG2.repeat_interleave(GROUP // 2, dim=-1) * numbers_OGC).flatten(1)


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
