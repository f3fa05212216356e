"""A whole model through the kernels: the CPU path's logits, and the same bits in any company."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from pdserve.config import ModelConfig, Quantization
from pdserve.errors import ConfigError
from pdserve.model import load
from pdserve.model.drawn import Drawn
from pdserve.model.families.registry import read_architecture
from pdserve.model.fp8_weights import Fp8Weight
from pdserve.model.graphs import CudaRecorder, Recorder, Work
from pdserve.model.grouped_weights import GroupedWeight
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
from tests.models.small_gguf import write_gguf

PROMPT = [7 * index % 400 + 40 for index in range(37)]
OTHER = [11 * index % 400 + 40 for index in range(9)]
BLOCKS, OTHER_BLOCKS = [5, 2, 9], [1]


class Caller:
    """A ``graphs.Recorder`` that calls what it was given: recorded steps on any device."""

    def record(self, work: Work) -> Work:
        return work


def runner_of(
    directory: Path,
    ops: Ops,
    dtype: torch.dtype,
    quantization: Quantization = "none",
    *,
    block_count: int = 10,
    recorder: Recorder | None = None,
) -> ModelRunner:
    architecture = read_architecture(ModelFiles("small", "safetensors", directory))
    device = torch.device(DEVICE)
    files = SafetensorsWeights(directory)
    weights = build_weights(
        architecture, files, ops, dtype=dtype, device=device, quantization=quantization
    )
    pool = KvPool(
        architecture,
        block_count=block_count,
        block_tokens=16,
        dtype=dtype,
        device=device,
        scratch=recorder is not None,
    )
    return ModelRunner(architecture, weights, ops, pool, recorder=recorder)


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


def test_quantised_weights_give_nearly_the_logits_of_the_torch_path(tmp_path: Path) -> None:
    """Which rounds the same weights and has them in bfloat16. Embedding and head are one matrix of
    8 bits."""
    sizes: dict[str, Any] = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "layers": 1}
    directory = write_small_model(tmp_path, tied=True, **sizes)
    ours, theirs = (
        runner_of(directory, ops, torch.bfloat16, "int4")
        for ops in (TritonOps(device=torch.device(DEVICE)), TorchOps())
    )
    qkv, head = ours.weights.layers[0].qkv, ours.weights.head
    assert isinstance(qkv, GroupedWeight)
    assert isinstance(head, GroupedWeight)
    assert (qkv.bits, head.bits) == (4, 8)
    assert ours.weights.embedding is head
    ours_RV, theirs_RV = (runner.step([Run(OTHER, 0, OTHER_BLOCKS)]) for runner in (ours, theirs))
    error = (ours_RV - theirs_RV).std() / theirs_RV.std()
    assert error < 0.05  # of bfloat16, which the interpreter cuts off instead of rounding


def test_fp8_layers_are_near_plain_ones_and_leave_the_ends_alone(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "layers": 1}
    directory = write_small_model(tmp_path, **sizes)
    plain = runner_of(directory, TritonOps(), torch.bfloat16)
    ours = runner_of(directory, TritonOps(), torch.bfloat16, "fp8")
    assert isinstance(ours.weights.layers[0].qkv, Fp8Weight)
    assert torch.equal(ours.weights.head.weight_OC, plain.weights.head.weight_OC)
    ours_RV, plain_RV = (runner.step([Run(OTHER, 0, OTHER_BLOCKS)]) for runner in (ours, plain))
    error = (ours_RV - plain_RV).std() / plain_RV.std()
    assert 0.01 < error < 0.2  # a product's is 0.037, see the kernel's test; there are four


def test_fp8_needs_kernels_that_multiply_it(tmp_path: Path) -> None:
    source = str(write_small_model(tmp_path, layers=1))
    config = ModelConfig(source=source, device="cpu", kernels="cpu", quantization="fp8")
    with pytest.raises(ConfigError, match=r"is fp8, which the (cpu|torch) kernels do not"):
        load.load_runner(config, block_count=2, pool_bytes=0)


def test_only_where_bits_are_alike_do_kernels_share_kv_of_quantised_and_plain_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only there ``auto`` takes a file's quantised weights."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    directory = write_small_model(tmp_path / "plain", layers=1)
    files = ModelFiles("small", "safetensors", directory)
    architecture = read_architecture(files)
    quantizations: tuple[Quantization, ...] = ("none", "file", "int4", "int8", "fp8")
    ways: tuple[tuple[Literal["cpu", "triton"], int], ...] = (("cpu", 4), ("triton", 5))
    for kernels, different in ways:
        identities = {
            load.kv_identity(
                files,
                architecture,
                ModelConfig(device="cpu", kernels=kernels, quantization=quantization),
            )["quantization"]
            for quantization in quantizations
        }
        assert len(identities) == different
    loose = ModelConfig(device="cpu", kernels="triton", deterministic=False)
    strict = replace(loose, deterministic=True)
    assert load.kv_identity(files, architecture, loose) != load.kv_identity(
        files, architecture, strict
    ), "whose bits depend on their company"
    path = tmp_path / "small.gguf"
    write_gguf(directory, path, "Q8_0")
    config = ModelConfig(source=str(path), device="cpu", kernels="triton", quantization="file")
    runner = load.load_runner(config, block_count=2, pool_bytes=0)
    assert isinstance(runner.weights.layers[0].qkv, GroupedWeight)
    runner = load.load_runner(replace(config, quantization="auto"), block_count=2, pool_bytes=0)
    assert not isinstance(runner.weights.layers[0].qkv, GroupedWeight)


def test_a_recorded_step_launched_for_any_context_changes_no_bit(tmp_path: Path) -> None:
    """Contexts of one split and of two, in the grid for three. No row pads: the number of rows may
    count in a GPU's products."""
    directory = write_small_model(
        tmp_path, layers=1, hidden=32, heads=2, kv_heads=1, context_tokens=1100
    )
    recorder = CudaRecorder(torch.device(DEVICE)) if DEVICE == "cuda" else Caller()
    plain, recorded = (
        runner_of(directory, TritonOps(), torch.bfloat16, block_count=43, recorder=made)
        for made in (None, recorder)
    )
    generator = torch.Generator().manual_seed(3)
    kv = torch.randn(plain.pool.tensor.shape, generator=generator).to(plain.pool.tensor)
    for starts in ((9, 600), (10, 515)):  # recorded, and replayed
        plain.pool.tensor.copy_(kv)
        recorded.pool.tensor[:-1] = kv
        runs = [Run([40], starts[0], [0]), Run([41], starts[1], range(1, 43))]
        logits_RV = plain.step(runs)
        assert torch.equal(recorded.step(runs), logits_RV)
        assert torch.equal(recorded.pool.tensor[:-1], plain.pool.tensor)
    drawn = Drawn(logits_RV)  # goes on as the input of the next step, not known here
    following = [Run([0], run.start + 1, run.blocks) for run in runs]
    fed_RV = recorded.step(following, drawn.of([0, 1]))
    told = [replace(r, tokens=[t.token]) for r, t in zip(following, drawn.tokens(), strict=True)]
    assert torch.equal(fed_RV, plain.step(told))
    assert recorded.calls()["graph"] == 3
    block = bytearray(plain.pool.block_bytes)
    recorded.pool.read_block(0, memoryview(block))
    plain.pool.write_block(5, memoryview(block))
    assert torch.equal(plain.pool.tensor[5], recorded.pool.tensor[0])
