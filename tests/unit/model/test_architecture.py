"""What config files declare, and the refusal of what we cannot compute."""

import json
from pathlib import Path
from typing import Any

import pytest

from pdserve.config import ModelConfig
from pdserve.errors import ConfigError
from pdserve.model.architecture import Architecture, context_limit, read_architecture
from pdserve.model.source import ModelFiles
from tests.models.small import Family, write_small_model


def architecture_of(directory: Path, *, family: Family = "llama", **fields: Any) -> Architecture:
    write_small_model(directory, family=family, layers=1)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))
    return read_architecture(ModelFiles("small", "safetensors", directory))


def test_the_plain_fields(tmp_path: Path) -> None:
    architecture = architecture_of(tmp_path)
    assert architecture.family == "llama"
    assert (architecture.head_count, architecture.kv_head_count) == (4, 2)
    assert architecture.head_dim == 16
    assert architecture.context_tokens == 8192
    assert not architecture.tied_head
    assert architecture.eos_token_ids == (2,)


def test_attention_is_as_much_work_as_the_matrices_from_some_context_on(tmp_path: Path) -> None:
    """SmolLM2's: 3,538,944 elements in the matrices of a layer, 9 heads of 64 channels."""
    directory = write_small_model(tmp_path, hidden=576, heads=9, kv_heads=3, ffn=1536, layers=1)
    architecture = read_architecture(ModelFiles("small", "safetensors", directory))
    assert architecture.attention_like_linear_tokens == 3_538_944 // (2 * 9 * 64) == 3072


def test_families_differ_in_bias_and_norm(tmp_path: Path) -> None:
    qwen2 = architecture_of(tmp_path / "2", family="qwen2")
    qwen3 = architecture_of(tmp_path / "3", family="qwen3")
    assert (qwen2.qkv_bias, qwen2.qk_norm) == (True, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm) == (False, True)


def test_the_ends_of_both_files_count_once(tmp_path: Path) -> None:
    tmp_path.joinpath("generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert architecture_of(tmp_path).eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": 10_000}, 8192),
        ({"sliding_window": 4096, "use_sliding_window": False}, 8192),
        ({"sliding_window": 4096, "layer_types": ["full_attention"]}, 8192),
        ({"sliding_window": 4096, "layer_types": ["sliding_attention"]}, 4096),
    ],
)
def test_a_sliding_window_shortens_the_context(
    tmp_path: Path, fields: dict[str, Any], context: int
) -> None:
    architecture = architecture_of(tmp_path, family="mistral", **fields)
    assert architecture.context_tokens == context


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; known: LlamaForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "model_type 'mamba'"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"head_dim": 15}, "must be even"),
        ({"num_hidden_layers": 0}, "layer_count is 0"),
        ({"layer_types": ["linear_attention"]}, "linear_attention"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "longrope"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "lacks 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "part of each head"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        architecture_of(tmp_path, **fields)


@pytest.mark.parametrize(
    ("content", "says"), [("{", "not JSON"), ("[]", "must hold an object"), (None, "cannot read")]
)
def test_a_broken_config_file_is_refused(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_architecture(ModelFiles("small", "safetensors", tmp_path))


def test_the_context_can_be_configured_smaller_but_not_larger(tmp_path: Path) -> None:
    architecture = architecture_of(tmp_path)
    assert context_limit(architecture, ModelConfig()) == 8192
    assert context_limit(architecture, ModelConfig(context_tokens=100)) == 100
    with pytest.raises(ConfigError, match="own limit is 8192"):
        context_limit(architecture, ModelConfig(context_tokens=8193))
