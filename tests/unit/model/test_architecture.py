"""What config files declare, and the refusal of what we cannot compute."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pdserve.config import ModelConfig
from pdserve.errors import ConfigError
from pdserve.model.architecture import Architecture, context_limit
from pdserve.model.families.registry import read_architecture
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


SLIDING = {"sliding_window": 4096}
TYPES = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("family", "fields", "windows"),
    [
        ("mistral", SLIDING, (4096, 4096, 4096)),
        ("mistral", {"sliding_window": 10_000}, (None, None, None)),  # the context has 8192
        ("mistral", SLIDING | {"use_sliding_window": False}, (None, None, None)),
        ("mistral", SLIDING | TYPES, (None, 4096, None)),
        ("llama", SLIDING, (None, None, None)),
        ("llama", SLIDING | TYPES, (None, 4096, None)),
        ("qwen2", SLIDING, (None, None, None)),
        ("qwen2", SLIDING | {"use_sliding_window": True}, (None, None, None)),
        (
            "qwen3",
            SLIDING | {"use_sliding_window": True, "max_window_layers": 1},
            (None, 4096, 4096),
        ),
        ("qwen3_moe", SLIDING, (None, None, None)),
        ("qwen3_moe", SLIDING | {"use_sliding_window": True}, (4096, 4096, 4096)),
        ("mixtral", SLIDING, (4096, 4096, 4096)),
        ("gemma3", {"sliding_window_pattern": 3}, (24, 24, None)),
        ("gemma3", {"sliding_window_pattern": None}, (24, 24, 24)),  # every sixth is full
        ("gemma3", TYPES, (None, 24, None)),
    ],
)
def test_each_layer_has_the_window_that_its_family_gives_it(
    tmp_path: Path, family: Family, fields: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    architecture = architecture_of(tmp_path, family=family, num_hidden_layers=3, **fields)
    assert tuple(kind.window for kind in architecture.layers) == windows
    assert architecture.context_tokens == 8192


def test_a_window_that_hides_nothing_still_means_the_rope_of_layers_that_slide(
    tmp_path: Path,
) -> None:
    architecture = architecture_of(
        tmp_path, family="gemma3", num_hidden_layers=2, sliding_window=10_000
    )
    assert [kind.window for kind in architecture.layers] == [None, None]
    assert [kind.rope.base for kind in architecture.layers] == [1000.0, 10_000.0]


def test_attention_that_stops_growing_takes_longer_to_be_as_much_work(tmp_path: Path) -> None:
    plain = architecture_of(tmp_path / "plain", num_hidden_layers=4, hidden_size=1024)
    like_linear = plain.attention_like_linear_tokens
    full, near = (dataclasses.replace(plain.layers[0], window=window) for window in (None, 100))
    assert like_linear > 100
    half = dataclasses.replace(plain, layers=(full, near) * 2)
    assert half.attention_like_linear_tokens == like_linear + (like_linear - 100)
    none = dataclasses.replace(plain, layers=(near,) * 4)
    assert none.attention_like_linear_tokens == 1 << 30


def test_only_the_experts_that_a_token_uses_are_work(tmp_path: Path) -> None:
    sparse = architecture_of(tmp_path, family="qwen3_moe")  # 3 of 8 experts of 48
    dense = dataclasses.replace(
        sparse, ffn=3 * 48, layers=(dataclasses.replace(sparse.layers[0], experts=None),)
    )
    assert sparse.attention_like_linear_tokens == dense.attention_like_linear_tokens


@pytest.mark.parametrize(
    ("fields", "sparse"),
    [
        ({}, (True, True, True, True)),
        ({"mlp_only_layers": [0, 3]}, (False, True, True, False)),
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
    ],
)
def test_which_layers_of_qwen3_moe_have_experts(
    tmp_path: Path, fields: dict[str, Any], sparse: tuple[bool, ...]
) -> None:
    architecture = architecture_of(tmp_path, family="qwen3_moe", num_hidden_layers=4, **fields)
    assert tuple(kind.experts is not None for kind in architecture.layers) == sparse


def test_gemma_ties_its_head_and_scales_its_scores(tmp_path: Path) -> None:
    architecture = architecture_of(tmp_path, family="gemma3", query_pre_attn_scalar=168)
    assert architecture.attention_scale == 168**-0.5
    assert not architecture.tied_head
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]  # as in published files, whose writers leave out a default
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_architecture(ModelFiles("small", "safetensors", tmp_path)).tied_head


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; known: LlamaForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "model_type 'mamba'"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"head_dim": 15}, "must be even"),
        ({"num_hidden_layers": 0}, "layer_count is 0"),
        ({"layer_types": ["linear_attention"]}, "layer_types has linear_attention; known: full"),
        ({"layer_types": ["full_attention"] * 2}, "names 2 layers, num_hidden_layers is 1"),
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
    ("family", "fields", "says"),
    [
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; known: silu, gelu"),
        ("gemma3", {"sliding_window": None}, "sliding_window is not set"),
        (
            "qwen3",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters has a rope for full_attention alone",
        ),
        ("mistral", {"sliding_window": "4k"}, "sliding_window is '4k', not a number"),
        ("mistral", {"sliding_window": 0}, "sliding window is 0, must be positive"),
        ("qwen3_moe", {"num_experts": None}, "num_experts is None"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "8 experts of 48 channels, 9 per token"),
    ],
)
def test_what_a_family_cannot_have_is_refused_by_name(
    tmp_path: Path, family: Family, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        architecture_of(tmp_path, family=family, **fields)


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
