"""The CPU path: our C++ kernels; for matrices oneDNN, unless they are of bfloat16 and the CPU
multiplies it (AVX512-BF16).

This file checks shapes, types and strides, because the kernels cannot, and hands over pointers.
``CpuOps`` inherits the other matrices from ``TorchOps``, which is also the reference for the rest
and takes over entirely where no compiler is found.

*Threads.* Where waiting threads sleep (OMP_WAIT_POLICY=PASSIVE, as in a cluster whose pools share
the cores), calling one costs about 40 us, and decoding one token of a small model is 150 calls of
some 60 us each. So an operation that one thread ends within about 150 us gets one. Bits do not
depend on it.

Shape letters as in ``ops.py``.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pdserve.model.architecture import Architecture
from pdserve.model.cpu.library import load_library
from pdserve.model.cpu_layers import ALL_TOKENS, CpuLayers, cache_sizes, has_plain_layers
from pdserve.model.cpu_panels import Panels, pack_panels, unpacked_rows
from pdserve.model.ops import BatchLayout, LayerWeights, LinearWeight, Stack
from pdserve.model.quantised import QuantisedWeight
from pdserve.model.torch_ops import TorchOps

_logger = logging.getLogger(__name__)

_TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# What one thread does in about 150 us; bfloat16 on a server core of 2024.
_ELEMENTS = 1 << 17  # of norms, SwiGLU and rotary
_SCORED_ELEMENTS = 1 << 19  # of attention: elements of the queries times positions they see
_PRODUCTS = 1 << 25  # of a matrix: elements times rows, and what reading it is counted as
_PRODUCTS_PER_BYTE = 8  # read: 16 rows of bfloat16, 5 of 4 bits with scale and minimum


def cpu_ops() -> TorchOps:
    """``CpuOps``, or ``TorchOps`` where the C++ kernels cannot be had."""
    library = load_library()
    if library is None:
        return TorchOps()
    return CpuOps(library, threads_sleep=os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE")


def bind_threads() -> None:
    """Give each OpenMP thread of the calling thread a core of its own, where that works out evenly.

    For a thread that has the machine's cores to itself. Two threads that wait for one another at
    the end of every operation must never share a core while another is idle, and a scheduler that
    moves them to make way for a short-lived third does just that.
    """
    library = load_library()
    cores = sorted(os.sched_getaffinity(0))
    if library is None or torch.get_num_threads() != len(cores):
        return
    failed = library.pdserve_bind_threads((ctypes.c_int * len(cores))(*cores), len(cores))
    if failed:
        _logger.warning("%d of %d compute threads could not be bound to a core", failed, len(cores))


class CpuOps(TorchOps):
    name = "cpu"

    def __init__(self, library: ctypes.CDLL, *, threads_sleep: bool = False) -> None:
        super().__init__()
        self._library = library
        self._has_linear = bool(library.pdserve_has_linear())
        self.multiplies = "bfloat16 pairs" if self._has_linear else "float32"
        self.reads_quantised = self._has_linear
        self.threads_sleep = threads_sleep

    def pack(self, weight: LinearWeight) -> LinearWeight:
        reads = isinstance(weight, QuantisedWeight) or weight.weight_OC.dtype == torch.bfloat16
        if not self._has_linear or not reads:
            return super().pack(weight)
        return pack_panels(self._library, weight)

    def embedded(self, tokens_N: Tensor, embedding: LinearWeight) -> Tensor:
        if not isinstance(embedding, Panels):
            return super().embedded(tokens_N, embedding)
        self._calls["embedded"] += 1
        threads = self._threads(tokens_N.numel() * embedding.channel_count, _ELEMENTS)
        return unpacked_rows(self._library, embedding, tokens_N, threads)

    def stacked(self, layers: Sequence[LayerWeights], architecture: Architecture) -> Stack:
        packed = all(isinstance(layer.qkv, Panels) for layer in layers)
        if not packed or not has_plain_layers(architecture):
            return super().stacked(layers, architecture)
        enough = (_ELEMENTS, _SCORED_ELEMENTS, _PRODUCTS) if self.threads_sleep else (0, 0, 0)
        return CpuLayers(
            self._library, self._calls, layers, architecture, enough=(*enough, _PRODUCTS_PER_BYTE)
        )

    def linear(self, x_NC: Tensor, weight: LinearWeight) -> Tensor:
        work = _products(weight, x_NC.shape[0])
        threads, wanted = torch.get_num_threads(), self._threads(work, _PRODUCTS)
        if isinstance(weight, Panels):
            return self._linear(x_NC, weight, wanted)
        if threads == wanted:
            return super().linear(x_NC, weight)
        torch.set_num_threads(wanted)  # 0.3 us with the way back
        try:
            return super().linear(x_NC, weight)
        finally:
            torch.set_num_threads(threads)

    def _linear(self, x_NC: Tensor, weight: Panels, threads: int) -> Tensor:
        rows, channels = x_NC.shape
        fits = x_NC.dtype == torch.bfloat16 and x_NC.stride(1) == 1
        _check(fits and channels == weight.channel_count, x_NC)
        out_NO = torch.empty((rows, weight.output_count), dtype=x_NC.dtype)
        self._call(
            "linear",
            *(x_NC, x_NC.stride(0), weight.weight_OC, weight.bias_O, weight.format, out_NO),
            *(rows, channels, weight.output_count),
            threads=threads,
        )
        return out_NO

    def rms_norm(self, x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        rows, channels = x_NC.shape
        _check(x_NC.stride(1) == 1 and weight_C.shape == (channels,), x_NC, weight_C)
        out_NC = torch.empty((rows, channels), dtype=x_NC.dtype)
        self._call("rms_norm", x_NC, x_NC.stride(0), weight_C, out_NC, rows, channels, eps)
        return out_NC

    def add_rms_norm(
        self, x_NC: Tensor, residual_NC: Tensor, weight_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        rows, channels = x_NC.shape
        fits = x_NC.shape == residual_NC.shape and weight_C.shape == (channels,)
        fits = fits and x_NC.is_contiguous() and residual_NC.is_contiguous()
        _check(fits, x_NC, residual_NC, weight_C)
        out_NC, sum_NC = torch.empty_like(x_NC), torch.empty_like(x_NC)
        self._call("add_rms_norm", x_NC, residual_NC, weight_C, out_NC, sum_NC, rows, channels, eps)
        return out_NC, sum_NC

    def silu_mul(self, gate_up_NF2: Tensor) -> Tensor:
        return self._gate_mul("silu_mul", gate_up_NF2)

    def gelu_mul(self, gate_up_NF2: Tensor) -> Tensor:
        return self._gate_mul("gelu_mul", gate_up_NF2)

    def _gate_mul(self, name: str, gate_up_NF2: Tensor) -> Tensor:
        rows, channels = gate_up_NF2.shape[0], gate_up_NF2.shape[1] // 2
        _check(gate_up_NF2.is_contiguous() and gate_up_NF2.shape[1] % 2 == 0, gate_up_NF2)
        out_NF = torch.empty((rows, channels), dtype=gate_up_NF2.dtype)
        self._call(name, gate_up_NF2, out_NF, rows, channels)
        return out_NF

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
        tokens, heads, head_dim = q_NHD.shape
        for part in (q_NHD, k_NGD, v_NGD):
            _check(part.stride(2) == 1 and part.stride(1) == head_dim, part)
        _check_pool(q_NHD, pool_PL2GTD)
        kv_heads = pool_PL2GTD.shape[3]
        _check(k_NGD.shape == v_NGD.shape == (tokens, kv_heads, head_dim), k_NGD, v_NGD)
        _check(rope_PD.dtype == torch.float32 and rope_PD.is_contiguous(), q_NHD)
        out_NHD = torch.empty((tokens, heads, head_dim), dtype=q_NHD.dtype)
        self._call(
            "rope_and_cache",
            *(q_NHD, q_NHD.stride(0), k_NGD, k_NGD.stride(0), v_NGD, v_NGD.stride(0)),
            *(rope_PD, batch.positions_N, batch.slots_N, out_NHD, pool_PL2GTD),
            *(*_cache(pool_PL2GTD, layer), tokens, heads),
        )
        return out_NHD

    def attention(
        self,
        q_NHD: Tensor,
        batch: BatchLayout,
        pool_PL2GTD: Tensor,
        layer: int,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        tables_RB, window = batch.tables_RB, window or ALL_TOKENS
        work = q_NHD.numel() * min(batch.longest_context, window)
        fits = q_NHD.is_contiguous() and tables_RB.is_contiguous()
        _check(fits and q_NHD.shape[1] % pool_PL2GTD.shape[3] == 0, q_NHD)
        _check_pool(q_NHD, pool_PL2GTD)
        out_NHD = torch.empty_like(q_NHD)
        self._call(
            "attention",
            *(q_NHD, pool_PL2GTD, out_NHD, batch.positions_N, batch.starts_R1, tables_RB),
            *(tables_RB.shape[1], tables_RB.shape[0]),
            *(*_cache(pool_PL2GTD, layer), q_NHD.shape[1], scale, window),
            threads=self._threads(work, _SCORED_ELEMENTS),
        )
        return out_NHD

    def _threads(self, work: int, enough: int) -> int:
        return 1 if self.threads_sleep and work < enough else torch.get_num_threads()

    def _call(self, name: str, first: Tensor, *rest: Any, threads: int | None = None) -> None:
        self._calls[name] += 1
        arguments = [value.data_ptr() if isinstance(value, Tensor) else value for value in rest]
        function = _function(self._library, name)
        threads = threads or self._threads(first.numel(), _ELEMENTS)
        function(_TYPE[first.dtype], first.data_ptr(), *arguments, threads)


def _products(weight: LinearWeight, rows: int) -> int:
    """What a matrix times so many rows counts as, reading it included."""
    if isinstance(weight, Panels):
        return weight.element_count * rows + weight.weight_OC.nbytes * _PRODUCTS_PER_BYTE
    # torch's other types multiply slower by about as much as there is more to read.
    return weight.weight_OC.numel() * (rows + 2 * _PRODUCTS_PER_BYTE)


@functools.cache
def _function(library: ctypes.CDLL, name: str) -> Any:
    return getattr(library, f"pdserve_{name}")


def _cache(pool_PL2GTD: Tensor, layer: int) -> tuple[int, ...]:
    """As ``cache_sizes``, with the layer's offset in the place of the layers' stride."""
    coded, block_stride, layer_stride, *sizes = cache_sizes(pool_PL2GTD)
    return coded, block_stride, layer * layer_stride, *sizes


def _check_pool(q_NHD: Tensor, pool_PL2GTD: Tensor) -> None:
    """A pool has the dtype of q, or int8 with scales; the kernels know no other codes."""
    _check(True, q_NHD, q_NHD if pool_PL2GTD.dtype == torch.int8 else pool_PL2GTD)


def _check(fits: bool, *tensors: Tensor) -> None:
    """Refuse what a kernel would read wrongly: other strides, mixed types, another device."""
    if not fits or len({(tensor.dtype, tensor.device.type) for tensor in tensors}) != 1:
        shapes = ", ".join(
            f"{tensor.dtype} {tuple(tensor.shape)} by {tensor.stride()}" for tensor in tensors
        )
        raise ValueError(f"these tensors do not fit together: {shapes}")
