"""Weights as the C++ kernels read them: panels of bfloat16, or of a quantised format.

Whatever the format, a layer's results are those of its weights in bfloat16, to the bit
(``cpu/panels.h``): a quantised weight takes a third to two thirds of the memory, and no other part.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.model.ops import LinearWeight
from pdserve.model.quantised import Q4_1, Q4_WIDE, Q8_0, Q8_WIDE, QuantisedWeight

_BFLOAT16 = 0
_FORMATS = {Q4_1: 1, Q8_0: 2, Q4_WIDE: 3, Q8_WIDE: 4}


@dataclass(frozen=True, slots=True)
class Panels(LinearWeight):
    """``weight_OC`` has lost its shape: uint8, all panels in order."""

    format: int = _BFLOAT16
    """As ``with_format`` of the kernels counts them."""

    output_count: int = 0
    channel_count: int = 0

    @property
    def element_count(self) -> int:
        return self.output_count * self.channel_count


def pack_panels(library: ctypes.CDLL, weight: LinearWeight) -> Panels:
    """``weight`` is of bfloat16, or quantised."""
    if isinstance(weight, QuantisedWeight):
        code, (outputs, channels) = _FORMATS[weight.format], weight.shape
    else:
        assert weight.weight_OC.dtype == torch.bfloat16
        code, (outputs, channels) = _BFLOAT16, weight.weight_OC.shape
    stored = weight.weight_OC.contiguous()
    packed = torch.zeros(
        library.pdserve_packed_bytes(code, outputs, channels), dtype=torch.uint8
    )  # behind the last output and the last channel zeros remain
    library.pdserve_pack_linear(
        *(code, stored.data_ptr(), packed.data_ptr(), outputs, channels, torch.get_num_threads())
    )
    return Panels(packed, weight.bias_O, True, code, outputs, channels)


def unpacked_rows(library: ctypes.CDLL, panels: Panels, outputs_N: Tensor, threads: int) -> Tensor:
    """The weights [N, C] of some outputs of a quantised matrix, in bfloat16.

    Args:
        outputs_N: int64; not checked, others read foreign memory.
    """
    outputs_N = outputs_N.contiguous()
    out_NC = torch.empty((outputs_N.numel(), panels.channel_count), dtype=torch.bfloat16)
    library.pdserve_unpacked_rows(
        *(panels.format, outputs_N.data_ptr(), panels.weight_OC.data_ptr(), out_NC.data_ptr()),
        *(outputs_N.numel(), panels.channel_count, threads),
    )
    return out_NC
