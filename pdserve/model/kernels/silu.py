"""The elementwise half of a gated feed-forward layer: silu(gate) * up, or gelu in its tanh form in
silu's place, from the one matrix product that gives both.

Either is the gate times a sigmoid: gelu's of sqrt(8 / pi) * (gate + 0.044715 gate^3).

Shape letters, in this file:
    N  tokens
    F  width of the feed-forward layer
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pdserve.model.kernels.configuration import DTYPES, OPTIONS, Configuration

_TILE = 1024  # columns a program computes: 8 for each of 128 threads, 16 bytes of bf16
_WARPS = 4


@triton.jit
def _gate_mul_kernel(
    gate_up_ptr,  # [N, 2F], rows contiguous: gate, then up
    out_ptr,  # [N, F], contiguous
    gate_up_stride_n,
    F,
    GELU: tl.constexpr,
    TILE: tl.constexpr,
):
    # Grid: (N, ceil(F / TILE)). Program (n, i) computes tile i of token n.
    # 64-bit offsets: 75,000 tokens of a 28,672 wide layer pass 2**31 elements.
    n = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * TILE + tl.arange(0, TILE)  # [TILE]
    in_row = f < F
    row_ptr = gate_up_ptr + n * gate_up_stride_n + f
    gate = tl.load(row_ptr, mask=in_row, other=0.0).to(tl.float32)
    up = tl.load(row_ptr + F, mask=in_row, other=0.0).to(tl.float32)
    inner = gate
    if GELU:
        # Where e^-inner would overflow, the result is next to nothing with e^87 as well.
        inner = tl.maximum(gate * (1.5957691216 + 0.0713548163 * gate * gate), -87.0)
    product = gate / (1.0 + tl.exp(-inner)) * up
    tl.store(out_ptr + n * F + f, product.to(out_ptr.dtype.element_ty), mask=in_row)


def silu_mul(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """silu of the first half of each row, times its second half: float32, rounded once.

    Args:
        gate_up_NF2: [N, 2F], rows contiguous.

    Returns:
        [N, F], contiguous, same dtype.

    Raises:
        ValueError: a shape, dtype or stride other than the above.
    """
    return _gate_mul(gate_up_NF2, gelu=False)


def gelu_mul(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """As ``silu_mul``, with the tanh form of gelu."""
    return _gate_mul(gate_up_NF2, gelu=True)


def _gate_mul(gate_up_NF2: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    if gate_up_NF2.ndim != 2 or gate_up_NF2.shape[1] % 2 or gate_up_NF2.stride(1) != 1:
        raise ValueError(
            f"gate and up must be [N, 2F] with contiguous rows, got {tuple(gate_up_NF2.shape)} "
            f"with strides {gate_up_NF2.stride()}"
        )
    if gate_up_NF2.dtype not in DTYPES:
        raise ValueError(f"gate and up must be one of {DTYPES}, got {gate_up_NF2.dtype}")
    N, F = gate_up_NF2.shape[0], gate_up_NF2.shape[1] // 2
    out_NF = gate_up_NF2.new_empty((N, F))
    if N > 0 and F > 0:
        grid = (N, triton.cdiv(F, _TILE))
        _gate_mul_kernel[grid](
            gate_up_NF2,
            out_NF,
            gate_up_NF2.stride(0),
            F,
            GELU=gelu,
            TILE=_TILE,
            num_warps=_WARPS,
            **OPTIONS,
        )
    return out_NF


def silu_mul_reference(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """What ``silu_mul`` means."""
    gate_NF, up_NF = gate_up_NF2.float().chunk(2, dim=1)
    return (torch.nn.functional.silu(gate_NF) * up_NF).to(gate_up_NF2.dtype)


def gelu_mul_reference(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """What ``gelu_mul`` means."""
    gate_NF, up_NF = gate_up_NF2.double().chunk(2, dim=1)  # 1 + tanh(x) loses digits in float32
    gelu_NF = torch.nn.functional.gelu(gate_NF, approximate="tanh")
    return (gelu_NF * up_NF).to(gate_up_NF2.dtype)


def configurations() -> Iterator[Configuration]:
    for dtype, gelu in itertools.product(DTYPES, (False, True)):
        yield Configuration(
            _gate_mul_kernel,
            "gelu_mul" if gelu else "silu_mul",
            {"gate_up_ptr": dtype, "out_ptr": dtype, "gate_up_stride_n": 28_672, "F": 14_336},
            {"GELU": gelu, "TILE": _TILE},
            {"num_warps": _WARPS},
        )
