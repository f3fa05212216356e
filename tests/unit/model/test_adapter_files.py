"""Adapters on disk: which are taken, and what is said of the others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdserve.config import ModelConfig
from pdserve.errors import ConfigError
from pdserve.model.adapter_files import AdapterFiles, locate_adapters
from pdserve.model.adapters import load_adapters
from pdserve.model.families.registry import read_architecture
from pdserve.model.ops import Adapter
from pdserve.model.source import ModelFiles
from pdserve.model.torch_ops import TorchOps
from tests.models.adapter import shapes_of, write_adapter
from tests.models.small import write_small_model

SHAPES = {"model.layers.0.self_attn.q_proj.weight": (64, 64)}
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def located(directory: Path, **config: Any) -> AdapterFiles:
    (found,) = locate_adapters(ModelConfig(adapters={"a": str(directory)}, **config), "base")
    return found


def change(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def loaded(model: Path, adapter: Path) -> dict[str, Adapter]:
    architecture = read_architecture(ModelFiles("base", "safetensors", model))
    return load_adapters(
        [located(adapter)],
        architecture,
        TorchOps(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_a_digest_changes_with_either_file_and_not_with_the_place(tmp_path: Path) -> None:
    first, copy, other, scaled = (
        write_adapter(tmp_path / name, SHAPES, seed=seed, alpha=alpha)
        for name, seed, alpha in (("1", 0, 8.0), ("2", 0, 8.0), ("3", 1, 8.0), ("4", 0, 4.0))
    )
    assert located(copy).digest == located(first).digest
    assert len({located(path).digest for path in (first, other, scaled)}) == 3


def test_scale_and_rank_are_those_of_the_pattern_that_fits(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path, SHAPES, rank=8, alpha=16)
    change(
        directory,
        rank_pattern={r"layers\.1\d\.self_attn\.q_proj": 4},
        alpha_pattern={"v_proj": 2},
    )
    files = located(directory)
    assert files.rank_of("model.layers.12.self_attn.q_proj") == 4
    assert files.scale_of("model.layers.12.self_attn.q_proj") == 4.0
    assert files.rank_of("model.layers.2.self_attn.q_proj") == 8
    assert files.scale_of("model.layers.2.self_attn.v_proj") == 0.25
    change(directory, use_rslora=True)
    assert located(directory).scale_of("model.layers.12.self_attn.q_proj") == 8.0


def test_what_peft_writes_beside_changes_nothing(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path, SHAPES)
    change(
        directory,
        **{"task_type": "CAUSAL_LM", "lora_dropout": 0.1, "inference_mode": True},
        **{"modules_to_save": None, "use_dora": False, "fan_in_fan_out": False, "bias": "none"},
        **{"init_lora_weights": True, "loftq_config": {}, "rank_pattern": {}, "base_model": "x"},
    )
    assert located(directory).rank == 4


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA can be served"),
        ({"use_dora": True}, "use_dora is true, which is not supported; merge the adapter into"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save is \["lm_head"\]'),
        ({"bias": "lora_only"}, 'bias is "lora_only"'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa"'),
        ({"r": 0}, r"r and rank_pattern say \[0\], must be positive numbers"),
        ({"r": None}, r"r and rank_pattern say \[None\]"),
        ({"r": True}, r"r and rank_pattern say \[True\]"),
        ({"rank_pattern": {"q_proj": "8"}}, r"r and rank_pattern say \[4, '8'\]"),
        ({"rank_pattern": {"(": 8}}, "rank_pattern is .* cannot be used"),
        ({"rank_pattern": [8]}, "rank_pattern is .* cannot be used"),
        ({"lora_alpha": "x"}, r"lora_alpha and alpha_pattern say \['x'\]"),
        ({"r": 9}, "its rank is 9, model.adapter_rank_max is 8; raise that"),
        ({"rank_pattern": {"q_proj": 12}}, "its rank is 12, model.adapter_rank_max is 8"),
    ],
)
def test_what_an_adapter_declares_and_we_do_not_compute_is_refused(
    tmp_path: Path, fields: dict[str, Any], problem: str
) -> None:
    directory = write_adapter(tmp_path, SHAPES)
    change(directory, **fields)
    with pytest.raises(ConfigError, match=f"model.adapters: 'a' at {tmp_path}: {problem}"):
        located(directory, adapter_rank_max=8)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_directory_without_the_files_is_none(tmp_path: Path, missing: str) -> None:
    (write_adapter(tmp_path, SHAPES) / missing).unlink()
    with pytest.raises(ConfigError, match=f"cannot read {missing} .No such file.*save_pretrained"):
        located(tmp_path)


def test_an_adapter_cannot_have_the_base_model_s_name(tmp_path: Path) -> None:
    config = ModelConfig(adapters={"base": str(tmp_path)})
    with pytest.raises(ConfigError, match="an adapter named 'base', which is the base"):
        locate_adapters(config, "base")


def rename(halves: dict[str, torch.Tensor], name: str) -> None:
    halves[name] = halves.pop(f"{Q}A.weight")


Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (lambda halves: halves.clear(), "adapter_model.safetensors is empty"),
        (lambda halves: halves.pop(f"{Q}B.weight"), "q_proj.lora_A.weight has no second half"),
        (
            lambda halves: halves.update({f"{Q}A.weight": torch.zeros(4, 32)}),
            r"has the shape \(4, 32\), the base model and the rank say \(4, 64\)",
        ),
        (
            lambda halves: halves.update({f"{Q}B.weight": torch.zeros(64, 5)}),
            r"has the shape \(64, 5\), the base model and the rank say \(64, 4\)",
        ),
        (
            lambda halves: rename(halves, "base_model.model.lm_head.lora_A.weight"),
            "lm_head.lora_A.weight adapts what is not supported; target_modules can be q_proj, k",
        ),
        (
            lambda halves: rename(halves, f"{Q}magnitude_vector"),
            "lora_magnitude_vector adapts what is not supported",
        ),
        (
            lambda halves: rename(halves, f"{Q}A.weight".replace("q_proj", "qkv_proj")),
            "qkv_proj.lora_A.weight adapts what is not supported",
        ),
        (
            lambda halves: rename(halves, f"{Q}A.weight".replace(".0.", ".2.")),
            "is of layer 2, the base model has 2; it was trained on another model",
        ),
    ],
)
def test_matrices_that_do_not_fit_the_base_model_are_refused(
    tmp_path: Path, changed: Change, problem: str
) -> None:
    model = write_small_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", SHAPES)
    path = adapter / "adapter_model.safetensors"
    halves = load_file(path)
    changed(halves)
    save_file(halves, path)
    with pytest.raises(ConfigError, match=problem):
        loaded(model, adapter)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", SHAPES)
    (adapter / "adapter_model.safetensors").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"cannot read adapter_model\.safetensors"):
        loaded(model, adapter)


def test_experts_take_no_adapters(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", family="qwen3_moe")
    shapes = {"model.layers.0.mlp.gate_proj.weight": (128, 64)}
    assert not any("mlp.gate_proj" in name for name in shapes_of(model))
    adapter = write_adapter(tmp_path / "adapter", shapes)
    with pytest.raises(ConfigError, match="layer 0 has experts, which take no adapters"):
        loaded(model, adapter)


def test_only_what_is_adapted_takes_memory(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", SHAPES)
    (only,) = loaded(model, adapter).values()
    first, second = only.layers
    assert first.qkv is not None
    assert (first.attention_output, first.gate_up, first.down) == (None, None, None)
    assert (second.qkv, second.attention_output, second.gate_up, second.down) == (None,) * 4
