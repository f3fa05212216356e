"""Linear layers in 8-bit floating point: weights and activations e4m3, sums float32.

A weight has a scale per output, an activation one per token, made of its row alone when it is
computed: the greatest of a row becomes 448, the largest e4m3 number. Products of two e4m3 numbers
are exact in float32. They are multiplied as float16, whose subnormals make the change of exponent
exact: half of the bytes of plain weights, at the speed of their matrix units.

*A row's bits* depend on that row alone, as in ``grouped_linear``: one order of products, no sum
split, one matrix instruction. ``deterministic=False`` gives many rows larger tiles and, from
compute capability 8.9 on, the matrix units for e4m3, which have twice the rate. Hopper's keep fewer
digits of a sum than float32 has; so what they add up is added to a float32 sum after every step of
128 channels.

Shape letters, in this file:
    N  tokens    C  channels    O  outputs
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pdserve.model.fp8_weights import FP8_MAX, fp8_rows, fp8_values
from pdserve.model.kernels.configuration import OPTIONS, Configuration
from pdserve.model.kernels.grouped_linear import DTYPES
from pdserve.model.kernels.linear_tiles import Tiles, TilesByRows
from pdserve.model.kernels.products import dot

FP8_CAPABILITY = 89
"""The first compute capability whose matrix units take e4m3."""

_CHANNELS = 128  # of a step
_ROUND_TILE = 4096
_ROUND_WARPS = 8

_FP8_MAX = tl.constexpr(FP8_MAX)
_FP16_FACTOR = tl.constexpr(2.0**16)  # of a product whose factors are both 2**8 too small
_LEAST_NORMAL = tl.constexpr(2.0**-6)
_TWO_23 = tl.constexpr(2.0**23)

TILES = TilesByRows(
    few=Tiles(rows=16, outputs=32, warps=4, stages=4),
    many=Tiles(rows=32, outputs=128, warps=4, stages=3),
    large=Tiles(rows=128, outputs=128, warps=8, stages=3),
)


@triton.jit
def _e4m3(value):
    """The bits of the nearest e4m3 number, of two the even one; of at most 448 and a rounding."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    normal = (rounded >> 20) - (120 << 3)  # exponents begin at 2**-7 instead of 2**-127
    small = tl.abs(value)
    subnormal = (small * 512.0 + _TWO_23).to(tl.int32, bitcast=True) & 15
    coded = tl.where(small < _LEAST_NORMAL, subnormal, normal)
    return (coded | ((bits >> 24) & 128)).to(tl.uint8)


@triton.jit
def round_rows_kernel(
    x_ptr,  # [N, C], rows contiguous
    out_ptr,  # [N, C] uint8, contiguous
    scales_ptr,  # [N] float32
    x_stride_n,
    C,
    TILE: tl.constexpr,
):
    # Grid: (N,). Program n reads its row twice.
    n = tl.program_id(0).to(tl.int64)
    x_ptr += n * x_stride_n
    c = tl.arange(0, TILE)
    most_C = tl.zeros([TILE], tl.float32)
    for start in range(0, C, TILE):
        x_C = tl.load(x_ptr + start + c, mask=start + c < C, other=0.0).to(tl.float32)
        most_C = tl.maximum(most_C, tl.abs(x_C))
    most = tl.max(most_C, axis=0)
    most = tl.where(most > 0.0, most, 1.0)  # a row of zeros stays one
    tl.store(scales_ptr + n, tl.div_rn(most, _FP8_MAX))
    factor = tl.div_rn(tl.full([], _FP8_MAX, tl.float32), most)
    for start in range(0, C, TILE):
        x_C = tl.load(x_ptr + start + c, mask=start + c < C, other=0.0).to(tl.float32)
        tl.store(out_ptr + n * C + start + c, _e4m3(x_C * factor), mask=start + c < C)


@triton.jit
def _as_float16(bits):
    """The e4m3 number times 2**-8."""
    wide = bits.to(tl.int16)
    return (((wide & 128) << 8) | ((wide & 127) << 7)).to(tl.float16, bitcast=True)


@triton.jit(do_not_specialize=["N"])
def fp8_linear_kernel(
    x_ptr,  # [N, C] uint8: e4m3, contiguous
    x_scales_ptr,  # [N] float32
    weight_ptr,  # [O, C] uint8: e4m3, contiguous
    weight_scales_ptr,  # [O] float32
    bias_ptr,  # [O]; read only if HAS_BIAS
    out_ptr,  # [N, O], contiguous
    N,
    C,
    outputs,
    HAS_BIAS: tl.constexpr,
    HAS_FP8: tl.constexpr,  # on the matrix units for e4m3, otherwise on those for float16
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # Grid: (ceil(N / ROWS), ceil(outputs / OUTPUTS)). Neighbours read the same weights.
    # 64-bit offsets: 75,000 tokens of 28,672 channels pass 2**31.
    n_N = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_O = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    c_K = tl.arange(0, CHANNELS)
    x_ptrs = x_ptr + n_N[:, None].to(tl.int64) * C + c_K[None, :]
    weight_ptrs = weight_ptr + o_O[None, :].to(tl.int64) * C + c_K[:, None]
    sum_NO = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(0, C, CHANNELS):
        inside = start + c_K < C
        x_NK = tl.load(x_ptrs + start, mask=(n_N[:, None] < N) & inside[None, :], other=0)
        weight_KO = tl.load(
            weight_ptrs + start, mask=(o_O[None, :] < outputs) & inside[:, None], other=0
        )
        if HAS_FP8:
            sum_NO = tl.dot(
                x_NK.to(tl.float8e4nv, bitcast=True),
                weight_KO.to(tl.float8e4nv, bitcast=True),
                sum_NO,
                max_num_imprecise_acc=CHANNELS,
            )
        else:
            sum_NO = dot(_as_float16(x_NK), _as_float16(weight_KO), sum_NO, INTERPRETED)
    if not HAS_FP8:
        sum_NO *= _FP16_FACTOR
    x_scale_N = tl.load(x_scales_ptr + n_N, mask=n_N < N, other=0.0)
    weight_scale_O = tl.load(weight_scales_ptr + o_O, mask=o_O < outputs, other=0.0)
    out_NO = sum_NO * x_scale_N[:, None] * weight_scale_O[None, :]
    if HAS_BIAS:
        bias_O = tl.load(bias_ptr + o_O, mask=o_O < outputs, other=0.0)
        out_NO += bias_O.to(tl.float32)[None, :]
    out_ptrs = out_ptr + n_N[:, None].to(tl.int64) * outputs + o_O[None, :]
    is_out = (n_N[:, None] < N) & (o_O[None, :] < outputs)
    tl.store(out_ptrs, out_NO.to(out_ptr.dtype.element_ty), mask=is_out)


def rounded_rows(x_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as e4m3 numbers times a scale.

    Args:
        x_NC: [N, C], rows contiguous, bfloat16, float16 or float32, finite.

    Returns:
        ([N, C] uint8, contiguous: the bits of e4m3; [N] float32), of which the product is near x.

    Raises:
        ValueError: a shape, dtype or stride other than the above.
    """
    if x_NC.ndim != 2 or (x_NC.stride(1) != 1 and x_NC.shape[1] > 1):
        raise ValueError(
            f"x must be [N, C] with contiguous rows, got {tuple(x_NC.shape)} with strides "
            f"{x_NC.stride()}"
        )
    if x_NC.dtype not in (*DTYPES, torch.float32):
        raise ValueError(f"x must be bfloat16, float16 or float32, got {x_NC.dtype}")
    N, C = x_NC.shape
    bits_NC = torch.empty((N, C), dtype=torch.uint8, device=x_NC.device)
    scales_N = torch.empty(N, dtype=torch.float32, device=x_NC.device)
    if N > 0:
        round_rows_kernel[(N,)](
            x_NC,
            bits_NC,
            scales_N,
            x_NC.stride(0),
            C,
            TILE=_ROUND_TILE,
            num_warps=_ROUND_WARPS,
            **OPTIONS,
        )
    return bits_NC, scales_N


def rounded_rows_reference(x_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``rounded_rows`` means."""
    return fp8_rows(x_NC)


def fp8_linear(
    x_NC: torch.Tensor,
    weight_OC: torch.Tensor,
    scales_O: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    *,
    deterministic: bool = True,
) -> torch.Tensor:
    """``x @ weight.T + bias`` of activations rounded row by row; summed in float32, rounded once.

    Args:
        x_NC: [N, C], rows contiguous, one of ``DTYPES``.
        weight_OC: [O, C] uint8, contiguous: as ``rounded_rows`` makes them.
        scales_O: [O] float32, likewise.
        bias_O: [O], dtype of x.
        deterministic: see the top of this file.

    Returns:
        [N, O], contiguous, dtype of x.

    Raises:
        ValueError: a shape, dtype, stride or device other than the above.
    """
    _check(x_NC, weight_OC, scales_O, bias_O)
    N, outputs = x_NC.shape[0], weight_OC.shape[0]
    out_NO = x_NC.new_empty((N, outputs))
    if N == 0 or outputs == 0:
        return out_NO
    tiles = TILES.of(N, deterministic=deterministic)
    fp8_linear_kernel[(triton.cdiv(N, tiles.rows), triton.cdiv(outputs, tiles.outputs))](
        *rounded_rows(x_NC),
        weight_OC,
        scales_O,
        x_NC if bias_O is None else bias_O,
        out_NO,
        N,
        x_NC.shape[1],
        outputs,
        HAS_BIAS=bias_O is not None,
        HAS_FP8=tiles is TILES.large and _has_fp8(x_NC.device),
        ROWS=tiles.rows,
        OUTPUTS=tiles.outputs,
        CHANNELS=_CHANNELS,
        INTERPRETED=x_NC.device.type == "cpu",
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **OPTIONS,
    )
    return out_NO


def fp8_linear_reference(
    x_NC: torch.Tensor,
    weight_OC: torch.Tensor,
    scales_O: torch.Tensor,
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """What ``fp8_linear`` means."""
    bits_NC, scales_N = rounded_rows_reference(x_NC)
    sums_NO = fp8_values(bits_NC) @ fp8_values(weight_OC).T
    out_NO = sums_NO * scales_N[:, None] * scales_O
    return (out_NO if bias_O is None else out_NO + bias_O.float()).to(x_NC.dtype)


def _has_fp8(device: torch.device) -> bool:
    if device.type == "cpu":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= FP8_CAPABILITY


def _check(
    x_NC: torch.Tensor,
    weight_OC: torch.Tensor,
    scales_O: torch.Tensor,
    bias_O: torch.Tensor | None,
) -> None:
    if x_NC.ndim != 2 or x_NC.dtype not in DTYPES:
        raise ValueError(f"x must be [N, C], one of {DTYPES}, got {tuple(x_NC.shape)} {x_NC.dtype}")
    outputs = weight_OC.shape[0]
    if (
        weight_OC.shape != (outputs, x_NC.shape[1])
        or weight_OC.dtype != torch.uint8
        or not weight_OC.is_contiguous()
    ):
        raise ValueError(
            f"the weight must be contiguous [O, {x_NC.shape[1]}] uint8, got "
            f"{tuple(weight_OC.shape)} {weight_OC.dtype}"
        )
    wanted = (("the scales", scales_O, torch.float32), ("the bias", bias_O, x_NC.dtype))
    for name, tensor, dtype in wanted:
        if tensor is not None and (
            tensor.shape != (outputs,) or tensor.dtype != dtype or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous [{outputs}] {dtype}, got {tuple(tensor.shape)} "
                f"{tensor.dtype}"
            )
    devices = {t.device for t in (x_NC, weight_OC, scales_O, bias_O) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {devices}")


def configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        yield Configuration(
            round_rows_kernel,
            "round_rows",
            {
                "x_ptr": dtype,
                "out_ptr": torch.uint8,
                "scales_ptr": torch.float32,
                "x_stride_n": 4096,
                "C": 4096,
            },
            {"TILE": _ROUND_TILE},
            {"num_warps": _ROUND_WARPS},
        )
    ways = (
        ("few rows", TILES.few, False),
        ("many rows", TILES.many, False),
        ("large rows", TILES.large, True),
        ("large rows by float16", TILES.large, False),
    )
    for dtype, (way, tiles, has_fp8) in itertools.product(DTYPES, ways):
        yield Configuration(
            fp8_linear_kernel,
            f"fp8_linear {way}",
            {
                "x_ptr": torch.uint8,
                "x_scales_ptr": torch.float32,
                "weight_ptr": torch.uint8,
                "weight_scales_ptr": torch.float32,
                "bias_ptr": dtype,
                "out_ptr": dtype,
                "N": 64,
                "C": 4096,
                "outputs": 4096,
            },
            {
                "HAS_BIAS": True,
                "HAS_FP8": has_fp8,
                "ROWS": tiles.rows,
                "OUTPUTS": tiles.outputs,
                "CHANNELS": _CHANNELS,
                "INTERPRETED": False,
            },
            {"num_warps": tiles.warps, "num_stages": tiles.stages},
            capability_min=FP8_CAPABILITY if has_fp8 else 0,
        )
