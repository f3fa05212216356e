"""Rotary position embedding of q and k, and k and v put into the paged pool, in one pass.

Half-split convention: channel i < D/2 is the first and channel i + D/2 the second coordinate of a
point that turns by position * frequency_i. The products are float32 and rounded once. A pool of
8 bits gets the codes of what one of the model's dtype would get.

Shape letters, in this file:
    N  tokens                 H  query heads            G  key/value heads
    D  channels of a head     P  blocks of the pool     T  tokens of a block
    M  positions in the rope table
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pdserve.model import kv_codec
from pdserve.model.kernels.codec import CODECS, PLAIN, POINTERS, encoded, parts_of
from pdserve.model.kernels.configuration import DTYPES, HEAD_DIMS, OPTIONS, Configuration

_WARPS = 4


@triton.jit
def _turn(first, second, cos, sin):
    """The point (first, second), turned by the angle."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rope_and_cache_kernel(
    q_ptr,  # [N, H, D], each head's channels contiguous
    k_ptr,  # [N, G, D], likewise
    v_ptr,  # [N, G, D], likewise
    rope_ptr,  # [M, D] float32, contiguous: D/2 cosines, then D/2 sines
    positions_ptr,  # [N] int64, each in [0, M)
    slots_ptr,  # [N] int64, each in [0, P * T)
    out_ptr,  # [N, H, D], contiguous: q, turned
    pool_ptr,  # [P, 2, G, T, D] of one layer, channels contiguous
    scales_ptr,  # [P, 2, G, T] bfloat16, strides half of the pool's; only with a CODEC
    q_stride_n,
    q_stride_h,
    k_stride_n,
    k_stride_g,
    v_stride_n,
    v_stride_g,
    pool_stride_p,
    pool_stride_2,  # from keys to values
    pool_stride_g,
    pool_stride_t,
    BLOCK_TOKENS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,  # a power of two
    TILE_H: tl.constexpr,  # >= H, a power of two
    TILE_G: tl.constexpr,  # >= G, a power of two
    CODEC: tl.constexpr,  # of ``codec``
):
    # Grid: (N,). Program n does all heads of token n.
    # 64-bit offsets: n * stride passes 2**31 elements at 350,000 tokens of 48 heads of 128.
    n = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, D // 2)[None, :]  # [1, D/2]
    angle_ptr = rope_ptr + tl.load(positions_ptr + n) * D + half
    cos = tl.load(angle_ptr)
    sin = tl.load(angle_ptr + D // 2)

    h = tl.arange(0, TILE_H)[:, None]  # [TILE_H, 1]
    q_tile_ptr = q_ptr + n * q_stride_n + h * q_stride_h + half
    first = tl.load(q_tile_ptr, mask=h < H, other=0.0).to(tl.float32)
    second = tl.load(q_tile_ptr + D // 2, mask=h < H, other=0.0).to(tl.float32)
    first, second = _turn(first, second, cos, sin)
    out_tile_ptr = out_ptr + (n * H + h) * D + half
    tl.store(out_tile_ptr, first.to(out_ptr.dtype.element_ty), mask=h < H)
    tl.store(out_tile_ptr + D // 2, second.to(out_ptr.dtype.element_ty), mask=h < H)

    # A slot is 64 bits wide, and so is every offset that follows from it: the pool passes 2**31
    # elements at 4 GiB of bf16.
    slot = tl.load(slots_ptr + n)
    place = slot // BLOCK_TOKENS * pool_stride_p + slot % BLOCK_TOKENS * pool_stride_t
    g = tl.arange(0, TILE_G)[:, None]  # [TILE_G, 1]
    cache_ptr = pool_ptr + place + g * pool_stride_g + half
    k_tile_ptr = k_ptr + n * k_stride_n + g * k_stride_g + half
    first = tl.load(k_tile_ptr, mask=g < G, other=0.0).to(tl.float32)
    second = tl.load(k_tile_ptr + D // 2, mask=g < G, other=0.0).to(tl.float32)
    first, second = _turn(first, second, cos, sin)
    first, second = first.to(out_ptr.dtype.element_ty), second.to(out_ptr.dtype.element_ty)
    head = tl.arange(0, TILE_G)
    scale_ptr = scales_ptr + slot // BLOCK_TOKENS * (pool_stride_p // 2) + slot % BLOCK_TOKENS
    scale_ptr += head * (pool_stride_g // 2)
    if CODEC:
        first, second, scale = encoded(first.to(tl.float32), second.to(tl.float32), CODEC)
        tl.store(scale_ptr, scale, mask=head < G)
    tl.store(cache_ptr, first, mask=g < G)
    tl.store(cache_ptr + D // 2, second, mask=g < G)

    # Values after keys are out of the registers.
    v_tile_ptr = v_ptr + n * v_stride_n + g * v_stride_g + half
    # Zeros where there is no head: what is coded must be a number.
    first = tl.load(v_tile_ptr, mask=g < G, other=0.0)
    second = tl.load(v_tile_ptr + D // 2, mask=g < G, other=0.0)
    if CODEC:
        first, second, scale = encoded(first.to(tl.float32), second.to(tl.float32), CODEC)
        tl.store(scale_ptr + pool_stride_2 // 2, scale, mask=head < G)
    cache_ptr += pool_stride_2
    tl.store(cache_ptr, first, mask=g < G)
    tl.store(cache_ptr + D // 2, second, mask=g < G)


def rope_and_cache(
    q_NHD: torch.Tensor,
    k_NGD: torch.Tensor,
    v_NGD: torch.Tensor,
    rope_MD: torch.Tensor,
    positions_N: torch.Tensor,
    slots_N: torch.Tensor,
    pool_P2GTD: torch.Tensor,
) -> torch.Tensor:
    """Turn q and k by their positions; put k, turned, and v into the pool at their slots.

    Args:
        q_NHD: [N, H, D], channels contiguous; a view into the fused projection will do.
        k_NGD: [N, G, D], likewise.
        v_NGD: [N, G, D], likewise.
        rope_MD: [M, D] float32, contiguous: D/2 cosines, then D/2 sines, per position.
        positions_N: [N] int64.
        slots_N: [N] int64, block * block_tokens + offset. No slot may appear twice.
        pool_P2GTD: [P, 2, G, T, D], one layer of the pool, channels contiguous; written. Of the
            dtype of q, or in 8 bits with scales (``kv_codec``).

    Returns:
        q, turned: [N, H, D], contiguous.

    Raises:
        ValueError: a shape, dtype, stride or device other than the above; nothing was written.

    Positions outside the table and slots outside the pool are not checked on the device; they
    touch foreign memory.
    """
    _check(q_NHD, k_NGD, v_NGD, rope_MD, positions_N, slots_N, pool_P2GTD)
    N, H, D = q_NHD.shape
    G, block_tokens = pool_P2GTD.shape[2:4]
    codec, codes_P2GTD, scales_P2GT = parts_of(pool_P2GTD, q_NHD.dtype)
    out_NHD = q_NHD.new_empty((N, H, D))
    if N > 0:
        _rope_and_cache_kernel[(N,)](
            q_NHD,
            k_NGD,
            v_NGD,
            rope_MD,
            positions_N,
            slots_N,
            out_NHD,
            codes_P2GTD,
            scales_P2GT,
            *q_NHD.stride()[:2],
            *k_NGD.stride()[:2],
            *v_NGD.stride()[:2],
            *pool_P2GTD.stride()[:4],
            BLOCK_TOKENS=block_tokens,
            H=H,
            G=G,
            D=D,
            TILE_H=triton.next_power_of_2(H),
            TILE_G=triton.next_power_of_2(G),
            CODEC=codec,
            num_warps=_WARPS,
            **OPTIONS,
        )
    return out_NHD


def rope_and_cache_reference(
    q_NHD: torch.Tensor,
    k_NGD: torch.Tensor,
    v_NGD: torch.Tensor,
    rope_MD: torch.Tensor,
    positions_N: torch.Tensor,
    slots_N: torch.Tensor,
    pool_P2GTD: torch.Tensor,
) -> torch.Tensor:
    """What ``rope_and_cache`` means."""
    cos_N1D, sin_N1D = rope_MD[positions_N].unsqueeze(1).chunk(2, dim=2)

    def turned(x_NHD: torch.Tensor) -> torch.Tensor:
        first, second = x_NHD.float().chunk(2, dim=2)
        halves = (first * cos_N1D - second * sin_N1D, second * cos_N1D + first * sin_N1D)
        return torch.cat(halves, dim=2).to(x_NHD.dtype)

    block_tokens = pool_P2GTD.shape[3]
    blocks_N, offsets_N = slots_N // block_tokens, slots_N % block_tokens
    kv_codec.put(pool_P2GTD[:, 0], blocks_N, offsets_N, turned(k_NGD))
    kv_codec.put(pool_P2GTD[:, 1], blocks_N, offsets_N, v_NGD)
    return turned(q_NHD)


def _check(
    q_NHD: torch.Tensor,
    k_NGD: torch.Tensor,
    v_NGD: torch.Tensor,
    rope_MD: torch.Tensor,
    positions_N: torch.Tensor,
    slots_N: torch.Tensor,
    pool_P2GTD: torch.Tensor,
) -> None:
    shapes = (
        f"q {tuple(q_NHD.shape)}, k {tuple(k_NGD.shape)}, v {tuple(v_NGD.shape)}, "
        f"rope {tuple(rope_MD.shape)}, pool {tuple(pool_P2GTD.shape)}"
    )
    if q_NHD.ndim != 3 or pool_P2GTD.ndim != 5 or rope_MD.ndim != 2 or k_NGD.shape != v_NGD.shape:
        raise ValueError(
            f"q [N, H, D], k and v [N, G, D], rope [M, D], pool [P, 2, G, T, D]: {shapes}"
        )
    N, _, D = q_NHD.shape
    G = pool_P2GTD.shape[2]
    if k_NGD.shape != (N, G, D) or rope_MD.shape[1] != D or pool_P2GTD.shape[1::3] != (2, D):
        raise ValueError(f"N, G and D must agree: {shapes}")
    if D < 16 or D & (D - 1):
        raise ValueError(f"head_dim must be a power of two of at least 16, got {D}")
    dtypes = {tensor.dtype for tensor in (q_NHD, k_NGD, v_NGD)}
    if len(dtypes) > 1 or q_NHD.dtype not in DTYPES or rope_MD.dtype != torch.float32:
        raise ValueError(
            f"q, k and v must share one of {DTYPES}, the rope must be float32; got "
            f"{dtypes} and {rope_MD.dtype}"
        )
    for name, tensor in (("positions", positions_N), ("slots", slots_N)):
        if tensor.shape != (N,) or tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous [{N}] int64, got {tuple(tensor.shape)} {tensor.dtype}"
            )
    strides = [tensor.stride(-1) for tensor in (q_NHD, k_NGD, v_NGD, pool_P2GTD)]
    if strides != [1, 1, 1, 1] or not rope_MD.is_contiguous():
        raise ValueError(f"channels must be contiguous, got strides {strides} in q, k, v and pool")
    devices = {t.device for t in (q_NHD, k_NGD, v_NGD, rope_MD, positions_N, slots_N, pool_P2GTD)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {devices}")


def configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        for H, G, D in ((9, 3, 64), *((32, 8, D) for D in HEAD_DIMS), (64, 8, 128)):
            yield _configuration(dtype, H, G, D)
    for stored in CODECS:
        for D in HEAD_DIMS:
            yield _configuration(torch.bfloat16, 32, 8, D, stored)


def _configuration(
    dtype: torch.dtype, H: int, G: int, D: int, stored: torch.dtype | None = None
) -> Configuration:
    """``stored``: the pool's dtype where it holds codes."""
    block_tokens, row = 16, (H + 2 * G) * D
    head_elements = block_tokens * D + (block_tokens * 2 if stored else 0)
    return Configuration(
        _rope_and_cache_kernel,
        f"rope_and_cache H={H} G={G} D={D}" + (f" {stored}" if stored else ""),
        {
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), dtype),
            "pool_ptr": dtype if stored is None else POINTERS[stored],
            "scales_ptr": dtype if stored is None else torch.bfloat16,
            "rope_ptr": torch.float32,
            "positions_ptr": torch.int64,
            "slots_ptr": torch.int64,
            "q_stride_n": row,
            "q_stride_h": D,
            "k_stride_n": row,
            "k_stride_g": D,
            "v_stride_n": row,
            "v_stride_g": D,
            "pool_stride_p": 32 * 2 * G * head_elements,
            "pool_stride_2": G * head_elements,
            "pool_stride_g": head_elements,
            "pool_stride_t": D,
        },
        {
            "BLOCK_TOKENS": block_tokens,
            "H": H,
            "G": G,
            "D": D,
            "TILE_H": triton.next_power_of_2(H),
            "TILE_G": triton.next_power_of_2(G),
            "CODEC": CODECS.get(stored, PLAIN),
        },
        {"num_warps": _WARPS},
    )
