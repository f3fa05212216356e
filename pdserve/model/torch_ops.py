"""The torch path: what the kernels mean, and what runs where no compiler is found.

Every row goes through operations whose shapes do not depend on the batch where that could change
its bits: attention is computed for 16 queries at a time against 64 positions at a time, both cut at
fixed places, and tiles are added in order. Norms and SwiGLU are elementwise or reduce one row.
torch promises nothing about any of this; the identity test runs on this path as well and is how we
know. Roughly ten times slower than the C++ kernels in attention.

Shape letters as in ``ops.py``; Q queries of a tile, K positions of a tile, S tiles.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pdserve.model import kv_codec
from pdserve.model.architecture import Architecture
from pdserve.model.layers import LayerByLayer
from pdserve.model.ops import BatchLayout, LayerWeights, LinearWeight, Stack

_QUERIES = 16
_POSITIONS = 64
_GELU_FACTOR = math.sqrt(8 / math.pi)
_VECTOR_CHANNELS = 32  # two of the widest vectors of float32
_PACKED_ROWS_MIN = 2
"""oneDNN cuts a sum over many inputs elsewhere when there is one row only: seen with float32 and
bfloat16, from 1,536 inputs on. From two rows on a row's bits are its own, for 1 to 8 threads."""

_PLAIN_ROWS_MIN = 16
"""The same, and MKL's float32 products need four rows for each of a few threads."""

_ROWS_STEP = 16
"""oneDNN makes code for every number of rows that it meets and keeps half a megabyte per product,
up to 1,024 of them: a worker that sees all kinds of prompts would grow by 500 MB. Above this many
rows are computed in whole steps, so that 512 tokens a step make 46 numbers."""


def rows_computed(row_count: int, rows_min: int) -> int:
    if row_count <= _ROWS_STEP:
        return max(row_count, rows_min)
    return -(-row_count // _ROWS_STEP) * _ROWS_STEP


def linear(x_NC: Tensor, weight: LinearWeight) -> Tensor:
    """``x @ weight.T + bias``; on a CPU a row's bits do not depend on the other rows."""
    if x_NC.device.type != "cpu":
        return functional.linear(x_NC, weight.weight_OC, weight.bias_O)
    row_count = x_NC.shape[0]
    computed = rows_computed(row_count, _PACKED_ROWS_MIN if weight.packed else _PLAIN_ROWS_MIN)
    if row_count < computed:
        x_NC = functional.pad(x_NC, (0, 0, 0, computed - row_count))
    if weight.packed:
        y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_NC, weight.weight_OC, weight.bias_O, "none", [], ""
        )
    else:
        y_NO = functional.linear(x_NC, weight.weight_OC, weight.bias_O)
    return y_NO[:row_count]


class TorchOps:
    name = "torch"
    multiplies = "dtype"
    reads_quantised = False
    quantised_alike = True
    reads_fp8 = False

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()

    def calls(self) -> Mapping[str, int]:
        return self._calls

    def pack(self, weight: LinearWeight) -> LinearWeight:
        """In oneDNN's own layout, where it has one for this type on this CPU: up to 1.8 times as
        fast for few rows. In float32 this is more than speed: the plain product's bits depend on
        the numbers of rows and threads up to a larger bound."""
        mkldnn = torch.ops.mkldnn
        plain = weight.weight_OC
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if plain.device.type != "cpu" or not has_onednn:
            return weight
        if plain.dtype == torch.bfloat16 and not mkldnn._is_mkldnn_bf16_supported():
            return weight
        if plain.dtype == torch.float16 and not mkldnn._is_mkldnn_fp16_supported():
            return weight
        return LinearWeight(mkldnn._reorder_linear_weight(plain), weight.bias_O, packed=True)

    def stacked(self, layers: Sequence[LayerWeights], architecture: Architecture) -> Stack:
        return LayerByLayer(self, layers, architecture)

    def linear(self, x_NC: Tensor, weight: LinearWeight) -> Tensor:
        self._calls["linear"] += 1
        return linear(x_NC, weight)

    def embedded(self, tokens_N: Tensor, embedding: LinearWeight) -> Tensor:
        self._calls["embedded"] += 1
        return functional.embedding(tokens_N, embedding.weight_OC)

    def rms_norm(self, x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        self._calls["rms_norm"] += 1
        return _rms_norm(x_NC, weight_C, eps)

    def add_rms_norm(
        self, x_NC: Tensor, residual_NC: Tensor, weight_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        self._calls["add_rms_norm"] += 1
        residual_NC = (x_NC.float() + residual_NC.float()).to(x_NC.dtype)
        return _rms_norm(residual_NC, weight_C, eps), residual_NC

    def rope_and_cache(
        self,
        q_NHD: Tensor,
        k_NGD: Tensor,
        v_NGD: Tensor,
        rope_PD: Tensor,
        batch: BatchLayout,
        pool_PL2GTD: Tensor,
        layer: int,
    ) -> Tensor:
        self._calls["rope_and_cache"] += 1
        rope_N1D = rope_PD[batch.positions_N].unsqueeze(1)
        block_tokens = pool_PL2GTD.shape[4]
        block_N = batch.slots_N // block_tokens
        offset_N = batch.slots_N % block_tokens
        kv_codec.put(pool_PL2GTD[:, layer, 0], block_N, offset_N, _turned(k_NGD, rope_N1D))
        kv_codec.put(pool_PL2GTD[:, layer, 1], block_N, offset_N, v_NGD)
        return _turned(q_NHD, rope_N1D)

    def attention(
        self,
        q_NHD: Tensor,
        batch: BatchLayout,
        pool_PL2GTD: Tensor,
        layer: int,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        self._calls["attention"] += 1
        out_NHD = torch.empty_like(q_NHD)
        starts = batch.starts_R1.tolist()
        for run, (context, table_B) in enumerate(
            zip(batch.contexts_R.tolist(), batch.tables_RB, strict=True)
        ):
            first, last = starts[run], starts[run + 1]
            keys_SGDK, values_SGKD = _tiles(pool_PL2GTD[:, layer], table_B, context)
            for begin in range(first, last, _QUERIES):
                end = min(begin + _QUERIES, last)
                positions_Q = batch.positions_N[begin:end]
                unseen = max(0, int(positions_Q[0]) - (window or context) + 1) // _POSITIONS
                out_NHD[begin:end] = _attend(
                    q_NHD[begin:end],
                    positions_Q - unseen * _POSITIONS,
                    keys_SGDK[unseen:],
                    values_SGKD[unseen:],
                    scale,
                    window or context,
                )
        return out_NHD

    def silu_mul(self, gate_up_NF2: Tensor) -> Tensor:
        self._calls["silu_mul"] += 1
        return _gated(gate_up_NF2, functional.silu)

    def gelu_mul(self, gate_up_NF2: Tensor) -> Tensor:
        self._calls["gelu_mul"] += 1
        return _gated(gate_up_NF2, _gelu)


def _gated(gate_up_NF2: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """torch computes whole vectors one way and what is left over another, with other last bits; and
    which elements are left over depends on how many rows there are, and where threads divide them.
    So rows are whole vectors, and one thread has them all."""
    gate_NF, up_NF = gate_up_NF2.float().chunk(2, dim=-1)
    channels = gate_NF.shape[-1]
    padded_NF = functional.pad(gate_NF, (0, -channels % _VECTOR_CHANNELS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        active_NF = activation(padded_NF)
    finally:
        torch.set_num_threads(threads)
    return (active_NF[:, :channels] * up_NF).to(gate_up_NF2.dtype)


def _gelu(gate_NF: Tensor) -> Tensor:
    # (1 + tanh(x)) / 2 = sigmoid(2 x): the left side loses digits where the result is small.
    inner_NF = _GELU_FACTOR * (gate_NF + 0.044715 * gate_NF * gate_NF * gate_NF)
    return gate_NF * torch.sigmoid(inner_NF)


def _rms_norm(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    x = x_NC.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * weight_C.float()).to(x_NC.dtype)


def _turned(x_NGD: Tensor, rope_N1D: Tensor) -> Tensor:
    first, second = x_NGD.float().chunk(2, dim=-1)
    cosine, sine = rope_N1D.chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(x_NGD.dtype)


def _tiles(pool_P2GTD: Tensor, table_B: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """A run's keys, transposed, and values: float32 tiles at absolute positions, zeros behind."""
    kv_heads, block_tokens, head_dim = pool_P2GTD.shape[2:]
    blocks = -(-context // block_tokens)
    kv_2GXD = (
        kv_codec.taken(pool_P2GTD, table_B[:blocks].long())
        .permute(1, 2, 0, 3, 4)
        .reshape(2, kv_heads, blocks * block_tokens, head_dim)[:, :, :context]
    )
    behind = -context % _POSITIONS
    kv_2GXD = functional.pad(kv_2GXD, (0, 0, 0, behind))
    tiled = kv_2GXD.reshape(2, kv_heads, -1, _POSITIONS, head_dim).transpose(1, 2)
    return tiled[0].transpose(-1, -2).contiguous(), tiled[1].contiguous()


def _attend(
    q_NHD: Tensor,
    positions_N: Tensor,
    keys_SGDK: Tensor,
    values_SGKD: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """At most one tile of queries against all tiles of positions, in two passes. Positions count
    from the first tile on."""
    count, heads, head_dim = q_NHD.shape
    kv_heads = keys_SGDK.shape[1]
    q_QHD = functional.pad(q_NHD.float() * scale, (0, 0, 0, 0, 0, _QUERIES - count))
    q_GXD = (
        q_QHD.reshape(_QUERIES, kv_heads, heads // kv_heads, head_dim)
        .transpose(0, 1)
        .reshape(kv_heads, -1, head_dim)
    )
    scores_SGXK = torch.matmul(q_GXD, keys_SGDK)
    limit_Q = functional.pad(positions_N, (0, _QUERIES - count))
    limit_X = limit_Q.repeat_interleave(heads // kv_heads)
    place_SK = torch.arange(keys_SGDK.shape[0] * _POSITIONS).reshape(-1, _POSITIONS)
    before_SXK = limit_X[None, :, None] - place_SK[:, None, :]
    hidden_SXK = (before_SXK < 0) | (before_SXK >= window)
    scores_SGXK = scores_SGXK.masked_fill(hidden_SXK[:, None], -torch.inf)
    best_GX1 = scores_SGXK.amax(dim=(0, 3))[..., None]
    weights_SGXK = torch.exp(scores_SGXK - best_GX1)
    parts_SGXD = torch.matmul(weights_SGXK, values_SGKD)
    sums_SGX1 = weights_SGXK.sum(-1, keepdim=True)
    out_GXD, sum_GX1 = parts_SGXD[0], sums_SGX1[0]
    for tile in range(1, parts_SGXD.shape[0]):  # in order: an empty tile adds exactly 0
        out_GXD = out_GXD + parts_SGXD[tile]
        sum_GX1 = sum_GX1 + sums_SGX1[tile]
    out_QHD = (
        (out_GXD / sum_GX1)
        .reshape(kv_heads, _QUERIES, heads // kv_heads, head_dim)
        .transpose(0, 1)
        .reshape(_QUERIES, heads, head_dim)
    )
    return out_QHD[:count].to(q_NHD.dtype)
