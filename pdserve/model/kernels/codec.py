"""Device code of the 8-bit KV pool: ``kv_codec`` has the meaning, and gives the same bits.

8-bit floats are taken apart and put together as whole numbers: not every generation of GPUs has
instructions for them, and Triton's interpreter gets the same bits this way.
"""

import torch
import triton
import triton.language as tl

from pdserve.model.kv_codec import is_coded, scales_of

PLAIN, INT8, FP8 = 0, 1, 2
CODECS: dict[torch.dtype | None, int] = {torch.int8: INT8, torch.float8_e4m3fn: FP8}
"""The kernels' constant ``CODEC``, by the pool's dtype; ``PLAIN`` for others."""

POINTERS: dict[torch.dtype | None, torch.dtype] = {
    torch.int8: torch.int8,
    torch.float8_e4m3fn: torch.uint8,
}
"""As what kernels see the codes."""

_INT8, _FP8 = tl.constexpr(INT8), tl.constexpr(FP8)


def parts_of(
    pool_P2GTD: torch.Tensor, model_dtype: torch.dtype
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(codec, what kernels take for the pool, and for its scales: anything without a codec).

    Raises:
        ValueError: the pool holds neither ``model_dtype`` nor codes.
    """
    dtype = pool_P2GTD.dtype
    if not is_coded(dtype):
        if dtype != model_dtype:
            raise ValueError(f"the pool must be {model_dtype} like q, int8 or fp8, got {dtype}")
        return PLAIN, pool_P2GTD, pool_P2GTD
    return CODECS[dtype], pool_P2GTD.view(POINTERS[dtype]), scales_of(pool_P2GTD)


@triton.jit
def decoded(codes, CODEC: tl.constexpr):
    """The numbers that codes are, in a type that holds them exactly; scales are not in it."""
    if CODEC == _FP8:
        bits = codes.to(tl.uint16)
        # The bits of a float16, whose exponents are 8 larger.
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return codes.to(tl.float32)


@triton.jit
def _rounded(x):
    """To whole numbers, ties to even, for magnitudes below 2**22: adding the constant rounds."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def rounded_to_bfloat16(x):
    """Rounded to what bfloat16 holds, ties to even; the interpreter's own conversion cuts off."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    # Beyond infinity lies what is no number; adding to its bits could make one of it.
    finite = (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    return tl.where(finite, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def magnitude_bits(x):
    """Of float32: they compare like the magnitudes, and a NaN is the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _code(x, CODEC: tl.constexpr):
    if CODEC == _FP8:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # 20 of the 23 bits behind the first go, to nearest even; the exponent's bias is 120 less.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2**-6 codes are multiples of 2**-9.
        small = _rounded(tl.minimum(tl.abs(x), 1.0) * 512.0).to(tl.uint32)
        code = (((bits >> 31) << 7) | tl.where(magnitude < 0x3C800000, small, normal)).to(tl.uint8)
    else:
        is_number = magnitude_bits(x) <= 0x7F800000
        code = _rounded(tl.where(is_number, x, 0.0)).to(tl.int8)
    return code


@triton.jit
def scales_for(largest_bits, CODEC: tl.constexpr):
    """Of rows whose largest magnitudes have these bits: what bfloat16 holds, as float32."""
    largest = largest_bits.to(tl.float32, bitcast=True)
    largest_code = tl.full(largest.shape, 127.0 if CODEC == _INT8 else 448.0, tl.float32)
    scale = rounded_to_bfloat16(tl.div_rn(largest, largest_code))
    return tl.where(scale < 7.888609052210118e-31, 0.0, scale)  # 2**-100


@triton.jit
def codes_for(x, scale, CODEC: tl.constexpr):
    """``scale``: of each number, in the shape of ``x``."""
    return _code(tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)), CODEC)


@triton.jit
def encoded(first_GC, second_GC, CODEC: tl.constexpr):
    """(codes, codes, scales [G]) of rows in two halves, float32."""
    most_GC = tl.maximum(magnitude_bits(first_GC), magnitude_bits(second_GC))
    scale_G = scales_for(tl.max(most_GC, axis=1), CODEC)
    scale_GC = tl.broadcast_to(scale_G[:, None], first_GC.shape)
    first_codes = codes_for(first_GC, scale_GC, CODEC)
    second_codes = codes_for(second_GC, scale_GC, CODEC)
    return first_codes, second_codes, scale_G.to(tl.bfloat16)
