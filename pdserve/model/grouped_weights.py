"""Quantised weights as the Triton kernels read them: ``kernels.grouped_linear`` has the layout.

Shape letters: O outputs, C channels, G groups, S steps along the channels, H 32 bytes of a panel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pdserve.model.kernels.grouped_linear import grouped_linear, unpacked
from pdserve.model.ops import LinearWeight
from pdserve.model.quantised import GROUP, Q4_1, Q8_0, QuantisedWeight

_BITS = {Q4_1: 4, Q8_0: 8}
READ_FORMATS = frozenset(_BITS)
"""The others have scales of 32 bits, for which a step has no room."""

_SCALE_BYTES = {4: 4, 8: 2}  # at the head of a block: the scale and, with 4 bits, a minimum


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedWeight(LinearWeight):
    """``weight_OC`` has lost its shape: it is [S, O, H] uint8."""

    scales_GO: Tensor
    bits: int
    channel_count: int


def grouped(weight: QuantisedWeight, device: torch.device) -> GroupedWeight:
    """The same numbers in the kernels' order, on the device."""
    bits, (outputs, channels) = _BITS[weight.format], weight.shape
    blocks_OGB = weight.weight_OC.view(outputs, channels // GROUP, weight.format.block_bytes)
    # A step of 4 bits takes two groups: an odd last one gets a neighbour of scale 0.
    blocks_OGB = functional.pad(blocks_OGB, (0, 0, 0, -blocks_OGB.shape[1] % (8 // bits)))
    pairs_OG4 = functional.pad(blocks_OGB[..., : _SCALE_BYTES[bits]], (0, 4 - _SCALE_BYTES[bits]))
    scales_GO = pairs_OG4.contiguous().view(torch.int32)[..., 0].T.contiguous()
    whole_OGB = blocks_OGB[..., _SCALE_BYTES[bits] :]
    if bits == 8:
        packed_OSH = whole_OGB ^ 128  # q + 128, without a sign
    else:
        # GGUF has channels 0 to 15 of a group in the low halves of its bytes, 16 to 31 in the high.
        whole_OGH = torch.cat((whole_OGB & 15, whole_OGB >> 4), dim=-1)
        packed_OSH = whole_OGH[:, ::2] | whole_OGH[:, 1::2] << 4
    return GroupedWeight(
        packed_OSH.transpose(0, 1).contiguous().to(device),
        weight.bias_O,
        packed=True,
        scales_GO=scales_GO.to(device),
        bits=bits,
        channel_count=channels,
    )


def multiplied(x_NC: Tensor, weight: GroupedWeight, *, deterministic: bool) -> Tensor:
    """``x @ weight.T + bias``: [N, O]."""
    return grouped_linear(
        x_NC,
        weight.weight_OC,
        weight.scales_GO,
        weight.bias_O,
        bits=weight.bits,
        group=GROUP,
        deterministic=deterministic,
    )


def unpacked_rows(weight: GroupedWeight, outputs_N: Tensor) -> Tensor:
    """The weights [N, C] of some outputs, in bfloat16."""
    rows_NC = unpacked(
        weight.weight_OC[:, outputs_N],
        weight.scales_GO[:, outputs_N],
        bits=weight.bits,
        group=GROUP,
    )
    return rows_NC[:, : weight.channel_count].to(torch.bfloat16)
