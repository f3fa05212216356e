"""From settings to a runner: which files, device, dtype and kernels, and how large the pool is."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pdserve.config import ModelConfig, Quantization
from pdserve.errors import ConfigError
from pdserve.model.adapter_files import AdapterFiles, locate_adapters
from pdserve.model.adapters import load_adapters
from pdserve.model.architecture import Architecture, context_limit
from pdserve.model.cpu_ops import cpu_ops
from pdserve.model.families.registry import read_architecture
from pdserve.model.gguf_weights import GgufWeights
from pdserve.model.graphs import CudaRecorder, Recorder
from pdserve.model.ops import Ops
from pdserve.model.pool import LAYOUT, KvPool, block_bytes
from pdserve.model.runner import ModelRunner
from pdserve.model.safetensors_weights import SafetensorsWeights
from pdserve.model.source import ModelFiles, fingerprint, locate, packing_in
from pdserve.model.weights import WeightFiles, build_weights

_DTYPES = {
    "auto": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}

_KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

_ROUNDED = ("int8", "int4", "fp8")
"""What makes other weights of those that are stored."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known of a runner before its weights are read."""

    architecture: Architecture
    files: WeightFiles
    ops: Ops
    dtype: torch.dtype
    device: torch.device
    quantization: Quantization
    block_count: int
    block_tokens: int
    kv_dtype: torch.dtype
    adapters: Sequence[AdapterFiles]


def load_runner(
    config: ModelConfig,
    *,
    block_count: int | None,
    pool_bytes: int,
    threads: int = 0,
    running_max: int = 64,
) -> ModelRunner:
    """A runner with its weights read and an empty pool. Arguments and errors as ``prepare``, and:

    Args:
        running_max: sequences in one step; steps of more are not recorded as CUDA graphs.
    """
    prepared = prepare(config, block_count=block_count, pool_bytes=pool_bytes, threads=threads)
    weights = build_weights(
        prepared.architecture,
        prepared.files,
        prepared.ops,
        dtype=prepared.dtype,
        device=prepared.device,
        quantization=prepared.quantization,
    )
    recorder = recorder_of(config, prepared.architecture, prepared.device)
    pool = KvPool(
        prepared.architecture,
        block_count=prepared.block_count,
        block_tokens=prepared.block_tokens,
        dtype=prepared.kv_dtype,
        device=prepared.device,
        scratch=recorder is not None,
    )
    adapters = load_adapters(
        prepared.adapters,
        prepared.architecture,
        prepared.ops,
        dtype=prepared.dtype,
        device=prepared.device,
    )
    return ModelRunner(
        prepared.architecture,
        weights,
        prepared.ops,
        pool,
        adapters,
        recorder=recorder,
        recorded_rows_max=running_max,
    )


def prepare(
    config: ModelConfig, *, block_count: int | None, pool_bytes: int, threads: int = 0
) -> Prepared:
    """Which files, device, dtype and kernels a runner has, and how large its pool is.

    Args:
        config: which model, and how it is computed.
        block_count: KV blocks of the pool; None takes as many as fit into ``pool_bytes``.
        pool_bytes: counts only without ``block_count``.
        threads: compute threads on a CPU, of this whole process; 0 is one per core.
        running_max: sequences in one step; steps of more are not recorded as CUDA graphs.

    Raises:
        ConfigError: the model cannot be found, read or computed, or the pool is too small.
    """
    files = locate(config)
    architecture = read_architecture(files)
    architecture = dataclasses.replace(
        architecture, context_tokens=context_limit(architecture, config)
    )
    device, dtype = device_of(config), _DTYPES[config.dtype]
    kv_dtype = _KV_DTYPES.get(config.kv_dtype, dtype)
    if block_count is None:
        block_count = pool_bytes // block_bytes(architecture, config.block_tokens, kv_dtype)
        if block_count < 2:
            raise ConfigError(
                f"pool_bytes is {pool_bytes}, a block of this model has "
                f"{block_bytes(architecture, config.block_tokens, kv_dtype)}; at least 2 must fit"
            )
    if device.type == "cpu":
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    ops = _ops_of(config, device)
    if config.quantization == "fp8" and not ops.reads_fp8:
        raise ConfigError(
            f"model.quantization is fp8, which the {ops.name} kernels do not multiply; take int8, "
            "or none, or a GPU"
        )
    if config.kv_dtype == "fp8" and ops.name != "triton":
        raise ConfigError(
            "model.kv_dtype is fp8, which the kernels of a CPU do not read; take int8, which is as "
            "small and more exact"
        )
    return Prepared(
        architecture=architecture,
        files=_weight_files(files, architecture),
        ops=ops,
        dtype=dtype,
        device=device,
        quantization=_quantization_of(config, dtype, ops),
        block_count=block_count,
        block_tokens=config.block_tokens,
        kv_dtype=kv_dtype,
        adapters=locate_adapters(config, files.name),
    )


def recorder_of(
    config: ModelConfig, architecture: Architecture, device: torch.device
) -> Recorder | None:
    """What records decode steps; None where none are. Those of a mixture of experts cannot be: how
    many tokens each expert gets is read on the host."""
    has_experts = any(kind.experts is not None for kind in architecture.layers)
    if config.cuda_graphs == "off" or device.type != "cuda" or has_experts:
        return None
    return CudaRecorder(device)


def device_of(config: ModelConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device is cuda, but torch finds no CUDA device; use auto or cpu")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def kv_identity(
    files: ModelFiles,
    architecture: Architecture,
    config: ModelConfig,
    dtype: str | None = None,
    *,
    parts: int = 1,
    store_codec: str = "plain",
) -> dict[str, str | int]:
    """Everything two workers must agree on before one may read the other's KV blocks.

    ``parts``: how many the model is cut into (``parallel.parts``). ``store_codec``: how blocks are
    packed between pools (``packed_pool``).

    Kernels are in it: their roundings differ, and a block must be the one this worker would have
    computed. Number formats alone would also fit, at the price of the bit-for-bit promise.
    """
    ops = _ops_of(config, device_of(config))
    rounded = config.quantization in _ROUNDED
    stored = config.quantization == "file" and not ops.quantised_alike
    return {
        "weights": fingerprint(files),
        "packing": repr(packing_in(files)),  # other numbers of the same bytes
        "architecture": repr(dataclasses.replace(architecture, context_tokens=1)),
        "quantization": config.quantization if rounded or stored else "as stored",
        "dtype": dtype or str(_DTYPES[config.dtype]).removeprefix("torch."),
        "kv_dtype": _kept_as(config, store_codec),
        "block_tokens": config.block_tokens,
        "layout": LAYOUT,
        "kernels": ops.name,
        "multiplies": ops.multiplies,
        # Without it a block's bits depend on what shared its step, with it they never do.
        "deterministic": int(config.deterministic or ops.name != "triton"),
        "parts": parts,
        "torch": importlib.metadata.version("torch"),
    }


def _kept_as(config: ModelConfig, store_codec: str) -> str:
    if store_codec != "plain":
        return f"{store_codec}, packed"
    return "dtype" if config.kv_dtype == "auto" else config.kv_dtype


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

        return TritonOps(deterministic=config.deterministic, device=device)
    if device.type != "cpu":
        raise ConfigError(f"model.kernels is cpu, the device is {device.type}; use auto or triton")
    return cpu_ops()


def _quantization_of(config: ModelConfig, dtype: torch.dtype, ops: Ops) -> Quantization:
    if config.quantization != "auto":
        return config.quantization
    alike = ops.reads_quantised and ops.quantised_alike
    return "file" if alike and dtype == torch.bfloat16 else "none"


def _weight_files(files: ModelFiles, architecture: Architecture) -> WeightFiles:
    if files.format == "gguf":
        return GgufWeights(files.path, architecture)
    return SafetensorsWeights(files.path)
