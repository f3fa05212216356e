"""A pool's blocks in 8 bits for a store, and back: the bits that ``store_codec`` has on a CPU.

Half of the bytes go over the bus then, and no CPU touches a number. Packed blocks are bytes:

    of each layer and head: keys [T, D], their scales [D], values [T, D], their scales [T]

Shape letters as in ``pool.py``; S blocks of a move, J bytes of a packed block or of its layers,
K layers of it.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pdserve.model.kernels.codec import (
    CODECS,
    POINTERS,
    codes_for,
    decoded,
    magnitude_bits,
    rounded_to_bfloat16,
    scales_for,
)
from pdserve.model.kernels.configuration import DTYPES, HEAD_DIMS, OPTIONS, Configuration
from pdserve.model.kv_codec import SCALE_DTYPE

_WARPS = 4


@triton.jit
def _places(
    pool_ptr,
    blocks_ptr,
    pool_stride_p,
    first_layer,
    packed_heads,
    G,
    T,
    D: tl.constexpr,
    TILE_T: tl.constexpr,
):
    """(keys and values in the pool [TILE_T, D], which of them are tokens, what of a packed head
    they are, and where its keys and its values begin, in bytes)"""
    # Grid: (S, K * G). 64-bit offsets: pool and packed blocks may each pass 2**31 elements.
    s = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    block = tl.load(blocks_ptr + s).to(tl.int64)
    layer = first_layer + head // G
    t = tl.arange(0, TILE_T)[:, None]
    at = t * D + tl.arange(0, D)[None, :]
    first = block * pool_stride_p + (layer * 2 * G + head % G).to(tl.int64) * (T * D)
    keys_ptr = pool_ptr + first + at
    # Codes are a byte each, scales two.
    packed = (s * packed_heads + head) * (2 * T * D + 2 * D + 2 * T)
    return keys_ptr, keys_ptr + G * T * D, t < T, at, packed, packed + T * D + 2 * D


@triton.jit
def _pack_kernel(
    pool_ptr,  # [P, L, 2, G, T, D], blocks contiguous
    blocks_ptr,  # [S] int32, each in [0, P)
    codes_ptr,  # [S, J], contiguous: int8, or uint8 for fp8
    scales_ptr,  # the same bytes as bfloat16
    pool_stride_p,
    first_layer,
    packed_heads,  # K * G
    G,
    T,
    D: tl.constexpr,
    TILE_T: tl.constexpr,  # a power of two, at least T
    CODEC: tl.constexpr,
):
    keys_ptr, values_ptr, is_token, at, packed_keys, packed_values = _places(
        pool_ptr, blocks_ptr, pool_stride_p, first_layer, packed_heads, G, T, D, TILE_T
    )
    # Zeros where there is no token: they are no channel's largest.
    keys = tl.load(keys_ptr, mask=is_token, other=0.0).to(tl.float32)
    scale_D = scales_for(tl.max(magnitude_bits(keys), axis=0), CODEC)
    codes = codes_for(keys, tl.broadcast_to(scale_D[None, :], keys.shape), CODEC)
    tl.store(codes_ptr + packed_keys + at, codes, mask=is_token)
    d = tl.arange(0, D)
    tl.store(scales_ptr + (packed_keys + T * D) // 2 + d, scale_D.to(tl.bfloat16))

    values = tl.load(values_ptr, mask=is_token, other=0.0).to(tl.float32)
    scale_T = scales_for(tl.max(magnitude_bits(values), axis=1), CODEC)
    codes = codes_for(values, tl.broadcast_to(scale_T[:, None], values.shape), CODEC)
    tl.store(codes_ptr + packed_values + at, codes, mask=is_token)
    t = tl.arange(0, TILE_T)
    tl.store(scales_ptr + (packed_values + T * D) // 2 + t, scale_T.to(tl.bfloat16), mask=t < T)


@triton.jit
def _plain(x, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        x = rounded_to_bfloat16(x)
    return x.to(DTYPE)


@triton.jit
def _unpack_kernel(
    pool_ptr,  # [P, L, 2, G, T, D], blocks contiguous; written
    blocks_ptr,  # [S] int32, each in [0, P)
    codes_ptr,  # [S, J], contiguous: int8, or uint8 for fp8
    scales_ptr,  # the same bytes as bfloat16
    pool_stride_p,
    first_layer,
    packed_heads,
    G,
    T,
    D: tl.constexpr,
    TILE_T: tl.constexpr,
    CODEC: tl.constexpr,
):
    keys_ptr, values_ptr, is_token, at, packed_keys, packed_values = _places(
        pool_ptr, blocks_ptr, pool_stride_p, first_layer, packed_heads, G, T, D, TILE_T
    )
    dtype: tl.constexpr = pool_ptr.dtype.element_ty

    codes = tl.load(codes_ptr + packed_keys + at, mask=is_token, other=0)
    d = tl.arange(0, D)
    scale_D = tl.load(scales_ptr + (packed_keys + T * D) // 2 + d).to(tl.float32)
    tl.store(keys_ptr, _plain(decoded(codes, CODEC) * scale_D[None, :], dtype), mask=is_token)

    codes = tl.load(codes_ptr + packed_values + at, mask=is_token, other=0)
    t = tl.arange(0, TILE_T)
    scale_T = tl.load(scales_ptr + (packed_values + T * D) // 2 + t, mask=t < T, other=0.0)
    values = decoded(codes, CODEC) * scale_T.to(tl.float32)[:, None]
    tl.store(values_ptr, _plain(values, dtype), mask=is_token)


def pack_blocks(
    pool_PL2GTD: torch.Tensor,
    blocks_S: torch.Tensor,
    layers: range,
    code: torch.dtype,
    packed_SJ: torch.Tensor,
) -> None:
    """Pack these layers of the blocks ``blocks_S`` into the rows of ``packed_SJ``, in that order.

    Args:
        pool_PL2GTD: [P, L, 2, G, T, D] of plain numbers, blocks contiguous; D a power of two.
        blocks_S: [S] int32 on the same device.
        layers: of L; K of them.
        code: int8 or float8_e4m3fn.
        packed_SJ: [S, J] uint8, contiguous, on the same device; J is K * G * (2TD + 2D + 2T).

    Raises:
        ValueError: a shape, dtype, stride or device other than the above; nothing was written.

    Ids outside [0, P) are not checked on the device; they read foreign memory.
    """
    _launch(_pack_kernel, pool_PL2GTD, blocks_S, layers, code, packed_SJ)


def unpack_blocks(
    packed_SJ: torch.Tensor, code: torch.dtype, blocks_S: torch.Tensor, pool_PL2GTD: torch.Tensor
) -> None:
    """The other way, whole blocks: numbers are rounded to the pool's dtype. As ``pack_blocks``."""
    layers = range(pool_PL2GTD.shape[1])
    _launch(_unpack_kernel, pool_PL2GTD, blocks_S, layers, code, packed_SJ)


def _launch(
    kernel: triton.JITFunction,
    pool_PL2GTD: torch.Tensor,
    blocks_S: torch.Tensor,
    layers: range,
    code: torch.dtype,
    packed_SJ: torch.Tensor,
) -> None:
    if pool_PL2GTD.ndim != 6 or not pool_PL2GTD[0].is_contiguous():
        raise ValueError(
            "the pool must be [P, L, 2, G, T, D] with contiguous blocks, got "
            f"{tuple(pool_PL2GTD.shape)} with strides {pool_PL2GTD.stride()}"
        )
    _P, L, _2, G, T, D = pool_PL2GTD.shape
    if pool_PL2GTD.dtype not in DTYPES or code not in CODECS:
        raise ValueError(f"cannot pack {pool_PL2GTD.dtype} as {code}")
    if D & (D - 1):
        raise ValueError(f"head_dim must be a power of two, is {D}")
    if not 0 <= layers.start < layers.stop <= L or layers.step != 1:
        raise ValueError(f"{layers} is no stretch of {L} layers")
    if blocks_S.ndim != 1 or blocks_S.dtype != torch.int32 or not blocks_S.is_contiguous():
        raise ValueError(
            f"blocks must be contiguous [S] int32, got {tuple(blocks_S.shape)} {blocks_S.dtype} "
            f"with strides {blocks_S.stride()}"
        )
    S, heads = len(blocks_S), len(layers) * G
    expected = (S, heads * (2 * T * D + (D + T) * SCALE_DTYPE.itemsize))
    if (
        packed_SJ.shape != expected
        or packed_SJ.dtype != torch.uint8
        or not packed_SJ.is_contiguous()
    ):
        raise ValueError(
            f"packed blocks must be contiguous {expected} uint8, got {tuple(packed_SJ.shape)} "
            f"{packed_SJ.dtype} with strides {packed_SJ.stride()}"
        )
    if not pool_PL2GTD.device == blocks_S.device == packed_SJ.device:
        raise ValueError(
            f"the pool is on {pool_PL2GTD.device}, the block ids on {blocks_S.device}, packed "
            f"blocks on {packed_SJ.device}"
        )
    if S == 0:
        return
    kernel[S, heads](
        pool_PL2GTD,
        blocks_S,
        packed_SJ.view(POINTERS[code]),
        packed_SJ.view(SCALE_DTYPE),
        pool_PL2GTD.stride(0),
        layers.start,
        heads,
        G,
        T,
        D=D,
        TILE_T=triton.next_power_of_2(T),
        CODEC=CODECS[code],
        num_warps=_WARPS,
        **OPTIONS,
    )


def configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for code, codec in CODECS.items():
                assert code is not None
                for kernel, name in ((_pack_kernel, "pack"), (_unpack_kernel, "unpack")):
                    yield Configuration(
                        kernel,
                        f"{name}_blocks",
                        {
                            "pool_ptr": dtype,
                            "blocks_ptr": torch.int32,
                            "codes_ptr": POINTERS[code],
                            "scales_ptr": SCALE_DTYPE,
                            "pool_stride_p": 1 << 20,
                            "first_layer": 0,
                            "packed_heads": 256,
                            "G": 8,
                            "T": 16,
                        },
                        {"D": head_dim, "TILE_T": 16, "CODEC": codec},
                        {"num_warps": _WARPS},
                    )
