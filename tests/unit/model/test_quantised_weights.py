"""Models whose weights stay quantised, or become so: which do, and what they answer."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdserve.config import Quantization
from pdserve.model.cpu_panels import Panels
from pdserve.model.ops import FeedForward, LinearWeight
from pdserve.model.quantised import Q4_1, Q8_0, quantised
from pdserve.model.runner import ModelRunner, Run
from tests.models.small import Family, write_small_model
from tests.models.small_gguf import write_gguf
from tests.unit.model.conftest import RunnerOf

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 238, 462, 64, 338, 327, 9, 50, 288, 419, 7, 169, 399]
SIZES: dict[str, Any] = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96}
BFLOAT16, NIBBLES, BYTES = 0, 1, 2


def answers(runner: ModelRunner) -> Tensor:
    """Logits of a prompt's last token and of three tokens after it; [4, V]."""
    blocks = list(range(4))
    rows = [runner.step([Run(PROMPT, 0, blocks)])[0]]
    for at in range(3):
        rows.append(runner.step([Run([7 * at + 40], len(PROMPT) + at, blocks)])[0])
    return torch.stack(rows)


def kinds_of(runner: ModelRunner) -> dict[str, int]:
    """The format of each matrix of the first layer, of the embedding and of the head."""
    weights = runner.weights
    layer = weights.layers[0]
    assert isinstance(layer.ffn, FeedForward)
    matrices: dict[str, LinearWeight] = {
        "qkv": layer.qkv,
        "attention_output": layer.attention_output,
        "gate_up": layer.ffn.gate_up,
        "down": layer.ffn.down,
        "embedding": weights.embedding,
        "head": weights.head,
    }
    if not runner.ops.reads_quantised:
        pytest.skip("needs a CPU that multiplies bfloat16")
    return {
        name: matrix.format if isinstance(matrix, Panels) else BFLOAT16
        for name, matrix in matrices.items()
    }


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "F16"])
def test_weights_left_as_a_file_has_them_give_the_bits_of_dequantised_ones(
    tmp_path: Path, runner_of: RunnerOf, kind: str, family: Family, kernels: str
) -> None:
    """Rows of q and k in another order, matrices below one another, biases, two kinds of norm; on
    the torch path too, where the weights are dequantised after all."""
    directory = write_small_model(tmp_path / "plain", family=family, tied=True, **SIZES)
    path = tmp_path / "small.gguf"
    write_gguf(directory, path, kind, family=family)

    as_stored, dequantised = (
        runner_of(path, kernels=kernels, dtype=torch.bfloat16, quantization=quantization)
        for quantization in ("file", "none")
    )

    assert torch.equal(answers(as_stored), answers(dequantised))


@pytest.mark.parametrize(
    ("kind", "format_code"),
    [("Q4_0", NIBBLES), ("Q4_1", NIBBLES), ("Q8_0", BYTES), ("Q5_0", BFLOAT16), ("F32", BFLOAT16)],
)
def test_what_a_file_holds_in_a_known_format_stays_in_it(
    tmp_path: Path, runner_of: RunnerOf, kind: str, format_code: int
) -> None:
    path = tmp_path / "small.gguf"
    write_gguf(write_small_model(tmp_path / "plain", tied=True, **SIZES), path, kind)
    runner = runner_of(path, dtype=torch.bfloat16, quantization="file")
    assert set(kinds_of(runner).values()) == {format_code}
    plain = runner_of(path, dtype=torch.bfloat16)
    assert set(kinds_of(plain).values()) == {BFLOAT16}


def test_an_embedding_that_is_the_head_too_is_in_memory_once(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    directory = write_small_model(tmp_path, tied=True, **SIZES)
    runner = runner_of(directory, dtype=torch.bfloat16, quantization="int8")
    assert set(kinds_of(runner).values()) == {BYTES}
    assert runner.weights.embedding is runner.weights.head


def test_matrices_of_unlike_types_are_joined_exactly_or_dequantised(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    """Q4_0 and Q4_1 are one format; a v of 8 bits between q and k of 4 makes all three bfloat16."""
    directory = write_small_model(tmp_path / "plain", **SIZES)
    path = tmp_path / "small.gguf"
    write_gguf(directory, path, "Q4_1", kinds={"v_proj": "Q8_0", "up_proj": "Q4_0"})
    runner = runner_of(path, dtype=torch.bfloat16, quantization="file")
    assert torch.equal(answers(runner), answers(runner_of(path, dtype=torch.bfloat16)))
    kinds = kinds_of(runner)
    assert (kinds["qkv"], kinds["gate_up"]) == (BFLOAT16, NIBBLES)


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_quantised_on_load_are_the_nearest_of_their_format(
    tmp_path: Path, runner_of: RunnerOf, tied: bool, quantization: Quantization, kernels: str
) -> None:
    """The same model with weights quantised beforehand and written as bfloat16 gives the same bits.
    With ``int4`` the embedding and the head have 8 bits."""
    directory = write_small_model(tmp_path / "plain", tied=tied, **SIZES)
    rounded = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        is_end = "embed_tokens" in name or "lm_head" in name
        target = Q4_1 if quantization == "int4" and not is_end else Q8_0
        weight = quantised(tensor, target)
        rounded[name] = tensor if weight is None else weight.dequantised().bfloat16()
    beforehand = write_small_model(tmp_path / "rounded", tied=tied, **SIZES)
    save_file(rounded, beforehand / "model.safetensors", metadata={"format": "pt"})

    on_load = runner_of(directory, kernels=kernels, dtype=torch.bfloat16, quantization=quantization)

    expected = answers(runner_of(beforehand, kernels=kernels, dtype=torch.bfloat16))
    assert torch.equal(answers(on_load), expected)
    assert not torch.equal(
        expected, answers(runner_of(directory, kernels=kernels, dtype=torch.bfloat16))
    )


@pytest.mark.parametrize(("quantization", "kind"), [("int4", "Q4_0"), ("int8", "Q8_0")])
def test_a_file_that_has_the_wanted_format_is_not_rounded_again(
    tmp_path: Path, runner_of: RunnerOf, quantization: Quantization, kind: str
) -> None:
    path = tmp_path / "small.gguf"
    ends = {"embed_tokens": "Q8_0", "lm_head": "Q8_0"}
    write_gguf(write_small_model(tmp_path / "plain", **SIZES), path, kind, kinds=ends)
    on_load, as_stored = (
        runner_of(path, dtype=torch.bfloat16, quantization=wanted)
        for wanted in (quantization, "file")
    )
    assert torch.equal(answers(on_load), answers(as_stored))


def test_a_matrix_without_whole_groups_stays_bfloat16(tmp_path: Path, runner_of: RunnerOf) -> None:
    directory = write_small_model(tmp_path, hidden=64, heads=4, kv_heads=2, ffn=100)
    runner = runner_of(directory, dtype=torch.bfloat16, quantization="int4")
    kinds = kinds_of(runner)
    assert kinds.pop("down") == BFLOAT16
    assert (kinds.pop("embedding"), kinds.pop("head")) == (BYTES, BYTES)
    assert set(kinds.values()) == {NIBBLES}


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_kernels_that_do_not_read_quantised_weights_say_so(
    tmp_path: Path, runner_of: RunnerOf, caplog: pytest.LogCaptureFixture, kernels: str
) -> None:
    directory = write_small_model(tmp_path, **SIZES)
    with caplog.at_level(logging.WARNING):
        runner = runner_of(directory, kernels=kernels, dtype=torch.bfloat16, quantization="int8")
    says = f"in its memory and at its speed: the {kernels} kernels" in caplog.text
    assert says is not runner.ops.reads_quantised
    assert runner.ops.reads_quantised is (runner.ops.multiplies == "bfloat16 pairs")
