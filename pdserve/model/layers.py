"""The layers of a model, operation by operation.

A *stack* takes a step's tokens through all layers: embedded in, ready for the last norm out. This
one does it with any ``Ops``; an implementation may have one of its own (``Ops.stacked``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pdserve.model.architecture import Architecture
from pdserve.model.ops import BatchLayout, LayerWeights, Ops


class LayerByLayer:
    def __init__(
        self, ops: Ops, layers: Sequence[LayerWeights], architecture: Architecture
    ) -> None:
        self._ops = ops
        self._layers = layers
        self._shape = architecture
        self._scale = architecture.head_dim**-0.5

    def __call__(
        self, embedded_NC: Tensor, batch: BatchLayout, rope_PD: Tensor, pool_PL2GTD: Tensor
    ) -> tuple[Tensor, Tensor]:
        ops, eps = self._ops, self._shape.norm_eps
        residual_NC = embedded_NC
        x_NC = ops.rms_norm(residual_NC, self._layers[0].attention_norm_C, eps)
        for index, layer in enumerate(self._layers):
            x_NC = self._attention(x_NC, layer, index, batch, rope_PD, pool_PL2GTD)
            x_NC, residual_NC = ops.add_rms_norm(x_NC, residual_NC, layer.ffn_norm_C, eps)
            x_NC = ops.silu_mul(ops.linear(x_NC, layer.gate_up))
            x_NC = ops.linear(x_NC, layer.down)
            if index + 1 < len(self._layers):
                norm_C = self._layers[index + 1].attention_norm_C
                x_NC, residual_NC = ops.add_rms_norm(x_NC, residual_NC, norm_C, eps)
        return x_NC, residual_NC

    def _attention(
        self,
        x_NC: Tensor,
        layer: LayerWeights,
        index: int,
        batch: BatchLayout,
        rope_PD: Tensor,
        pool_PL2GTD: Tensor,
    ) -> Tensor:
        ops, shape = self._ops, self._shape
        heads, kv_heads, head_dim = shape.head_count, shape.kv_head_count, shape.head_dim
        qkv_NXD = ops.linear(x_NC, layer.qkv).view(-1, heads + 2 * kv_heads, head_dim)
        q_NHD, k_NGD, v_NGD = torch.split(qkv_NXD, [heads, kv_heads, kv_heads], dim=1)
        if layer.q_norm_D is not None and layer.k_norm_D is not None:
            q_NHD = self._head_norm(q_NHD, layer.q_norm_D)
            k_NGD = self._head_norm(k_NGD, layer.k_norm_D)
        q_NHD = ops.rope_and_cache(q_NHD, k_NGD, v_NGD, rope_PD, batch, pool_PL2GTD, index)
        out_NHD = ops.attention(q_NHD, batch, pool_PL2GTD, index, self._scale)
        return ops.linear(out_NHD.view(-1, heads * head_dim), layer.attention_output)

    def _head_norm(self, x_NHD: Tensor, weight_D: Tensor) -> Tensor:
        rows = x_NHD.reshape(-1, x_NHD.shape[-1])
        return self._ops.rms_norm(rows, weight_D, self._shape.norm_eps).view(x_NHD.shape)
