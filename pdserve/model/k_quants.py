"""GGUF's Q4_K and Q6_K taken apart: numbers, scales and minima.

A *super-block* is 256 channels of an output with one or two float16 scales, of which each group of
channels has a small whole multiple: 32 channels a scale and a minimum in Q4_K, 16 a scale in Q6_K.
The products have up to 18 bits, so they are exact in float32 and no longer float16.

Sources: ``ggml-quants.h`` of llama.cpp for the layout; the ``gguf`` package for the arithmetic,
with whose results the tests compare bit for bit.

Shape letters: O outputs, B bytes of a row, S super-blocks of a row, C channels, G groups of 32,
H groups of 16.
"""

import torch
from torch import Tensor

_CHANNELS = 256
_Q4_K_BYTES, _Q6_K_BYTES = 144, 210  # of a super-block


def unpacked_q4_k(blocks_OB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``weight = scale * number + minimum``: scale and minimum [O, G] float32, numbers [O, C] uint8
    from 0 to 15."""
    blocks_OSB = blocks_OB.reshape(blocks_OB.shape[0], -1, _Q4_K_BYTES)
    scale_OS1, minimum_OS1 = _float16(blocks_OSB[..., :2]), _float16(blocks_OSB[..., 2:4])
    # Of 12 bytes the first 4 have six bits of the scales 0 to 3 and two of 4 to 7, the next 4 the
    # same of the minima, and the last 4 the lower halves of 4 to 7 of both.
    of_scales, of_minima, of_both = torch.split(blocks_OSB[..., 4:16], 4, dim=-1)
    scales_OS8 = torch.cat((of_scales & 63, of_both & 15 | of_scales >> 2 & 48), dim=-1)
    minima_OS8 = torch.cat((of_minima & 63, of_both >> 4 | of_minima >> 2 & 48), dim=-1)
    # 32 bytes each for two groups: one in the lower halves, the next in the upper.
    bytes_OS432 = blocks_OSB[..., 16:].reshape(*blocks_OSB.shape[:2], 4, 32)
    numbers_OC = torch.stack((bytes_OS432 & 15, bytes_OS432 >> 4), dim=-2).flatten(1)
    return (
        (scale_OS1 * scales_OS8.float()).flatten(1),
        -(minimum_OS1 * minima_OS8.float()).flatten(1),
        numbers_OC,
    )


def unpacked_q6_k(blocks_OB: Tensor) -> tuple[Tensor, Tensor]:
    """``weight = scale * number``: scale [O, H] float32, numbers [O, C] int8 from -32 to 31."""
    blocks_OSB = blocks_OB.reshape(blocks_OB.shape[0], -1, _Q6_K_BYTES)
    lower_OSB, upper_OSB, scales_OS16, scale_OS1 = torch.split(blocks_OSB, [128, 64, 16, 2], dim=-1)
    # Twice 128 channels: 64 bytes have four bits of them, first the lower halves, and 32 bytes the
    # other two, of every fourth part.
    lower_OS264 = lower_OSB.reshape(*lower_OSB.shape[:2], 2, 64)
    low_OS2X = torch.cat((lower_OS264 & 15, lower_OS264 >> 4), dim=-1)
    upper_OS232 = upper_OSB.reshape(*upper_OSB.shape[:2], 2, 32)
    high_OS2X = torch.cat([upper_OS232 >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    numbers_OC = ((low_OS2X | high_OS2X << 4).to(torch.int8) - 32).flatten(1)
    scales = scales_OS16.contiguous().view(torch.int8).float()
    return (_float16(scale_OS1) * scales).flatten(1), numbers_OC


def _float16(bytes_OS2: Tensor) -> Tensor:
    return bytes_OS2.contiguous().view(torch.float16).float()
