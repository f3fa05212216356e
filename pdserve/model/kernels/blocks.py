"""Copies between the paged pool and one contiguous staging buffer: the way blocks leave the GPU.

One large transfer over PCIe needs contiguous bytes; a sequence's blocks lie anywhere in the pool.
``gather_blocks`` packs them, ``scatter_blocks`` puts them back. Both move bits and round nothing.

Shape letters, in this file:
    P  blocks in the pool
    S  blocks of the sequence, in token order
    E  elements of one block: layers * 2 (k, v) * kv_heads * block_tokens * head_dim
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pdserve.model.kernels.configuration import DTYPES, OPTIONS, Configuration

_TILE = 2048  # elements a program copies: 16 bytes of bf16 for each of 256 threads
_WARPS = 8


@triton.jit
def _copy_blocks_kernel(
    pool_ptr,  # [P, E], rows contiguous
    blocks_ptr,  # [S] int32, each in [0, P)
    staging_ptr,  # [S, E], contiguous
    pool_stride_p,  # elements from one block to the next; the pool may be a view
    E,
    TO_POOL: tl.constexpr,  # staging → pool; otherwise pool → staging
    TILE: tl.constexpr,
):
    # Grid: (S, ceil(E / TILE)). Program (s, i) copies tile i of the sequence's s-th block.
    s = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * TILE + tl.arange(0, TILE)  # [TILE]
    in_block = e < E
    # 64-bit offsets: p * stride overflows int32 once the pool passes 2**31 elements, 4 GiB of bf16.
    p = tl.load(blocks_ptr + s).to(tl.int64)
    pool_E = pool_ptr + p * pool_stride_p + e
    staging_E = staging_ptr + s * E + e
    if TO_POOL:
        tl.store(pool_E, tl.load(staging_E, mask=in_block), mask=in_block)
    else:
        tl.store(staging_E, tl.load(pool_E, mask=in_block), mask=in_block)


def gather_blocks(pool_PE: torch.Tensor, blocks_S: torch.Tensor) -> torch.Tensor:
    """Copy the rows of ``pool_PE`` that ``blocks_S`` names, in that order.

    Args:
        pool_PE: [P, E], any dtype, rows contiguous. Usually the whole KV pool of one GPU.
        blocks_S: [S] int32 on the same device. A block may appear twice.

    Returns:
        [S, E], contiguous, same dtype and device, the same bits.

    Raises:
        ValueError: a shape, dtype, stride or device other than the above.

    Ids outside [0, P) are not checked on the device; they read foreign memory.
    """
    _check(pool_PE, blocks_S)
    staging_SE = pool_PE.new_empty((blocks_S.numel(), pool_PE.shape[1]))
    _copy(pool_PE, blocks_S, staging_SE, to_pool=False)
    return staging_SE


def gather_blocks_reference(pool_PE: torch.Tensor, blocks_S: torch.Tensor) -> torch.Tensor:
    """What ``gather_blocks`` means."""
    return pool_PE[blocks_S.long()]


def scatter_blocks(staging_SE: torch.Tensor, blocks_S: torch.Tensor, pool_PE: torch.Tensor) -> None:
    """Copy row s of ``staging_SE`` into row ``blocks_S[s]`` of ``pool_PE``, for every s.

    Args:
        staging_SE: [S, E], contiguous, same dtype and device as the pool.
        blocks_S: [S] int32. A block that appears twice gets either row, or parts of both.
        pool_PE: [P, E], rows contiguous. Rows that are not named keep their bits.

    Raises:
        ValueError: a shape, dtype, stride or device other than the above; nothing was written.
    """
    _check(pool_PE, blocks_S)
    if (
        staging_SE.shape != (blocks_S.numel(), pool_PE.shape[1])
        or staging_SE.dtype != pool_PE.dtype
        or staging_SE.device != pool_PE.device
        or not staging_SE.is_contiguous()
    ):
        raise ValueError(
            f"staging must be contiguous [{blocks_S.numel()}, {pool_PE.shape[1]}] {pool_PE.dtype} "
            f"on {pool_PE.device}, got {tuple(staging_SE.shape)} {staging_SE.dtype} on "
            f"{staging_SE.device} with strides {staging_SE.stride()}"
        )
    _copy(pool_PE, blocks_S, staging_SE, to_pool=True)


def scatter_blocks_reference(
    staging_SE: torch.Tensor, blocks_S: torch.Tensor, pool_PE: torch.Tensor
) -> None:
    """What ``scatter_blocks`` means, where no block appears twice."""
    pool_PE[blocks_S.long()] = staging_SE


def _check(pool_PE: torch.Tensor, blocks_S: torch.Tensor) -> None:
    if pool_PE.ndim != 2 or pool_PE.stride(1) != 1:
        raise ValueError(
            f"pool must be [P, E] with contiguous rows, got {tuple(pool_PE.shape)} "
            f"with strides {pool_PE.stride()}"
        )
    if blocks_S.ndim != 1 or blocks_S.dtype != torch.int32 or not blocks_S.is_contiguous():
        raise ValueError(
            f"blocks must be contiguous [S] int32, got {tuple(blocks_S.shape)} {blocks_S.dtype} "
            f"with strides {blocks_S.stride()}"
        )
    if blocks_S.device != pool_PE.device:
        raise ValueError(f"the pool is on {pool_PE.device}, the block ids on {blocks_S.device}")


def _copy(
    pool_PE: torch.Tensor, blocks_S: torch.Tensor, staging_SE: torch.Tensor, *, to_pool: bool
) -> None:
    S, E = staging_SE.shape
    if S == 0 or E == 0:
        return
    grid = (S, triton.cdiv(E, _TILE))
    _copy_blocks_kernel[grid](
        pool_PE,
        blocks_S,
        staging_SE,
        pool_PE.stride(0),
        E,
        TO_POOL=to_pool,
        TILE=_TILE,
        num_warps=_WARPS,
        **OPTIONS,
    )


def configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        for to_pool in (False, True):
            yield Configuration(
                _copy_blocks_kernel,
                "scatter_blocks" if to_pool else "gather_blocks",
                {
                    "pool_ptr": dtype,
                    "blocks_ptr": torch.int32,
                    "staging_ptr": dtype,
                    "pool_stride_p": 1 << 20,
                    "E": 1 << 20,
                },
                {"TO_POOL": to_pool, "TILE": _TILE},
                {"num_warps": _WARPS},
            )
