"""Root-mean-square normalisation, alone and fused with the residual addition before it.

All arithmetic is float32, and a result is rounded once. The sum of x and the residual is rounded
before it is normalised, because the rounded sum is what the next layer adds to.

One tile holds whole rows and its shape depends on C alone, so the order in which a row's squares
are added, and with it the row's bits, depends on nothing but the row.

Shape letters, in this file:
    N  rows: tokens, or tokens * heads for the q and k norms
    C  channels: the hidden width, or head_dim
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pdserve.model.kernels.configuration import DTYPES, HEAD_DIMS, OPTIONS, Configuration

C_MAX = 16_384  # a row must fit one program: 64 KiB of float32 over 512 threads is 32 each
_TILE = 1024  # elements of a program where rows are shorter than this


@triton.jit(do_not_specialize=["N"])
def _rms_norm_kernel(
    x_ptr,  # [N, C], rows contiguous
    residual_ptr,  # [N, C], rows contiguous; read only if HAS_RESIDUAL
    weight_ptr,  # [C]
    out_ptr,  # [N, C], contiguous
    sum_ptr,  # [N, C], contiguous: x + residual; written only if HAS_RESIDUAL
    x_stride_n,
    residual_stride_n,
    N,
    C,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_C: tl.constexpr,  # >= C
):
    # Grid: (ceil(N / ROWS),). Program i normalises rows i * ROWS to (i + 1) * ROWS.
    # 64-bit offsets: 262,144 tokens of 8,192 channels are 2**31 elements.
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
    c = tl.arange(0, TILE_C)[None, :]  # [1, TILE_C]
    inside = (n < N) & (c < C)
    x = tl.load(x_ptr + n * x_stride_n + c, mask=inside, other=0.0)
    x_float = x.to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + n * residual_stride_n + c, mask=inside, other=0.0)
        total = (x_float + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + n * C + c, total, mask=inside)
        x_float = total.to(tl.float32)
    mean_square = tl.sum(x_float * x_float, axis=1) / C  # [ROWS]
    normed = x_float * tl.rsqrt(mean_square + eps)[:, None]
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * C + c, (normed * weight).to(x.dtype), mask=inside)


def rms_norm(x_NC: torch.Tensor, weight_C: torch.Tensor, eps: float) -> torch.Tensor:
    """Each row divided by the root of its mean square (plus ``eps``), times ``weight_C``.

    Args:
        x_NC: [N, C], rows contiguous, C at most ``C_MAX``.
        weight_C: [C], contiguous, same dtype and device.

    Returns:
        [N, C], contiguous, same dtype.

    Raises:
        ValueError: a shape, dtype, stride or device other than the above.
    """
    _check(x_NC, weight_C)
    out_NC = x_NC.new_empty(x_NC.shape)
    _launch(x_NC, x_NC, weight_C, out_NC, out_NC, eps, has_residual=False)
    return out_NC


def rms_norm_reference(x_NC: torch.Tensor, weight_C: torch.Tensor, eps: float) -> torch.Tensor:
    """What ``rms_norm`` means."""
    x_float = x_NC.float()
    normed = x_float * torch.rsqrt(x_float.square().mean(dim=1, keepdim=True) + eps)
    return (normed * weight_C.float()).to(x_NC.dtype)


def add_rms_norm(
    x_NC: torch.Tensor, residual_NC: torch.Tensor, weight_C: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + residual in the model's dtype, and the norm of that sum, in one pass over memory.

    Args:
        x_NC: as for ``rms_norm``.
        residual_NC: [N, C], rows contiguous, same dtype and device.

    Returns:
        (norm of the sum, the sum), both [N, C], contiguous and new: the arguments are unchanged.

    Raises:
        ValueError: a shape, dtype, stride or device other than the above.
    """
    _check(x_NC, weight_C)
    if (
        residual_NC.shape != x_NC.shape
        or residual_NC.dtype != x_NC.dtype
        or residual_NC.device != x_NC.device
        or (residual_NC.stride(1) != 1 and residual_NC.shape[1] > 1)
    ):
        raise ValueError(
            f"the residual must be {tuple(x_NC.shape)} {x_NC.dtype} on {x_NC.device} with "
            f"contiguous rows, got {tuple(residual_NC.shape)} {residual_NC.dtype} on "
            f"{residual_NC.device} with strides {residual_NC.stride()}"
        )
    out_NC, sum_NC = x_NC.new_empty(x_NC.shape), x_NC.new_empty(x_NC.shape)
    _launch(x_NC, residual_NC, weight_C, out_NC, sum_NC, eps, has_residual=True)
    return out_NC, sum_NC


def add_rms_norm_reference(
    x_NC: torch.Tensor, residual_NC: torch.Tensor, weight_C: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``add_rms_norm`` means."""
    sum_NC = x_NC + residual_NC
    return rms_norm_reference(sum_NC, weight_C, eps), sum_NC


def _check(x_NC: torch.Tensor, weight_C: torch.Tensor) -> None:
    if x_NC.ndim != 2 or not 0 < x_NC.shape[1] <= C_MAX or x_NC.stride(1) != 1:
        raise ValueError(
            f"x must be [N, C] with contiguous rows and 0 < C <= {C_MAX}, got {tuple(x_NC.shape)} "
            f"with strides {x_NC.stride()}"
        )
    if x_NC.dtype not in DTYPES:
        raise ValueError(f"x must be one of {DTYPES}, got {x_NC.dtype}")
    if (
        weight_C.shape != x_NC.shape[1:]
        or weight_C.dtype != x_NC.dtype
        or weight_C.device != x_NC.device
        or not weight_C.is_contiguous()
    ):
        raise ValueError(
            f"the weight must be contiguous [{x_NC.shape[1]}] {x_NC.dtype} on {x_NC.device}, got "
            f"{tuple(weight_C.shape)} {weight_C.dtype} on {weight_C.device}"
        )


def _tiles(C: int) -> tuple[int, int, int]:
    """(rows and columns of a program's tile, warps), from the row's width alone."""
    tile_c = triton.next_power_of_2(C)
    return max(1, _TILE // tile_c), tile_c, min(16, max(4, tile_c // 512))


def _launch(
    x_NC: torch.Tensor,
    residual_NC: torch.Tensor,
    weight_C: torch.Tensor,
    out_NC: torch.Tensor,
    sum_NC: torch.Tensor,
    eps: float,
    *,
    has_residual: bool,
) -> None:
    N, C = x_NC.shape
    if N == 0:
        return
    rows, tile_c, warps = _tiles(C)
    _rms_norm_kernel[(triton.cdiv(N, rows),)](
        x_NC,
        residual_NC,
        weight_C,
        out_NC,
        sum_NC,
        x_NC.stride(0),
        residual_NC.stride(0),
        N,
        C,
        eps,
        HAS_RESIDUAL=has_residual,
        ROWS=rows,
        TILE_C=tile_c,
        num_warps=warps,
        **OPTIONS,
    )


def configurations() -> Iterator[Configuration]:
    widths = [(C, True) for C in (576, 2048, 4096, 8192)] + [(C, False) for C in (*HEAD_DIMS, 4096)]
    for dtype in DTYPES:
        for C, has_residual in widths:
            rows, tile_c, warps = _tiles(C)
            pointers = ("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "sum_ptr")
            yield Configuration(
                _rms_norm_kernel,
                f"{'add_' if has_residual else ''}rms_norm C={C}",
                {
                    **dict.fromkeys(pointers, dtype),
                    "x_stride_n": C,
                    "residual_stride_n": C,
                    "N": 64,
                    "C": C,
                    "eps": 1e-5,
                },
                {"HAS_RESIDUAL": has_residual, "ROWS": rows, "TILE_C": tile_c},
                {"num_warps": warps},
            )
