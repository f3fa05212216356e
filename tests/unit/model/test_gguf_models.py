"""GGUF files of families that differ from a Llama: what they declare, and what they answer."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file

from pdserve.errors import ConfigError
from pdserve.model.architecture import Architecture
from pdserve.model.families.registry import read_architecture
from pdserve.model.gguf_weights import GgufWeights
from pdserve.model.source import ModelFiles
from tests.models.small import write_small_model
from tests.models.small_gguf import write_gguf
from tests.unit.model.conftest import RunnerOf
from tests.unit.model.test_quantised_weights import BFLOAT16, answers, kinds_of
from tests.unit.model.test_reference import LINEAR, assert_equal_to_reference, our_greedy

SUPER: dict[str, Any] = {"family": "llama", "hidden": 256, "layers": 1}
"""Rows of whole super-blocks."""

GEMMA: dict[str, Any] = {"family": "gemma3", "tied": True}
# The head's size is what published files scale scores by, except the largest.
SCALED = {"query_pre_attn_scalar": 16}
DECLARED = {"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 1_000.0}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": ({"family": "qwen3_moe"}, {}),
    "qwen3_moe, shares not normalised": (
        {"family": "qwen3_moe", "config": {"norm_topk_prob": False}},
        {"expert_weights_norm": 0},
    ),
    "mixtral": ({"family": "mixtral"}, {}),
    "gemma3, window and rope declared": (GEMMA | {"config": SCALED, "layers": 3}, DECLARED),
    "gemma3, as published": (
        GEMMA
        | {
            "layers": 6,
            "config": SCALED
            | LINEAR
            | {"sliding_window_pattern": 6, "rope_local_base_freq": 10_000.0},
        },
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
}


def written(tmp_path: Path, model: dict[str, Any], kind: str = "F32", **options: Any) -> Path:
    """The GGUF file; the safetensors directory is beside it, with the weights that it holds."""
    directory = write_small_model(tmp_path / "plain", **model)
    path = tmp_path / "small.gguf"
    stored = write_gguf(directory, path, kind, family=model["family"], **options)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    return path


def architecture_of(path: Path) -> Architecture:
    return read_architecture(ModelFiles("small", "gguf", path))


@pytest.mark.parametrize("model", MODELS)
def test_it_answers_as_the_reference(tmp_path: Path, runner_of: RunnerOf, model: str) -> None:
    sizes, fields = MODELS[model]
    path = written(tmp_path, sizes, fields=fields)
    assert_equal_to_reference(runner_of(path), tmp_path / "plain")


@pytest.mark.parametrize(
    "sizes",
    [{"family": "mixtral"}, {"family": "qwen3_moe", "config": {"moe_intermediate_size": 64}}],
    ids=["mixtral", "qwen3_moe"],
)
def test_experts_that_stay_quantised_give_the_bits_of_dequantised_ones(
    tmp_path: Path, runner_of: RunnerOf, sizes: dict[str, Any]
) -> None:
    """Each expert is a part of one stored tensor; the router is never quantised."""
    path = written(tmp_path, sizes, "Q4_0")
    as_stored = runner_of(path, dtype=torch.bfloat16, quantization="file")
    plain = runner_of(tmp_path / "plain", dtype=torch.bfloat16)
    assert torch.equal(our_greedy(as_stored)[1], our_greedy(plain)[1])


def test_experts_that_are_not_stacked_are_found_too(tmp_path: Path, runner_of: RunnerOf) -> None:
    path = written(tmp_path, {"family": "mixtral"}, stacked=False)
    assert torch.equal(our_greedy(runner_of(path))[1], our_greedy(runner_of(tmp_path / "plain"))[1])


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_super_blocks_beside_other_types_give_the_bits_of_their_weights(
    tmp_path: Path, runner_of: RunnerOf, kernels: str
) -> None:
    """A mix as published files have it; the plain model holds what the ``gguf`` package reads."""
    sizes = SUPER
    kinds = {"v_proj": "Q6_K", "down_proj": "Q6_K", "lm_head": "Q6_K", "up_proj": "Q4_1"}
    kinds["o_proj"] = "Q5_K"
    path = written(tmp_path, sizes, "Q4_K", kinds=kinds)
    as_stored, dequantised = (
        runner_of(path, kernels=kernels, dtype=torch.bfloat16, quantization=quantization)
        for quantization in ("file", "none")
    )
    plain = runner_of(tmp_path / "plain", kernels=kernels, dtype=torch.bfloat16)
    expected = answers(plain)
    assert torch.equal(answers(dequantised), expected)
    assert torch.equal(answers(as_stored), expected)
    # Four bits and six are not joined; Q4_K and Q4_1 are, with the wider scales.
    wide_nibbles, wide_bytes = 3, 4
    kinds_found = kinds_of(as_stored) if kernels == "cpu" else {}
    assert kinds_found in (
        {},
        {
            "qkv": BFLOAT16,
            "attention_output": BFLOAT16,
            "gate_up": wide_nibbles,
            "down": wide_bytes,
            "embedding": wide_nibbles,
            "head": wide_bytes,
        },
    )


def test_only_the_largest_gemma_scales_its_scores_by_its_width(tmp_path: Path) -> None:
    sizes = GEMMA | {"hidden": 32, "heads": 2, "ffn": 32, "vocab": 300}
    scales = {}
    for layers in (61, 62):
        config = {"head_dim": 8}
        path = written(tmp_path, sizes | {"layers": layers, "config": config})
        scales[layers] = architecture_of(path).attention_scale
    assert scales == {61: 8**-0.5, 62: (32 / 2) ** -0.5}


def test_a_window_of_the_whole_context_hides_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, GEMMA | {"config": {"sliding_window": 9000}}, fields=DECLARED)
    architecture = architecture_of(path)
    assert architecture.context_tokens == 8192
    assert [kind.window for kind in architecture.layers] == [None, None]
    assert [kind.rope.base for kind in architecture.layers] == [1_000.0, 10_000.0]


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        ("gemma3", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0"),
        ("gemma3", {"attention.sliding_window_pattern": [1, 0]}, "sliding_window_pattern is an ar"),
        ("gemma3", {"attention.sliding_window_pattern": 0}, "every 0th layer is full"),
        ("mixtral", {"expert_gating_func": 2}, r"llama\.expert_gating_func is 2; not supported"),
        ("qwen3_moe", {"expert_shared_count": 1}, "expert_shared_count is 1; not supported"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    tmp_path: Path, family: str, fields: dict[str, Any], says: str
) -> None:
    path = written(tmp_path, {"family": family, "layers": 1}, fields=fields)
    with pytest.raises(ConfigError, match=says):
        architecture_of(path)


def test_a_file_cut_off_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, {"family": "llama"})
    architecture = architecture_of(path)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(ConfigError, match=r"small\.gguf ends within the tensor .*; download it"):
        GgufWeights(path, architecture)


def test_a_type_that_is_not_read_is_refused_before_any_weight_is(tmp_path: Path) -> None:
    path = written(tmp_path, SUPER, kind="F16", kinds={"o_proj": "TQ2_0"})
    with pytest.raises(
        ConfigError, match=r"blk\.0\.attn_output\.weight has the type TQ2_0, .*; use"
    ):
        GgufWeights(path, architecture_of(path))


def test_a_part_of_a_model_is_refused_with_the_way_to_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "part-00001-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"is one of 3 parts of a model; .* --merge"):
        architecture_of(path)


def test_more_layers_than_tensors_are_refused_before_they_are_made(tmp_path: Path) -> None:
    directory = write_small_model(tmp_path / "plain", layers=1)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1 << 31}))
    write_gguf(directory, tmp_path / "small.gguf")
    with pytest.raises(ConfigError, match="declares 2147483648 layers and has 12 tensors"):
        architecture_of(tmp_path / "small.gguf")
