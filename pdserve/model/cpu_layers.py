"""All layers in one call of the C++ kernels (``cpu/layers.h``).

It gives the bits of ``layers.LayerByLayer`` with ``CpuOps``, since it runs the same kernels on the
same rows; what is gone is Python's share, some 300 calls per step.

Shape letters as in ``ops.py``.
"""

import ctypes
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pdserve.model.architecture import Architecture
from pdserve.model.cpu_panels import Panels
from pdserve.model.ops import BatchLayout, FeedForward, LayerWeights, LinearWeight

ALL_TOKENS = 1 << 62
"""A layer's window where it has none."""

_CALLS_OF_LAYER = {"linear": 4, "rope_and_cache": 1, "attention": 1, "silu_mul": 1}


def has_plain_layers(architecture: Architecture) -> bool:
    """Whether ``cpu/layers.h`` computes such layers; it knows the plainest kind only."""
    ropes = {kind.rope for kind in architecture.layers}
    dense = all(kind.experts is None for kind in architecture.layers)
    silu = architecture.activation == "silu"
    return len(ropes) == 1 and dense and silu and not architecture.output_norms


class CpuLayers:
    def __init__(
        self,
        library: ctypes.CDLL,
        calls: Counter[str],
        layers: Sequence[LayerWeights],
        architecture: Architecture,
        *,
        enough: tuple[int, int, int, int],
    ) -> None:
        """``layers`` are plain, packed, of bfloat16 and contiguous. ``enough``: elements, elements
        of the queries times positions, and products from which on all threads are worth their
        waking, and the products that reading a byte of a matrix is counted as."""
        self._library = library
        self._calls = calls
        self._layers = layers  # whose memory the table points to
        self._shape = architecture
        self._enough = enough
        windows = [kind.window or ALL_TOKENS for kind in architecture.layers]
        self._windows_L = np.array(windows, dtype=np.int64)
        self._table_LW = np.array([_pointers(layer) for layer in layers], dtype=np.uintp)
        norms = 1 if layers[0].q_norm_D is None else 1 + 2 * len(layers)
        counts = {name: count * len(layers) for name, count in _CALLS_OF_LAYER.items()}
        self._counts = counts | {"rms_norm": norms, "add_rms_norm": 2 * len(layers) - 1}

    def __call__(
        self,
        embedded_NC: Tensor,
        batch: BatchLayout,
        ropes_LPD: Sequence[Tensor],
        pool_PL2GTD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        self._calls.update(self._counts)
        residual_NC = embedded_NC.contiguous()
        x_NC = torch.empty_like(residual_NC)
        sizes = np.array(self._sizes(batch, pool_PL2GTD), dtype=np.int64)
        self._library.pdserve_layers(
            *(x_NC.data_ptr(), residual_NC.data_ptr()),
            *(self._table_LW.ctypes.data, sizes.ctypes.data),
            *(self._shape.norm_eps, self._shape.attention_scale),
            *(batch.positions_N.data_ptr(), batch.slots_N.data_ptr(), batch.starts_R1.data_ptr()),
            *(batch.tables_RB.data_ptr(), ropes_LPD[0].data_ptr(), pool_PL2GTD.data_ptr()),
            self._windows_L.ctypes.data,
            torch.get_num_threads(),
        )
        return x_NC, residual_NC

    def _sizes(self, batch: BatchLayout, pool_PL2GTD: Tensor) -> tuple[int, ...]:
        """In the order in which ``pdserve_layers`` takes them apart."""
        shape = self._shape
        _, _, _, kv_heads, block_tokens, head_dim = pool_PL2GTD.shape
        block_stride, layer_stride = pool_PL2GTD.stride(0), pool_PL2GTD.stride(1)
        return (
            *(shape.layer_count, shape.hidden, shape.head_count, shape.ffn),
            *(layer_stride, block_stride, block_tokens, kv_heads, head_dim),
            *(batch.positions_N.numel(), *batch.tables_RB.shape, batch.longest_context),
            *self._enough,
        )


def _pointers(layer: LayerWeights) -> tuple[int, ...]:
    """In the order of ``struct Layer``."""

    def matrix(weight: LinearWeight) -> tuple[int, int, int]:
        assert isinstance(weight, Panels)
        return weight.weight_OC.data_ptr(), _pointer(weight.bias_O), weight.format

    assert isinstance(layer.ffn, FeedForward)
    return (
        layer.attention_norm_C.data_ptr(),
        *(_pointer(layer.q_norm_D), _pointer(layer.k_norm_D)),
        layer.ffn_norm_C.data_ptr(),
        *matrix(layer.qkv),
        *matrix(layer.attention_output),
        *matrix(layer.ffn.gate_up),
        *matrix(layer.ffn.down),
    )


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
