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
def _bfloat16(x):
    """Rounded to what bfloat16 holds, ties to even; the interpreter's own conversion cuts off."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    # Beyond infinity lies what is no number; adding to its bits could make one of it.
    finite = (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    return tl.where(finite, bits.to(tl.float32, bitcast=True), x)


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
        code = _rounded(x).to(tl.int8)
    return code


@triton.jit
def encoded(first_GC, second_GC, CODEC: tl.constexpr):
    """(codes, codes, scales [G]) of rows in two halves, float32."""
    # Bits of magnitudes compare like numbers, and a NaN is the largest.
    first_bits = first_GC.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    second_bits = second_GC.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    most_G = tl.max(tl.maximum(first_bits, second_bits), axis=1).to(tl.float32, bitcast=True)
    largest_code = tl.full(most_G.shape, 127.0 if CODEC == _INT8 else 448.0, tl.float32)
    scale_G = _bfloat16(tl.div_rn(most_G, largest_code))
    scale_G = tl.where(scale_G < 7.888609052210118e-31, 0.0, scale_G)  # 2**-100
    divisor_G1 = tl.where(scale_G == 0.0, 1.0, scale_G)[:, None]
    divisor_GC = tl.broadcast_to(divisor_G1, first_GC.shape)
    first_codes = _code(tl.div_rn(first_GC, divisor_GC), CODEC)
    second_codes = _code(tl.div_rn(second_GC, divisor_GC), CODEC)
    return first_codes, second_codes, scale_G.to(tl.bfloat16)
