"""Each Triton kernel against what the GPU can do: copy bandwidth or the rate of a dense matmul.

    python -m bench.kernels [--json FILE] [--quick]

The shapes are Llama-3-8B's, in bf16, and for attention heads of 64 beside its 128. A kernel that
moves data is compared with a device-to-device copy of 512 MiB, prefill attention and linear layers
of many rows with a square matrix product; both are measured in turn with it. Prefill attention
stands beside torch's too, which has the keys and values in one piece and no blocks to look up:
``scaled_dot_product_attention`` by its default backend, which the row names, and by cuDNN's, and
flex attention, compiled, with a causal block mask. What is moved is larger than the cache of any
GPU, and so is not read from there the second time; the logits that are drawn from are not. Calls
are recorded into a CUDA graph, so that what is timed is the GPU and not Python. Without a CUDA
device every row says that it was skipped.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.frame import Bar, Options, Row, at_least, interleave, row, run, skipped
from pdserve.model import kv_codec
from pdserve.model.fp8_weights import Fp8Weight, in_fp8
from pdserve.model.kernels.attention import paged_attention
from pdserve.model.kernels.blocks import gather_blocks, scatter_blocks
from pdserve.model.kernels.fp8_linear import fp8_linear
from pdserve.model.kernels.grouped_linear import PANEL, grouped_linear
from pdserve.model.kernels.norm import add_rms_norm
from pdserve.model.kernels.rope import rope_and_cache
from pdserve.model.kernels.sampling import drawn_tokens
from pdserve.model.kernels.silu import silu_mul
from pdserve.model.kernels.store_blocks import pack_blocks, unpack_blocks
from pdserve.model.ops import LinearWeight
from pdserve.model.whole_weights import power_factor

DTYPE = torch.bfloat16
CALLS = 20  # in one graph: a launch of it, some 10 µs, is then a small part
ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the measured batches are, and what model they are of."""

    device: str = "cuda"
    tokens: int = 8192  # of a prefill step
    sequences: int = 64  # of a decode step
    streams: int = 16  # of a small one
    context: int = 8192
    long_context: int = 131_072  # of one sequence alone
    long_prompt: int = 16_384
    hidden: int = 4096
    ffn: int = 14_336
    vocabulary: int = 128_256
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    short_head_dim: int = 64
    block_tokens: int = 16
    moved_blocks: int = 8192  # of one layer
    copy_bytes: int = 1 << 30  # read and written, together
    matmul: int = 8192

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=DTYPE, device=self.device)

    def integers(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@dataclass(frozen=True, slots=True)
class Work:
    """One call, and what it does: bytes read and written, or floating-point operations."""

    call: Callable[[], object]
    amount: float


def copy(sizes: Sizes) -> Work:
    source = torch.empty(sizes.copy_bytes // 2, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    return Work(lambda: target.copy_(source), sizes.copy_bytes)


def matmul(sizes: Sizes) -> Work:
    a, b = (sizes.randn(sizes.matmul, sizes.matmul) for _ in range(2))
    return Work(lambda: a @ b, 2 * sizes.matmul**3)


def norm(sizes: Sizes) -> Work:
    x, residual = (sizes.randn(sizes.tokens, sizes.hidden) for _ in range(2))
    weight = sizes.randn(sizes.hidden)
    return Work(lambda: add_rms_norm(x, residual, weight, 1e-5), 4 * x.nbytes)


def swiglu(sizes: Sizes) -> Work:
    gate_up = sizes.randn(sizes.tokens, 2 * sizes.ffn)
    return Work(lambda: silu_mul(gate_up), gate_up.nbytes * 3 / 2)


def rope(sizes: Sizes) -> Work:
    qkv = sizes.randn(sizes.tokens, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim)
    q, k, v = (
        qkv[:, : sizes.heads],
        qkv[:, sizes.heads : -sizes.kv_heads],
        qkv[:, -sizes.kv_heads :],
    )
    table = torch.rand(sizes.tokens, sizes.head_dim, device=sizes.device)
    positions = torch.arange(sizes.tokens, device=sizes.device)
    pool = _pool(sizes, math.ceil(sizes.tokens / sizes.block_tokens))
    return Work(
        lambda: rope_and_cache(q, k, v, table, positions, positions, pool),
        2 * qkv.nbytes + table.nbytes,
    )


def prefill(sizes: Sizes, tokens: int, *, deterministic: bool) -> Work:
    call = _attention(sizes, 1, tokens, tokens, deterministic=deterministic)
    return Work(call, _prefill_operations(sizes, tokens))


def sdpa(sizes: Sizes, tokens: int) -> Work:
    """What torch has for the same prompt, were its keys and values in one piece."""
    q, k, v = _in_one_piece(sizes, tokens)

    def call() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )

    return Work(call, _prefill_operations(sizes, tokens))


def cudnn_sdpa(sizes: Sizes, tokens: int) -> Work:
    """The same by cuDNN, or not at all; on a CPU, where only calls are tested, by what there is."""
    by_default = sdpa(sizes, tokens)
    attention: Any = torch.nn.attention  # torch has no types for it

    def call() -> object:
        with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
            return by_default.call()

    return by_default if sizes.device == "cpu" else Work(call, by_default.amount)


def flex(sizes: Sizes, tokens: int) -> Work:
    """Flex attention, which skips the blocks that causality hides. It is made to be compiled; on a
    CPU, where only calls are tested, it is not."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend: Any = flex_attention
    q, k, v = _in_one_piece(sizes, tokens)

    def causal(
        _batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return query >= key

    mask = create_block_mask(causal, None, None, tokens, tokens, device=sizes.device)
    if sizes.device != "cpu":
        attend = torch.compile(attend, dynamic=False)
    return Work(
        lambda: attend(q, k, v, block_mask=mask, enable_gqa=True),
        _prefill_operations(sizes, tokens),
    )


def _in_one_piece(sizes: Sizes, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of one prompt, as torch's attention takes them: [1, H, N, D]."""
    k, v = (sizes.randn(1, sizes.kv_heads, tokens, sizes.head_dim) for _ in range(2))
    return sizes.randn(1, sizes.heads, tokens, sizes.head_dim), k, v


def _prefill_operations(sizes: Sizes, tokens: int) -> float:
    return 4 * sizes.heads * sizes.head_dim * tokens * (tokens + 1) / 2


def decode(
    sizes: Sizes,
    sequences: int,
    context: int,
    *,
    head_dim: int | None = None,
    stored: torch.dtype = DTYPE,
) -> Work:
    """``stored``: what keys and values are kept as; other than ``DTYPE``, with scales."""
    head_dim = head_dim or sizes.head_dim
    call = _attention(sizes, sequences, 1, context, head_dim=head_dim, stored=stored)
    token_bytes = head_dim * stored.itemsize + (0 if stored == DTYPE else torch.bfloat16.itemsize)
    return Work(call, sequences * context * 2 * sizes.kv_heads * token_bytes)


def gather(sizes: Sizes) -> Work:
    pool, blocks = _moved(sizes)
    return Work(lambda: gather_blocks(pool, blocks), 2 * blocks.numel() * pool[0].nbytes)


def scatter(sizes: Sizes) -> Work:
    pool, blocks = _moved(sizes)
    staging = gather_blocks(pool, blocks)
    return Work(lambda: scatter_blocks(staging, blocks, pool), 2 * staging.nbytes)


def packed(sizes: Sizes, code: torch.dtype, *, back: bool = False) -> Work:
    """Blocks in 8 bits for a store: plain numbers are read or written, and half as many bytes."""
    pool = _pool(sizes, 2 * sizes.moved_blocks)[:, None]
    blocks = _every_other(sizes)
    plain_bytes = len(blocks) * pool[0].nbytes
    scales = 2 * sizes.kv_heads * (sizes.head_dim + sizes.block_tokens)
    rows = torch.zeros(
        (len(blocks), pool[0].numel() + scales), dtype=torch.uint8, device=sizes.device
    )

    def call() -> torch.Tensor:
        if back:
            unpack_blocks(rows, code, blocks, pool)
        else:
            pack_blocks(pool, blocks, range(1), code, rows)
        return rows

    return Work(call, plain_bytes + rows.nbytes)


def sampled(sizes: Sizes, *, top_k: int, top_p: float) -> Work:
    """One read of the logits is what any sampler needs."""
    logits = sizes.randn(sizes.sequences, sizes.vocabulary).float() * 3
    settings = torch.tensor([[power_factor(1.0), top_k, top_p, 0, 1 << 52]], dtype=torch.float64)
    settings = settings.repeat(sizes.sequences, 1).to(sizes.device)
    return Work(lambda: drawn_tokens(logits, settings), logits.nbytes)


def few_rows(sizes: Sizes, *, bits: int) -> Work:
    """A decode step's gate and up: weights are what it reads."""
    x = sizes.randn(sizes.streams, sizes.hidden)
    packed, scales = _grouped(sizes, bits)
    return Work(
        lambda: grouped_linear(x, packed, scales, None, bits=bits, group=PANEL),
        packed.nbytes + scales.nbytes,
    )


def many_rows(sizes: Sizes, *, bits: int, deterministic: bool) -> Work:
    x = sizes.randn(sizes.tokens, sizes.hidden)
    packed, scales = _grouped(sizes, bits)
    return Work(
        lambda: grouped_linear(
            x, packed, scales, None, bits=bits, group=PANEL, deterministic=deterministic
        ),
        4 * sizes.tokens * sizes.hidden * sizes.ffn,
    )


def fp8_few_rows(sizes: Sizes) -> Work:
    weight = _fp8(sizes)
    x = sizes.randn(sizes.streams, sizes.hidden)
    return Work(lambda: fp8_linear(x, weight.weight_OC, weight.scales_O), weight.weight_OC.nbytes)


def fp8_many_rows(sizes: Sizes, *, deterministic: bool) -> Work:
    weight = _fp8(sizes)
    x = sizes.randn(sizes.tokens, sizes.hidden)
    return Work(
        lambda: fp8_linear(x, weight.weight_OC, weight.scales_O, deterministic=deterministic),
        4 * sizes.tokens * sizes.hidden * sizes.ffn,
    )


@dataclass(frozen=True, slots=True)
class Measure:
    """Ours, what it is measured in turn with, and what was promised of the ratio."""

    unit: str
    reference: str
    limit_of: Callable[[Sizes], Work]
    work_of: Callable[[Sizes], Work]
    bar: Bar | None = None
    reference_may_lack: bool = False
    """Not every build of torch or GPU has the reference: then the row says so."""


def _moves(work_of: Callable[[Sizes], Work], bar: float | None = None) -> Measure:
    promised = None if bar is None else at_least(bar, of="ratio")
    return Measure("GB/s", "device copy", copy, work_of, promised)


def _packs(work_of: Callable[[Sizes], Work]) -> Measure:
    """1.0 TB/s of plain numbers: half as much again is written, or read."""
    return Measure("GB/s", "device copy", copy, work_of, at_least(1500))


def _multiplies(work_of: Callable[[Sizes], Work], bar: float | None = None) -> Measure:
    promised = None if bar is None else at_least(bar, of="ratio")
    return Measure("GFLOP/s", "dense matmul", matmul, work_of, promised)


def _beside(
    reference: str, limit_of: Callable[[Sizes, int], Work], bar: float | None = None
) -> Measure:
    """Our prefill attention beside somebody else's."""
    return Measure(
        "GFLOP/s",
        reference,
        lambda sizes: limit_of(sizes, sizes.long_prompt),
        lambda sizes: prefill(sizes, sizes.long_prompt, deterministic=False),
        None if bar is None else at_least(bar, of="ratio"),
        reference_may_lack=reference != "sdpa",
    )


def _many(sizes: Sizes, **how: Any) -> Work:
    return decode(sizes, sizes.sequences, sizes.context, **how)


def _long(sizes: Sizes, **how: Any) -> Work:
    return decode(sizes, 1, sizes.long_context, **how)


MEASURES: dict[str, Measure] = {
    "add_rms_norm, 8,192 tokens": _moves(norm, 0.85),
    "silu_mul, 8,192 tokens": _moves(swiglu, 0.85),
    "rope_and_cache, 8,192 tokens": _moves(rope, 0.85),
    "gather_blocks, 8,192 blocks": _moves(gather, 0.85),
    "scatter_blocks, 8,192 blocks": _moves(scatter, 0.85),
    "pack_blocks, 8,192 blocks, int8": _packs(lambda sizes: packed(sizes, torch.int8)),
    "pack_blocks, 8,192 blocks, fp8": _packs(lambda sizes: packed(sizes, torch.float8_e4m3fn)),
    "unpack_blocks, 8,192 blocks, int8": _packs(lambda sizes: packed(sizes, torch.int8, back=True)),
    "decode attention, 64 × 8,192": _moves(_many, 0.80),
    "decode attention, 64 × 8,192, heads of 64": _moves(
        lambda sizes: _many(sizes, head_dim=sizes.short_head_dim), 0.80
    ),
    "decode attention, 64 × 8,192, int8": _moves(
        lambda sizes: _many(sizes, stored=torch.int8), 0.80
    ),
    "decode attention, 64 × 8,192, fp8": _moves(
        lambda sizes: _many(sizes, stored=torch.float8_e4m3fn), 0.80
    ),
    "decode attention, 1 × 131,072": _moves(_long, 0.70),
    "decode attention, 1 × 131,072, heads of 64": _moves(
        lambda sizes: _long(sizes, head_dim=sizes.short_head_dim), 0.70
    ),
    "drawn_tokens, 64 × 128,256": _moves(lambda sizes: sampled(sizes, top_k=0, top_p=1.0), 0.85),
    "drawn_tokens, 64 × 128,256, top-p": _moves(
        lambda sizes: sampled(sizes, top_k=0, top_p=0.9), 0.85
    ),
    "drawn_tokens, 64 × 128,256, top-k and top-p": _moves(
        lambda sizes: sampled(sizes, top_k=50, top_p=0.9), 0.85
    ),
    "4-bit linear, 16 rows": _moves(lambda sizes: few_rows(sizes, bits=4)),
    "8-bit linear, 16 rows": _moves(lambda sizes: few_rows(sizes, bits=8)),
    "fp8 linear, 16 rows": _moves(fp8_few_rows),
    "4-bit linear, 8,192 rows": _multiplies(
        lambda sizes: many_rows(sizes, bits=4, deterministic=True)
    ),
    "4-bit linear, 8,192 rows, larger tiles": _multiplies(
        lambda sizes: many_rows(sizes, bits=4, deterministic=False)
    ),
    "fp8 linear, 8,192 rows": _multiplies(lambda sizes: fp8_many_rows(sizes, deterministic=True)),
    "fp8 linear, 8,192 rows, larger tiles": _multiplies(
        lambda sizes: fp8_many_rows(sizes, deterministic=False)
    ),
    "prefill attention, 16,384": _multiplies(
        lambda sizes: prefill(sizes, sizes.long_prompt, deterministic=True)
    ),
    "prefill attention, 16,384, larger tiles": _multiplies(
        lambda sizes: prefill(sizes, sizes.long_prompt, deterministic=False), 0.55
    ),
    "prefill attention, 16,384, larger tiles, beside torch": _beside("sdpa", sdpa, 1.0),
    "prefill attention, 16,384, larger tiles, beside flex": _beside("flex attention", flex, 1.0),
    "prefill attention, 16,384, larger tiles, beside cuDNN": _beside("sdpa, cuDNN", cudnn_sdpa),
}


def measure(options: Options) -> Iterator[Row]:
    for name, made in MEASURES.items():
        if not torch.cuda.is_available():
            yield skipped(name, made.unit, "needs a CUDA device")
            continue
        try:
            limit = _rate_of(made.limit_of(Sizes()))
        except Exception as error:  # whatever torch or its compiler has for it
            if not made.reference_may_lack:
                raise
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            yield skipped(name, made.unit, f"{made.reference} is not available: {said}")
            continue
        ours = _rate_of(made.work_of(Sizes()))
        samples = interleave(options.rounds(ROUNDS), ours=ours, limit=limit)
        reference = f"sdpa, {_sdpa_backend()}" if made.reference == "sdpa" else made.reference
        yield row(
            name, samples["ours"], made.unit, reference=reference,
            reference_samples=samples["limit"], bar=made.bar,
        )  # fmt: skip


def _sdpa_backend() -> str:
    """What torch chooses for bf16 without being told: its order of preference says so."""
    order: list[int] = getattr(torch._C, "_get_sdp_priority_order", list)()
    backends: Any = torch.nn.attention.SDPBackend  # torch has no types for it
    names = {int(value): name for name, value in backends.__members__.items()}
    return next((names[choice].lower() for choice in order if choice in names), "its default")


def _rate_of(work: Work) -> Callable[[], float]:
    """Measures 10**9 bytes or operations per second."""
    work.call()  # compiled outside of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work.call()

    def rate() -> float:
        begin, end = _event(), _event()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        elapsed_ms: float = begin.elapsed_time(end)
        return work.amount * CALLS / (elapsed_ms * 1e6)

    return rate


def _event() -> Any:  # torch has no types for it
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _pool(
    sizes: Sizes, block_count: int, *, head_dim: int | None = None, stored: torch.dtype = DTYPE
) -> torch.Tensor:
    head_dim = head_dim or sizes.head_dim
    shape = (block_count, 2, sizes.kv_heads, sizes.block_tokens, head_dim)
    if stored == DTYPE:
        return sizes.randn(*shape)
    head_bytes = kv_codec.head_bytes(sizes.block_tokens, head_dim, stored)
    # Bytes that are finite numbers in either type.
    bytes_P2GE = torch.randint(
        120, (*shape[:3], head_bytes), dtype=torch.uint8, device=sizes.device
    )
    codes = sizes.block_tokens * head_dim * stored.itemsize
    pool = bytes_P2GE.view(stored)[..., :codes].view(shape)
    kv_codec.scales_of(pool).fill_(0.01)
    return pool


def _moved(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool of one layer as rows, twice as large as what is moved, and every other block of it."""
    pool = _pool(sizes, 2 * sizes.moved_blocks).flatten(1)
    return pool, _every_other(sizes)


def _every_other(sizes: Sizes) -> torch.Tensor:
    return sizes.integers(list(range(0, 2 * sizes.moved_blocks, 2)))


def _grouped(sizes: Sizes, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    steps, outputs = sizes.hidden * bits // (8 * PANEL), 2 * sizes.ffn
    packed = torch.randint(256, (steps, outputs, PANEL), dtype=torch.uint8, device=sizes.device)
    pairs = torch.rand(steps * 8 // bits, outputs, 2, device=sizes.device).half()
    return packed, pairs.view(torch.int32)[..., 0].contiguous()


def _fp8(sizes: Sizes) -> Fp8Weight:
    return in_fp8(LinearWeight(sizes.randn(2 * sizes.ffn, sizes.hidden)))


def _attention(
    sizes: Sizes,
    sequences: int,
    length: int,
    context: int,
    *,
    deterministic: bool = True,
    head_dim: int | None = None,
    stored: torch.dtype = DTYPE,
) -> Callable[[], object]:
    head_dim = head_dim or sizes.head_dim
    q = sizes.randn(sequences * length, sizes.heads, head_dim)
    blocks_each = math.ceil(context / sizes.block_tokens)
    pool = _pool(sizes, sequences * blocks_each, head_dim=head_dim, stored=stored)
    tables = torch.randperm(sequences * blocks_each, device=sizes.device).int()
    tables = tables.view(sequences, blocks_each)
    starts = sizes.integers([length * run for run in range(sequences + 1)])
    contexts = sizes.integers([context] * sequences)
    return lambda: paged_attention(
        q,
        starts,
        tables,
        contexts,
        pool,
        head_dim**-0.5,
        longest_run=length,
        longest_context=context,
        deterministic=deterministic,
    )


if __name__ == "__main__":
    run("kernels", measure)
