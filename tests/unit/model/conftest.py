"""Runners over small models, with the kernels of one's choice."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from pdserve.config import ModelConfig, Quantization
from pdserve.model.adapter_files import locate_adapters
from pdserve.model.adapters import load_adapters
from pdserve.model.cpu.library import load_library
from pdserve.model.cpu_ops import CpuOps
from pdserve.model.families.registry import read_architecture
from pdserve.model.gguf_weights import GgufWeights
from pdserve.model.graphs import Recorder
from pdserve.model.ops import Ops
from pdserve.model.pool import KvPool
from pdserve.model.runner import ModelRunner
from pdserve.model.safetensors_weights import SafetensorsWeights
from pdserve.model.source import ModelFiles
from pdserve.model.torch_ops import TorchOps
from pdserve.model.weights import build_weights

RunnerOf = Callable[..., ModelRunner]


def ops_named(name: str) -> Ops:
    if name == "torch":
        return TorchOps()
    library = load_library()
    if library is None:
        pytest.skip("needs g++ for the C++ kernels")
    return CpuOps(library)


@pytest.fixture(autouse=True, scope="session")
def _compiled() -> None:
    """Before the first test: a compilation waits for a process, which no unit test may."""
    load_library()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two OpenMP threads on a busy machine wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runner_of() -> RunnerOf:
    def build(
        path: Path,
        *,
        kernels: str = "cpu",
        dtype: torch.dtype = torch.float32,
        block_count: int = 32,
        block_tokens: int = 16,
        quantization: Quantization = "none",
        adapters: Mapping[str, Path] = MappingProxyType({}),
        recorder: Recorder | None = None,
        recorded_rows_max: int = 64,
        kv_dtype: torch.dtype | None = None,
    ) -> ModelRunner:
        files = ModelFiles("small", "gguf" if path.is_file() else "safetensors", path)
        architecture = read_architecture(files)
        source = GgufWeights(path, architecture) if path.is_file() else SafetensorsWeights(path)
        ops, device = ops_named(kernels), torch.device("cpu")
        weights = build_weights(
            architecture, source, ops, dtype=dtype, device=device, quantization=quantization
        )
        pool = KvPool(
            architecture,
            block_count=block_count,
            block_tokens=block_tokens,
            dtype=kv_dtype or dtype,
            device=device,
            scratch=recorder is not None,
        )
        config = ModelConfig(adapters={name: str(path) for name, path in adapters.items()})
        loaded = load_adapters(
            locate_adapters(config, "small"), architecture, ops, dtype=dtype, device=device
        )
        return ModelRunner(
            architecture,
            weights,
            ops,
            pool,
            loaded,
            recorder=recorder,
            recorded_rows_max=recorded_rows_max,
        )

    return build
