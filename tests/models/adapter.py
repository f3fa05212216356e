"""Writes small seeded LoRA adapters as PEFT saves them, and merges one into its base model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ATTENTION = ("q", "k", "v", "o")
ALL = (*ATTENTION, "gate", "up", "down")


def write_adapter(
    directory: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    parts: Sequence[str] = ALL,
    rank: int = 4,
    alpha: float = 8.0,
    gain: float = 1.0,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """adapter_config.json and adapter_model.safetensors; ``directory`` is made if need be.

    Args:
        shapes: of the base model's tensors, by their names; see ``shapes_of``.
        parts: which projections are adapted, in every layer.
        gain: how large the change is beside the weights.
        config: further fields of adapter_config.json; ``rank_pattern`` counts.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [f"{part}_proj" for part in parts],
        "bias": "none",
        **(config or {}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (outputs, inputs) in shapes.items():
        module = name.removesuffix(".weight")
        if not module.endswith(tuple(f".{part}_proj" for part in parts)):
            continue
        own = fields.get("rank_pattern", {}).get(module.rpartition(".")[2], rank)
        at = f"base_model.model.{module}.lora_"
        tensors[f"{at}A.weight"] = torch.randn(own, inputs, generator=generator) * inputs**-0.5
        tensors[f"{at}B.weight"] = torch.randn(outputs, own, generator=generator) * gain / own
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def shapes_of(model: Path) -> dict[str, tuple[int, int]]:
    """Of the matrices in a safetensors directory."""
    tensors = load_file(model / "model.safetensors")
    return {name: (t.shape[0], t.shape[1]) for name, t in tensors.items() if t.ndim == 2}


def merged(model: Path, adapter: Path, directory: Path) -> Path:
    """The model with ``W + scale B A`` for its weights, as a directory of its own.

    The scale is that of the adapter's config alone, stabilised or not; patterns of alpha and rank
    are by the projection's name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_bytes((model / "config.json").read_bytes())
    fields = json.loads((adapter / "adapter_config.json").read_text())
    halves = load_file(adapter / "adapter_model.safetensors")
    tensors = load_file(model / "model.safetensors")
    for name, a_RC in halves.items():
        if ".lora_A." not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        projection, rank = module.rpartition(".")[2], a_RC.shape[0]
        alpha = fields.get("alpha_pattern", {}).get(projection, fields["lora_alpha"])
        scale = alpha / (rank**0.5 if fields.get("use_rslora") else rank)
        b_OR = halves[name.replace(".lora_A.", ".lora_B.")]
        tensors[f"{module}.weight"] += scale * (b_OR @ a_RC)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
