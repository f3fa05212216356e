"""Linear layers whose weights are whole numbers of 4 or 8 bits, in groups with a scale each.

``weight = scale * q + minimum``, rounded to the dtype of the activations before it is multiplied:
the result is that of a layer which stores those rounded weights, from a quarter or half of the
bytes. Decode waits for weights, so that is what counts; the arithmetic to unpack them costs long
prompts more than it saves.

*Panels.* ``packed_SOH`` has, for one step along the channels and all outputs, 32 bytes of each
output: with 8 bits 32 channels, q + 128 each; with 4 bits 64, the first 32 in the low halves of the
bytes and the others in the high ones. What a program reads in a step is one stretch of memory, and
no two halves have to be sorted out. A group's scale and minimum are float16, in one int32.

*A row's bits* depend on that row alone: there is one order of products, panel by panel, no sum is
split, and one matrix instruction does it all (``linear_tiles``), unless ``deterministic=False``
gives many rows larger tiles.

Shape letters, in this file:
    N  tokens    C  channels    O  outputs    G  groups of channels
    S  steps along the channels    H  bytes of an output's panel, 32
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pdserve.model.kernels.configuration import OPTIONS, Configuration
from pdserve.model.kernels.linear_tiles import Tiles, TilesByRows
from pdserve.model.kernels.products import dot

PANEL = 32
"""Channels that an output has side by side; a group is a multiple of it."""

DTYPES = (torch.bfloat16, torch.float16)
"""Of activations, results and biases."""

_PANEL = tl.constexpr(PANEL)
_EXPONENT = tl.constexpr(0x4B00_0000)  # of 2**23, whose lowest bits count whole numbers
_TWO_23 = tl.constexpr(2.0**23)


TILES = TilesByRows(
    few=Tiles(rows=16, outputs=32, warps=4, stages=6),
    many=Tiles(rows=32, outputs=128, warps=4, stages=3),
    large=Tiles(rows=128, outputs=64, warps=8, stages=3),
)


@triton.jit
def _scale_and_minimum(scales_ptr, group, o_O, outputs):
    """(scale, minimum), float32 [O]."""
    pair_O = tl.load(scales_ptr + group * outputs + o_O, mask=o_O < outputs, other=0)
    scale_O = pair_O.to(tl.int16).to(tl.float16, bitcast=True)
    minimum_O = (pair_O >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale_O.to(tl.float32), minimum_O.to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def grouped_linear_kernel(
    x_ptr,  # [N, C], rows contiguous
    packed_ptr,  # [S, O, H] uint8, contiguous
    scales_ptr,  # [G, O] int32, contiguous: scale in the low half, minimum in the high one
    bias_ptr,  # [O]; read only if HAS_BIAS
    out_ptr,  # [N, O], contiguous
    x_stride_n,
    N,
    C,
    outputs,
    BITS: tl.constexpr,
    GROUP_PANELS: tl.constexpr,  # panels of channels with one scale
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # Grid: (ceil(N / ROWS), ceil(outputs / OUTPUTS)). Neighbours read the same weights.
    # 64-bit offsets: 75,000 tokens of 28,672 outputs, or as many bytes of weights, pass 2**31.
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
    o_O = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    h = tl.arange(0, _PANEL)
    out_NO = tl.zeros([ROWS, OUTPUTS], tl.float32)
    per_step: tl.constexpr = 8 // BITS
    panel_ptr = packed_ptr + o_O[None, :].to(tl.int64) * _PANEL + h[:, None]
    for step in range(0, tl.cdiv(C, per_step * _PANEL)):
        panel_HO = tl.load(panel_ptr, mask=o_O[None, :] < outputs, other=0).to(tl.int32)
        panel_ptr += outputs * _PANEL
        for part in tl.static_range(per_step):
            c = (step * per_step + part) * _PANEL + h[None, :]
            x_NH = tl.load(x_ptr + n * x_stride_n + c, mask=(n < N) & (c < C), other=0.0)
            scale_O, minimum_O = _scale_and_minimum(
                scales_ptr, (step * per_step + part) // GROUP_PANELS, o_O, outputs
            )
            whole_HO = (panel_HO >> (part * BITS)) & ((1 << BITS) - 1)
            # To float by an addition: GPUs have few units that convert.
            value_HO = (whole_HO | _EXPONENT).to(tl.float32, bitcast=True) - _TWO_23
            if BITS == 8:
                value_HO -= 128.0
            weight_HO = value_HO * scale_O[None, :] + minimum_O[None, :]
            out_NO = dot(x_NH, weight_HO.to(x_NH.dtype), out_NO, INTERPRETED)
    inside = (n < N) & (o_O[None, :] < outputs)
    if HAS_BIAS:
        out_NO += tl.load(bias_ptr + o_O, mask=o_O < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + n * outputs + o_O[None, :], out_NO.to(out_ptr.dtype.element_ty), mask=inside)


def grouped_linear(
    x_NC: torch.Tensor,
    packed_SOH: torch.Tensor,
    scales_GO: torch.Tensor,
    bias_O: torch.Tensor | None,
    *,
    bits: int,
    group: int,
    deterministic: bool = True,
) -> torch.Tensor:
    """``x @ weight.T + bias``, summed in float32, rounded once.

    Args:
        x_NC: [N, C], rows contiguous, one of ``DTYPES``.
        packed_SOH: [S, O, 32] uint8, contiguous, as at the top of this file; what is behind C is
            not looked at.
        scales_GO: [G, O] int32, contiguous; behind the last channel zeros, to the end of a step.
        bias_O: [O], dtype of x.
        bits: 4 or 8.
        group: channels with one scale, a multiple of ``PANEL``.
        deterministic: see the top of this file.

    Returns:
        [N, O], contiguous, dtype of x.

    Raises:
        ValueError: a shape, dtype, stride or device other than the above.
    """
    _check(x_NC, packed_SOH, scales_GO, bias_O, bits, group)
    (N, C), outputs = x_NC.shape, packed_SOH.shape[1]
    out_NO = x_NC.new_empty((N, outputs))
    if N == 0 or outputs == 0:
        return out_NO
    tiles = TILES.of(N, deterministic=deterministic)
    grouped_linear_kernel[(triton.cdiv(N, tiles.rows), triton.cdiv(outputs, tiles.outputs))](
        x_NC,
        packed_SOH,
        scales_GO,
        x_NC if bias_O is None else bias_O,
        out_NO,
        x_NC.stride(0),
        N,
        C,
        outputs,
        BITS=bits,
        GROUP_PANELS=group // PANEL,
        HAS_BIAS=bias_O is not None,
        ROWS=tiles.rows,
        OUTPUTS=tiles.outputs,
        INTERPRETED=x_NC.device.type == "cpu",
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **OPTIONS,
    )
    return out_NO


def grouped_linear_reference(
    x_NC: torch.Tensor,
    packed_SOH: torch.Tensor,
    scales_GO: torch.Tensor,
    bias_O: torch.Tensor | None,
    *,
    bits: int,
    group: int,
) -> torch.Tensor:
    """What ``grouped_linear`` means."""
    weight_OC = unpacked(packed_SOH, scales_GO, bits=bits, group=group)[:, : x_NC.shape[1]]
    out_NO = x_NC.float() @ weight_OC.to(x_NC.dtype).float().T
    return (out_NO if bias_O is None else out_NO + bias_O.float()).to(x_NC.dtype)


def unpacked(
    packed_SOH: torch.Tensor, scales_GO: torch.Tensor, *, bits: int, group: int
) -> torch.Tensor:
    """The weights [O, C] in float32, C up to the end of the last step."""
    low, high = packed_SOH & 15, packed_SOH >> 4
    parts = [low, high] if bits == 4 else [packed_SOH]
    whole_OGH = torch.stack(parts, dim=1).flatten(0, 1).transpose(0, 1)  # [O, panels, 32]
    value_OGH = whole_OGH.float() - (128 if bits == 8 else 0)
    pair_OG2 = scales_GO.T.contiguous().view(torch.float16).unflatten(1, (-1, 2)).float()
    pair_OG2 = pair_OG2.repeat_interleave(group // PANEL, dim=1)[:, : value_OGH.shape[1]]
    weight_OGH: torch.Tensor = value_OGH * pair_OG2[..., :1] + pair_OG2[..., 1:]
    return weight_OGH.flatten(1)


def _check(
    x_NC: torch.Tensor,
    packed_SOH: torch.Tensor,
    scales_GO: torch.Tensor,
    bias_O: torch.Tensor | None,
    bits: int,
    group: int,
) -> None:
    if bits not in (4, 8) or group <= 0 or group % PANEL:
        raise ValueError(
            f"bits must be 4 or 8, and a group a multiple of {PANEL} channels, got {bits} and "
            f"{group}"
        )
    if x_NC.ndim != 2 or x_NC.stride(1) != 1 or x_NC.dtype not in DTYPES:
        raise ValueError(
            f"x must be [N, C] with contiguous rows, one of {DTYPES}, got {tuple(x_NC.shape)} "
            f"{x_NC.dtype} with strides {x_NC.stride()}"
        )
    channels = 8 // bits * PANEL
    steps = -(-x_NC.shape[1] // channels)  # ceil
    if (
        packed_SOH.ndim != 3
        or packed_SOH.shape[::2] != (steps, PANEL)
        or packed_SOH.dtype != torch.uint8
        or not packed_SOH.is_contiguous()
    ):
        raise ValueError(
            f"the weights must be contiguous [{steps}, O, {PANEL}] uint8 for {x_NC.shape[1]} "
            f"channels of {bits} bits, got {tuple(packed_SOH.shape)} {packed_SOH.dtype}"
        )
    outputs, groups = packed_SOH.shape[1], -(-steps * channels // group)
    if (
        scales_GO.shape != (groups, outputs)
        or scales_GO.dtype != torch.int32
        or not scales_GO.is_contiguous()
    ):
        raise ValueError(
            f"the scales must be contiguous [{groups}, {outputs}] int32, got "
            f"{tuple(scales_GO.shape)} {scales_GO.dtype}"
        )
    if bias_O is not None and (
        bias_O.shape != (outputs,) or bias_O.dtype != x_NC.dtype or not bias_O.is_contiguous()
    ):
        raise ValueError(
            f"the bias must be contiguous [{outputs}] {x_NC.dtype}, got {tuple(bias_O.shape)} "
            f"{bias_O.dtype}"
        )
    given = (x_NC, packed_SOH, scales_GO, *(() if bias_O is None else (bias_O,)))
    devices = {tensor.device for tensor in given}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {devices}")


def configurations() -> Iterator[Configuration]:
    ways = (("few", TILES.few), ("many", TILES.many), ("large", TILES.large))
    for dtype, bits, (way, tiles) in itertools.product(DTYPES, (4, 8), ways):
        yield Configuration(
            grouped_linear_kernel,
            f"grouped_linear {bits} bits {way} rows",
            {
                **dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), dtype),
                "packed_ptr": torch.uint8,
                "scales_ptr": torch.int32,
                "x_stride_n": 4096,
                "N": 64,
                "C": 4096,
                "outputs": 4096,
            },
            {
                "BITS": bits,
                "GROUP_PANELS": 1,
                "HAS_BIAS": True,
                "ROWS": tiles.rows,
                "OUTPUTS": tiles.outputs,
                "INTERPRETED": False,
            },
            {"num_warps": tiles.warps, "num_stages": tiles.stages},
        )
