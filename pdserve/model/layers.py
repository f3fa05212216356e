"""The layers of a model, operation by operation, as its ``Architecture`` says.

A *stack* takes a step's tokens through all layers: embedded in, ready for the last norm out. This
one does it with any ``Ops``; an implementation may have one of its own (``Ops.stacked``).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pdserve.model.adapters import add_low_rank
from pdserve.model.architecture import Architecture
from pdserve.model.mixture import mixed
from pdserve.model.ops import (
    AdaptedRows,
    BatchLayout,
    FeedForward,
    LayersTold,
    LayerWeights,
    Ops,
)


class LayerByLayer:
    def __init__(
        self, ops: Ops, layers: Sequence[LayerWeights], architecture: Architecture
    ) -> None:
        self._ops = ops
        self._layers = layers
        self._shape = architecture
        self._activated = ops.gelu_mul if architecture.activation == "gelu_tanh" else ops.silu_mul

    def __call__(
        self,
        embedded_NC: Tensor,
        batch: BatchLayout,
        ropes_LPD: Sequence[Tensor],
        pool_PL2GTD: Tensor,
        told: LayersTold | None = None,
    ) -> tuple[Tensor, Tensor]:
        ops, eps = self._ops, self._shape.norm_eps
        residual_NC = embedded_NC
        x_NC = ops.rms_norm(residual_NC, self._layers[0].attention_norm_C, eps)
        for index, layer in enumerate(self._layers):
            x_NC = self.attention(x_NC, index, batch, ropes_LPD[index], pool_PL2GTD)
            if told is not None and told.is_due(index + 1, len(self._layers)):
                told.tell(index + 1, event_after(x_NC))
            x_NC = self._output_norm(x_NC, layer.attention_output_norm_C)
            x_NC, residual_NC = ops.add_rms_norm(x_NC, residual_NC, layer.ffn_norm_C, eps)
            x_NC = self.feed_forward(x_NC, index, batch)
            x_NC = self._output_norm(x_NC, layer.ffn_output_norm_C)
            if index + 1 < len(self._layers):
                norm_C = self._layers[index + 1].attention_norm_C
                x_NC, residual_NC = ops.add_rms_norm(x_NC, residual_NC, norm_C, eps)
        return x_NC, residual_NC

    def attention(
        self,
        x_NC: Tensor,
        index: int,
        batch: BatchLayout,
        rope_PD: Tensor,
        pool_PL2GTD: Tensor,
    ) -> Tensor:
        """What layer ``index`` adds to the residual, before any norm of it."""
        ops, shape, layer = self._ops, self._shape, self._layers[index]
        window = shape.layers[index].window
        heads, kv_heads, head_dim = shape.head_count, shape.kv_head_count, shape.head_dim
        qkv_NO = ops.linear(x_NC, layer.qkv)
        add_low_rank(ops, x_NC, qkv_NO, batch.adapted, index, "qkv")
        qkv_NXD = qkv_NO.view(-1, heads + 2 * kv_heads, head_dim)
        q_NHD, k_NGD, v_NGD = torch.split(qkv_NXD, [heads, kv_heads, kv_heads], dim=1)
        if layer.q_norm_D is not None and layer.k_norm_D is not None:
            q_NHD = self._head_norm(q_NHD, layer.q_norm_D)
            k_NGD = self._head_norm(k_NGD, layer.k_norm_D)
        q_NHD = ops.rope_and_cache(q_NHD, k_NGD, v_NGD, rope_PD, batch, pool_PL2GTD, index)
        out_NHD = ops.attention(q_NHD, batch, pool_PL2GTD, index, shape.attention_scale, window)
        attended_NC = out_NHD.view(-1, heads * head_dim)
        y_NC = ops.linear(attended_NC, layer.attention_output)
        add_low_rank(ops, attended_NC, y_NC, batch.adapted, index, "attention_output")
        return y_NC

    def feed_forward(self, x_NC: Tensor, index: int, batch: BatchLayout) -> Tensor:
        """As ``attention``."""
        weights = self._layers[index].ffn
        if isinstance(weights, FeedForward):
            return self._dense(x_NC, weights, index, batch.adapted)
        experts = self._shape.layers[index].experts
        assert experts is not None, f"layer {index} has experts that its architecture has not"
        return mixed(x_NC, weights, experts, self._ops, self._dense)

    def _dense(
        self,
        x_NC: Tensor,
        weights: FeedForward,
        index: int = 0,
        adapted: Sequence[AdaptedRows] = (),
    ) -> Tensor:
        """Experts take no adapters: for them ``adapted`` is empty."""
        gate_up_NF2 = self._ops.linear(x_NC, weights.gate_up)
        add_low_rank(self._ops, x_NC, gate_up_NF2, adapted, index, "gate_up")
        active_NF = self._activated(gate_up_NF2)
        y_NC = self._ops.linear(active_NF, weights.down)
        add_low_rank(self._ops, active_NF, y_NC, adapted, index, "down")
        return y_NC

    def _output_norm(self, x_NC: Tensor, weight_C: Tensor | None) -> Tensor:
        if weight_C is None:
            return x_NC
        return self._ops.rms_norm(x_NC, weight_C, self._shape.norm_eps)

    def _head_norm(self, x_NHD: Tensor, weight_D: Tensor) -> Tensor:
        rows = x_NHD.reshape(-1, x_NHD.shape[-1])
        return self._ops.rms_norm(rows, weight_D, self._shape.norm_eps).view(x_NHD.shape)


def event_after(x_NC: Tensor) -> Any:
    """What has happened when everything launched so far has; None where launching is computing."""
    if not x_NC.is_cuda:
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(x_NC.device))
    return event
