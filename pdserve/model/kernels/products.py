"""The matrix product inside kernels."""

import triton
import triton.language as tl


@triton.jit
def dot(a_YK, b_KZ, out_YZ, INTERPRETED: tl.constexpr):
    """out + a @ b, products exact and sums in float32.

    Triton's interpreter multiplies the bits of bf16 as if they were integers, and numpy's float32
    product of a row depends on where in the tile the row lies. float64 cures both.
    """
    if INTERPRETED:
        a_double = a_YK.to(tl.float32).to(tl.float64)
        b_double = b_KZ.to(tl.float32).to(tl.float64)
        return out_YZ + tl.dot(a_double, b_double, out_dtype=tl.float64).to(tl.float32)
    return tl.dot(a_YK, b_KZ, out_YZ, input_precision="ieee")
