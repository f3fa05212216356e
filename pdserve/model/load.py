"""From settings to a runner: which files, device, dtype and kernels, and how large the pool is."""

import dataclasses
import importlib.metadata
import os

import torch

from pdserve.config import ModelConfig, Quantization
from pdserve.errors import ConfigError
from pdserve.model.architecture import Architecture, context_limit
from pdserve.model.cpu_ops import cpu_ops
from pdserve.model.families.registry import read_architecture
from pdserve.model.gguf_weights import GgufWeights
from pdserve.model.ops import Ops
from pdserve.model.pool import LAYOUT, KvPool, block_bytes
from pdserve.model.runner import ModelRunner
from pdserve.model.safetensors_weights import SafetensorsWeights
from pdserve.model.source import ModelFiles, fingerprint, locate
from pdserve.model.weights import WeightFiles, build_weights

_DTYPES = {
    "auto": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


_ROUNDED = ("int8", "int4")
"""What makes other weights of those that are stored; all else computes the same."""


def load_runner(
    config: ModelConfig, *, block_count: int | None, pool_bytes: int, threads: int = 0
) -> ModelRunner:
    """A runner with its weights in memory and an empty pool.

    Args:
        config: which model, and how it is computed.
        block_count: KV blocks of the pool; None takes as many as fit into ``pool_bytes``.
        pool_bytes: counts only without ``block_count``.
        threads: compute threads on a CPU, of this whole process; 0 is one per core.

    Raises:
        ConfigError: the model cannot be found, read or computed, or the pool is too small.
    """
    files = locate(config)
    architecture = read_architecture(files)
    architecture = dataclasses.replace(
        architecture, context_tokens=context_limit(architecture, config)
    )
    device, dtype = device_of(config), _DTYPES[config.dtype]
    if config.quantization not in ("auto", "none") and device.type != "cpu":
        raise ConfigError(
            f"model.quantization is {config.quantization}, but only a CPU computes with quantised "
            f"weights so far; the device is {device.type}: take none, or model.device cpu"
        )
    if block_count is None:
        block_count = pool_bytes // block_bytes(architecture, config.block_tokens, dtype)
        if block_count < 2:
            raise ConfigError(
                f"pool_bytes is {pool_bytes}, a block of this model has "
                f"{block_bytes(architecture, config.block_tokens, dtype)}; at least 2 must fit"
            )
    if device.type == "cpu":
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    ops = _ops_of(config, device)
    weights = build_weights(
        architecture,
        _weight_files(files, architecture),
        ops,
        dtype=dtype,
        device=device,
        quantization=_quantization_of(config, dtype, ops),
    )
    pool = KvPool(
        architecture,
        block_count=block_count,
        block_tokens=config.block_tokens,
        dtype=dtype,
        device=device,
    )
    return ModelRunner(architecture, weights, ops, pool)


def device_of(config: ModelConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device is cuda, but torch finds no CUDA device; use auto or cpu")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def kv_identity(
    files: ModelFiles, architecture: Architecture, config: ModelConfig, dtype: str | None = None
) -> dict[str, str | int]:
    """Everything two workers must agree on before one may read the other's KV blocks.

    Kernels are in it: their roundings differ, and a block must be the one this worker would have
    computed. Number formats alone would also fit, at the price of the bit-for-bit promise.
    """
    ops = _ops_of(config, device_of(config))
    return {
        "weights": fingerprint(files),
        "architecture": repr(dataclasses.replace(architecture, context_tokens=1)),
        "quantization": config.quantization if config.quantization in _ROUNDED else "as stored",
        "dtype": dtype or str(_DTYPES[config.dtype]).removeprefix("torch."),
        "block_tokens": config.block_tokens,
        "layout": LAYOUT,
        "kernels": ops.name,
        "multiplies": ops.multiplies,
        "torch": importlib.metadata.version("torch"),
    }


def _ops_of(config: ModelConfig, device: torch.device) -> Ops:
    wanted = config.kernels
    if wanted == "auto":
        wanted = "triton" if device.type == "cuda" else "cpu"
    if wanted == "triton":
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(
                "model.kernels is triton on a CPU: set TRITON_INTERPRET=1 for Triton's "
                "interpreter, or take cpu"
            )
        from pdserve.model.triton_ops import TritonOps

        return TritonOps(deterministic=config.deterministic)
    if device.type != "cpu":
        raise ConfigError(f"model.kernels is cpu, the device is {device.type}; use auto or triton")
    return cpu_ops()


def _quantization_of(config: ModelConfig, dtype: torch.dtype, ops: Ops) -> Quantization:
    if config.quantization != "auto":
        return config.quantization
    return "file" if ops.reads_quantised and dtype == torch.bfloat16 else "none"


def _weight_files(files: ModelFiles, architecture: Architecture) -> WeightFiles:
    if files.format == "gguf":
        return GgufWeights(files.path, architecture)
    return SafetensorsWeights(files.path)
