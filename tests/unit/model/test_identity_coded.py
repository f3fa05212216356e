"""``test_identity``'s promise with KV in 8 bits: the same bits in any company, chunks and pool."""

import random
from pathlib import Path

import pytest
import torch

from pdserve.model.cpu_layers import CpuLayers
from pdserve.model.cpu_ops import CpuOps
from pdserve.model.runner import Run
from pdserve.model.torch_ops import TorchOps
from tests.models.small import write_small_model
from tests.unit.model.conftest import RunnerOf
from tests.unit.model.test_identity import FAMILIES, SHAPES, draw_sequences, kv_of, run_in_company


@pytest.mark.parametrize(
    ("shape", "kernels", "dtype", "kv_dtype"),
    [
        ("head dim 24, groups of 3, odd sizes", "cpu", torch.float32, torch.int8),
        ("head dim 24, groups of 3, odd sizes", "cpu", torch.bfloat16, torch.int8),
        ("a window of a tile", "cpu", torch.bfloat16, torch.int8),
        ("a window of a tile", "torch", torch.bfloat16, torch.int8),
        ("head dim 24, groups of 3, odd sizes", "torch", torch.float32, torch.float8_e4m3fn),
    ],
)
def test_company_chunks_and_moves_change_no_bit(
    tmp_path: Path,
    runner_of: RunnerOf,
    shape: str,
    kernels: str,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> None:
    directory = write_small_model(tmp_path, **(SHAPES | FAMILIES)[shape])
    chance = random.Random(f"{shape} {kernels}")
    runners = [
        runner_of(directory, kernels=kernels, dtype=dtype, block_count=64, kv_dtype=kv_dtype)
        for _ in range(2)
    ]
    sequences = draw_sequences(runners[0], chance, count=3, longest=100)

    assert run_in_company(runners, sequences, chance) > 1

    for sequence in sequences:
        assert kv_of(runners[sequence.home], sequence.blocks) == sequence.kv


def test_all_layers_in_one_call_give_the_bits_of_one_after_the_other(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    directory = write_small_model(tmp_path, hidden=128, heads=4, kv_heads=2)
    at_once, one_by_one = (
        runner_of(directory, dtype=torch.bfloat16, kv_dtype=torch.int8) for _ in range(2)
    )
    assert isinstance(one_by_one.ops, CpuOps)
    if not isinstance(at_once._layers, CpuLayers):
        pytest.skip("needs a CPU that multiplies bfloat16")
    one_by_one._layers = TorchOps.stacked(
        one_by_one.ops, one_by_one.weights.layers, one_by_one.architecture
    )
    for start, length in ((0, 100), (100, 1)):
        runs = [Run(list(range(length)), start, list(range(7)))]
        assert torch.equal(at_once.step(runs), one_by_one.step(runs))
    assert kv_of(at_once, list(range(7))) == kv_of(one_by_one, list(range(7)))
