"""Keys and values in 8 bits: a *row*, one token's key or value in one head, as codes and a scale.

    scale = the row's largest magnitude / the largest code, rounded to bfloat16
    code  = number / scale, rounded to nearest even

The type of the pool says which codes: int8 (whole numbers up to 127), or float8_e4m3fn (up to 448,
with 3 bits behind the first). What is coded is what a pool of the model's dtype would hold, so the
two differ by this file alone; and every code is exact in bfloat16 and float16, so kernels multiply
codes and apply scales to sums.

A scale belongs to one row and no more, because the bits of a token's KV may depend on its prefix
only (``runner.py``). A scale of a block, of a channel or of a tensor would either change with the
tokens that come later or have to be known beforehand.

*Where they lie.* In a block each head's tokens are one piece: T * D codes, and behind them T
scales. ``KvPool.tensor`` shows the codes, as [P, L, 2, G, T, D] like any other pool; ``scales_of``
finds the scales by the strides. So heads and layers are cut from a block as from a plain one.

Shape letters as in ``ops.py``; S stands for whatever comes before the token.
"""

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16

_LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

_SCALE_MIN = 2.0**-100
"""What is smaller is zero: far below any number that matters, far above those that a division
overflows with."""


def is_coded(dtype: torch.dtype) -> bool:
    """Whether a pool of this dtype holds codes and scales."""
    return dtype in _LARGEST_CODE


def head_bytes(block_tokens: int, head_dim: int, dtype: torch.dtype) -> int:
    """Of the keys, or the values, of one head in one block."""
    row_bytes = head_dim * dtype.itemsize
    return block_tokens * (row_bytes + SCALE_DTYPE.itemsize * is_coded(dtype))


def encoded(rows_SD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of ``dtype``, [..., D], and scales, [...]. A NaN or an infinity spoils its row."""
    rows_SD = rows_SD.float()
    scales_S = (rows_SD.abs().amax(-1) / _LARGEST_CODE[dtype]).to(SCALE_DTYPE)
    scales_S = torch.where(scales_S < _SCALE_MIN, torch.zeros_like(scales_S), scales_S)
    # No clamp: a scale that was rounded down makes of the largest code 127.3 or 448.9 at most.
    codes_SD = rows_SD / torch.where(scales_S == 0, torch.ones_like(scales_S), scales_S)[..., None]
    if dtype == torch.int8:
        codes_SD = codes_SD.nan_to_num(0).round()
    return codes_SD.to(dtype), scales_S


def decoded(codes_SD: Tensor, scales_S: Tensor) -> Tensor:
    """The rows that these codes and scales stand for, in float32."""
    return codes_SD.float() * scales_S.float()[..., None]


def scales_of(pool_STD: Tensor) -> Tensor:
    """The scales of a coded pool, or of a part of it that has whole tokens: a view, [..., T]."""
    block_tokens, head_dim = pool_STD.shape[-2:]
    halves_STC = pool_STD.view(SCALE_DTYPE)
    return halves_STC.as_strided(
        pool_STD.shape[:-1],
        (*halves_STC.stride()[:-2], 1),
        halves_STC.storage_offset() + block_tokens * head_dim // SCALE_DTYPE.itemsize,
    )


def put(pool_PGTD: Tensor, blocks_N: Tensor, offsets_N: Tensor, rows_NGD: Tensor) -> None:
    """Keys, or values, of one layer into the pool, coded where it is."""
    if not is_coded(pool_PGTD.dtype):
        pool_PGTD[blocks_N, :, offsets_N] = rows_NGD
        return
    codes_NGD, scales_NG = encoded(rows_NGD, pool_PGTD.dtype)
    # As bytes: torch does not index 8-bit floats.
    pool_PGTD.view(torch.uint8)[blocks_N, :, offsets_N] = codes_NGD.view(torch.uint8)
    scales_of(pool_PGTD)[blocks_N, :, offsets_N] = scales_NG


def taken(pool_P2GTD: Tensor, blocks_B: Tensor) -> Tensor:
    """Keys and values of one layer in these blocks, in float32: [B, 2, G, T, D]."""
    dtype = pool_P2GTD.dtype
    if not is_coded(dtype):
        return pool_P2GTD[blocks_B].float()
    codes_B2GTD = pool_P2GTD.view(torch.uint8)[blocks_B].view(dtype)
    return decoded(codes_B2GTD, scales_of(pool_P2GTD)[blocks_B])
