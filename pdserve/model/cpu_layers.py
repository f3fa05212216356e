"""All layers in one call of the C++ kernels (``cpu/layers.h``).

It gives the bits of ``layers.LayerByLayer`` with ``CpuOps``, since it runs the same kernels on the
same rows; what is gone is Python's share, some 300 calls per step.

Shape letters as in ``ops.py``; W words of a row of a table, A adapters of a batch.
"""

import ctypes
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdserve.model.architecture import Architecture
from pdserve.model.cpu.library import LAYERS_WRITTEN
from pdserve.model.cpu_panels import Panels
from pdserve.model.kv_codec import is_coded
from pdserve.model.ops import (
    AdaptedRows,
    Adapter,
    AdapterLayer,
    BatchLayout,
    FeedForward,
    LayersTold,
    LayerWeights,
    LinearWeight,
    LowRank,
)

UnsignedArray = np.ndarray[Any, np.dtype[np.uintp]]

ALL_TOKENS = 1 << 62
"""A layer's window where it has none."""

_NOBODY = LAYERS_WRITTEN()  # a null pointer
_LOW_RANK_WORDS = 7  # of ``struct LowRank``; the last is the rank
_RANKS = slice(_LOW_RANK_WORDS - 1, None, _LOW_RANK_WORDS)

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
        self._adapters: dict[Adapter, UnsignedArray] = {}  # [L, W] of each that was seen
        norms = 1 if layers[0].q_norm_D is None else 1 + 2 * len(layers)
        counts = {name: count * len(layers) for name, count in _CALLS_OF_LAYER.items()}
        self._counts = counts | {"rms_norm": norms, "add_rms_norm": 2 * len(layers) - 1}

    def __call__(
        self,
        embedded_NC: Tensor,
        batch: BatchLayout,
        ropes_LPD: Sequence[Tensor],
        pool_PL2GTD: Tensor,
        told: LayersTold | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._calls.update(self._counts)
        adapted_A3 = self._adapted(batch.adapted)
        residual_NC = embedded_NC.contiguous()
        x_NC = torch.empty_like(residual_NC)
        trouble: list[BaseException] = []
        sizes = np.array(self._sizes(batch, pool_PL2GTD), dtype=np.int64)
        self._library.pdserve_layers(
            *(x_NC.data_ptr(), residual_NC.data_ptr()),
            *(self._table_LW.ctypes.data, sizes.ctypes.data),
            *(self._shape.norm_eps, self._shape.attention_scale),
            *(batch.positions_N.data_ptr(), batch.slots_N.data_ptr(), batch.starts_R1.data_ptr()),
            *(batch.tables_RB.data_ptr(), ropes_LPD[0].data_ptr(), pool_PL2GTD.data_ptr()),
            *(self._windows_L.ctypes.data, adapted_A3.ctypes.data),
            *(_teller(told, trouble), 1 if told is None else told.every),
            torch.get_num_threads(),
        )
        if trouble:
            raise trouble[0]
        return x_NC, residual_NC

    def _sizes(self, batch: BatchLayout, pool_PL2GTD: Tensor) -> tuple[int, ...]:
        """In the order in which ``pdserve_layers`` takes them apart."""
        shape = self._shape
        return (
            *(shape.layer_count, shape.hidden, shape.head_count, shape.ffn),
            *cache_sizes(pool_PL2GTD),
            *(batch.positions_N.numel(), *batch.tables_RB.shape, batch.longest_context),
            *self._enough,
            len(batch.adapted),
        )

    def _adapted(self, adapted: Sequence[AdaptedRows]) -> UnsignedArray:
        """[A, 3], as ``struct Adapted``; counts what it makes the kernels do."""
        entries = []
        for rows in adapted:
            if rows.adapter not in self._adapters:
                self._adapters[rows.adapter] = np.array(
                    [_adapter_pointers(layer) for layer in rows.adapter.layers], dtype=np.uintp
                )
            table_LW = self._adapters[rows.adapter]
            self._calls["linear"] += 2 * int((table_LW[:, _RANKS] > 0).sum())
            entries.append((rows.first, rows.end - rows.first, table_LW.ctypes.data))
        return np.array(entries, dtype=np.uintp)


def _teller(told: LayersTold | None, trouble: list[BaseException]) -> Any:
    """``told`` for C++, through which no exception comes back: it goes to ``trouble``."""
    if told is None:
        return _NOBODY

    def tell(count: int) -> None:
        try:
            told.tell(count, None)
        except BaseException as error:  # raised where the call returns
            trouble.append(error)

    return LAYERS_WRITTEN(tell)


def cache_sizes(pool_PL2GTD: Tensor) -> tuple[int, ...]:
    """Whether it is coded; block stride, layer stride, head stride, in elements; block tokens, kv
    heads, head dim."""
    _, _, _, kv_heads, block_tokens, head_dim = pool_PL2GTD.shape
    block_stride, layer_stride, to_values = pool_PL2GTD.stride()[:3]
    # By way of the values: a dimension of one head has no stride that means anything.
    strides = (block_stride, layer_stride, to_values // kv_heads)
    return is_coded(pool_PL2GTD.dtype), *strides, block_tokens, kv_heads, head_dim


def _pointers(layer: LayerWeights) -> tuple[int, ...]:
    """In the order of ``struct Layer``."""
    assert isinstance(layer.ffn, FeedForward)
    return (
        layer.attention_norm_C.data_ptr(),
        *(_pointer(layer.q_norm_D), _pointer(layer.k_norm_D)),
        layer.ffn_norm_C.data_ptr(),
        *_matrix(layer.qkv),
        *_matrix(layer.attention_output),
        *_matrix(layer.ffn.gate_up),
        *_matrix(layer.ffn.down),
    )


def _adapter_pointers(layer: AdapterLayer) -> tuple[int, ...]:
    """In the order of ``struct AdapterLayer``."""
    return (
        *_low_rank(layer.qkv),
        *_low_rank(layer.attention_output),
        *_low_rank(layer.gate_up),
        *_low_rank(layer.down),
    )


def _low_rank(low_rank: LowRank | None) -> tuple[int, ...]:
    if low_rank is None:
        return (0,) * _LOW_RANK_WORDS
    assert isinstance(low_rank.a, Panels)
    return *_matrix(low_rank.a), *_matrix(low_rank.b), low_rank.a.output_count


def _matrix(weight: LinearWeight) -> tuple[int, int, int]:
    assert isinstance(weight, Panels)
    return weight.weight_OC.data_ptr(), _pointer(weight.bias_O), weight.format


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
