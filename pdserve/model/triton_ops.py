"""The operations of the model as Triton kernels: on a GPU, or in Triton's interpreter on a CPU.

The interpreter needs TRITON_INTERPRET=1 in the environment before Triton is imported. Linear
layers of plain weights are torch's, everything else is ours; ``ops`` says what each operation
means, ``kernels`` how it is computed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pdserve.model.architecture import Architecture
from pdserve.model.fp8_weights import Fp8Weight
from pdserve.model.grouped_weights import (
    READ_FORMATS,
    GroupedWeight,
    grouped,
    multiplied,
    unpacked_rows,
)
from pdserve.model.kernels.attention import paged_attention
from pdserve.model.kernels.fp8_linear import fp8_linear
from pdserve.model.kernels.norm import add_rms_norm, rms_norm
from pdserve.model.kernels.rope import rope_and_cache
from pdserve.model.kernels.silu import gelu_mul, silu_mul
from pdserve.model.layers import LayerByLayer
from pdserve.model.ops import BatchLayout, LayerWeights, LinearWeight, Stack
from pdserve.model.quantised import QuantisedWeight
from pdserve.model.torch_ops import linear


class TritonOps:
    """``ops.Ops`` through our kernels. Not thread-safe: one engine, one instance."""

    name = "triton"
    multiplies = "dtype"
    reads_quantised = True
    quantised_alike = False
    reads_fp8 = True

    def __init__(self, *, deterministic: bool = True, device: torch.device | None = None) -> None:
        """With ``deterministic`` a row's bits do not depend on the length of its run, nor on how
        many rows there are; see ``kernels.attention`` and ``kernels.grouped_linear``. Packed
        weights go to ``device``; without one they stay on the CPU."""
        self._deterministic = deterministic
        self._device = device or torch.device("cpu")
        self._calls: Counter[str] = Counter()

    def calls(self) -> Mapping[str, int]:
        return self._calls

    def pack(self, weight: LinearWeight) -> LinearWeight:
        if not isinstance(weight, QuantisedWeight):
            return weight
        if weight.format in READ_FORMATS:
            return grouped(weight, self._device)
        plain_OC = weight.dequantised().to(device=self._device, dtype=torch.bfloat16)
        return LinearWeight(plain_OC, weight.bias_O)

    def stacked(self, layers: Sequence[LayerWeights], architecture: Architecture) -> Stack:
        return LayerByLayer(self, layers, architecture)

    def linear(self, x_NC: Tensor, weight: LinearWeight) -> Tensor:
        self._calls["linear"] += 1
        if isinstance(weight, GroupedWeight):
            return multiplied(x_NC, weight, deterministic=self._deterministic)
        if isinstance(weight, Fp8Weight):
            return fp8_linear(
                x_NC,
                weight.weight_OC,
                weight.scales_O,
                weight.bias_O,
                deterministic=self._deterministic,
            )
        return linear(x_NC, weight)

    def embedded(self, tokens_N: Tensor, embedding: LinearWeight) -> Tensor:
        self._calls["embedded"] += 1
        if isinstance(embedding, GroupedWeight):
            return unpacked_rows(embedding, tokens_N)
        return functional.embedding(tokens_N, embedding.weight_OC)

    def rms_norm(self, x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        self._calls["rms_norm"] += 1
        return rms_norm(x_NC, weight_C, eps)

    def add_rms_norm(
        self, x_NC: Tensor, residual_NC: Tensor, weight_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        self._calls["add_rms_norm"] += 1
        return add_rms_norm(x_NC, residual_NC, weight_C, eps)

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
        return rope_and_cache(
            q_NHD, k_NGD, v_NGD, rope_PD, batch.positions_N, batch.slots_N, pool_PL2GTD[:, layer]
        )

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
        return paged_attention(
            q_NHD,
            batch.starts_R1,
            batch.tables_RB,
            batch.contexts_R,
            pool_PL2GTD[:, layer],
            scale,
            longest_run=batch.longest_run,
            longest_context=batch.longest_context,
            window=window,
            deterministic=self._deterministic,
        )

    def silu_mul(self, gate_up_NF2: Tensor) -> Tensor:
        self._calls["silu_mul"] += 1
        return silu_mul(gate_up_NF2)

    def gelu_mul(self, gate_up_NF2: Tensor) -> Tensor:
        self._calls["gelu_mul"] += 1
        return gelu_mul(gate_up_NF2)
