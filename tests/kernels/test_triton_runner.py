"""A whole model through the kernels: the CPU path's logits, and the same bits in any company."""

from pathlib import Path

import pytest
import torch

from pdserve.model.families.registry import read_architecture
from pdserve.model.ops import Ops
from pdserve.model.pool import KvPool
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.safetensors_weights import SafetensorsWeights
from pdserve.model.source import ModelFiles
from pdserve.model.torch_ops import TorchOps
from pdserve.model.triton_ops import TritonOps
from pdserve.model.weights import build_weights
from tests.kernels.support import DEVICE
from tests.models.small import Family, write_small_model

PROMPT = [7 * index % 400 + 40 for index in range(37)]
OTHER = [11 * index % 400 + 40 for index in range(9)]
BLOCKS, OTHER_BLOCKS = [5, 2, 9], [1]


def runner_of(directory: Path, ops: Ops, dtype: torch.dtype) -> ModelRunner:
    architecture = read_architecture(ModelFiles("small", "safetensors", directory))
    device = torch.device(DEVICE)
    files = SafetensorsWeights(directory)
    weights = build_weights(architecture, files, ops, dtype=dtype, device=device)
    pool = KvPool(architecture, block_count=10, block_tokens=16, dtype=dtype, device=device)
    return ModelRunner(architecture, weights, ops, pool)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma3"])
def test_two_layers_give_the_logits_of_the_torch_path(tmp_path: Path, family: Family) -> None:
    directory = write_small_model(tmp_path, family=family)
    ops = TritonOps()
    ours_RV = runner_of(directory, ops, torch.float32).step([Run(PROMPT, 0, BLOCKS)])
    theirs_RV = runner_of(directory, TorchOps(), torch.float32).step([Run(PROMPT, 0, BLOCKS)])
    scale = theirs_RV.abs().max().item()
    torch.testing.assert_close(ours_RV, theirs_RV, rtol=0, atol=1e-5 * scale)
    assert ops.calls()["attention"] == ops.calls()["rope_and_cache"] == 2
    if family != "qwen3_moe":  # whose experts are called one by one
        assert ops.calls()["gelu_mul" if family == "gemma3" else "silu_mul"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3"])
def test_chunks_decode_and_company_change_no_bit(
    tmp_path: Path, family: Family, dtype: torch.dtype
) -> None:
    runner = runner_of(write_small_model(tmp_path, family=family), TritonOps(), dtype)
    together_RV = runner.step([Run(OTHER, 0, OTHER_BLOCKS), Run(PROMPT, 0, BLOCKS)])
    kv = runner.pool.tensor[[*BLOCKS, *OTHER_BLOCKS]].clone()

    runner.pool.tensor.zero_()
    other_RV = runner.step([Run(OTHER, 0, OTHER_BLOCKS)])
    for start, end in ((0, 5), (5, 34), (34, 35), (35, 37)):
        prompt_RV = runner.step([Run(PROMPT[start:end], start, BLOCKS)])
    assert torch.equal(torch.cat((other_RV, prompt_RV)), together_RV)
    for block, expected in zip([*BLOCKS, *OTHER_BLOCKS], kv, strict=True):
        assert torch.equal(runner.pool.tensor[block], expected), f"KV of block {block}"
