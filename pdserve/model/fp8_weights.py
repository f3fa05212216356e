"""Weights in 8-bit floating point, e4m3, with a scale for each output.

Activations are rounded in the same way, row by row, when they are multiplied
(``kernels.fp8_linear``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.model.ops import LinearWeight

FP8_MAX = 448.0
"""The largest e4m3 number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight(LinearWeight):
    """``weight_OC`` is [O, C] uint8, the bits of e4m3 numbers; times its scale each is a weight."""

    scales_O: Tensor


def in_fp8(weight: LinearWeight) -> Fp8Weight:
    """The nearest weights; ``weight`` is a plain one."""
    bits_OC, scales_O = fp8_rows(weight.weight_OC)
    return Fp8Weight(bits_OC, weight.bias_O, packed=True, scales_O=scales_O)


def fp8_rows(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Bits [N, C] and scales [N]: the greatest of each row becomes ``FP8_MAX``, of two equally near
    numbers the even one is taken."""
    x_float = x_NC.float()
    most_N1 = x_float.abs().amax(dim=1, keepdim=True)
    most_N1[most_N1 == 0] = 1.0  # a row of zeros stays one
    # A tensor: by a plain number torch divides with its reciprocal, on a GPU or even everywhere.
    limit_N1 = torch.full_like(most_N1, FP8_MAX)
    bits_NC = (x_float * (limit_N1 / most_N1)).to(torch.float8_e4m3fn).view(torch.uint8)
    return bits_NC, (most_N1 / limit_N1).squeeze(1)


def fp8_values(bits: Tensor) -> Tensor:
    """In float32."""
    return bits.view(torch.float8_e4m3fn).float()
