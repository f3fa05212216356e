"""Writes a small model (``small.py``) as a quantised checkpoint, and beside it, plain, the weights
that a reader must get: by the packers' own rules, number by number, with no line of our reader.

Numbers, zeros and scales are drawn, so every one that the format can hold occurs.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.small import write_small_model

Array = np.ndarray[Any, Any]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of AutoAWQ's packer: which column comes next


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """How to pack: the fields that matter to the method."""

    method: Literal["awq", "gptq", "fp8", "compressed-tensors"]
    form: Literal["float-quantized", "pack-quantized", "int-quantized"] = "float-quantized"
    bits: int = 4
    group: int = 32  # -1: a whole row
    symmetric: bool = False
    second_version: bool = False  # of GPTQ
    shuffled: bool = False  # GPTQ's desc_act
    scale_type: torch.dtype = torch.float16
    scales: Literal["matrix", "output", "block"] = "matrix"  # of fp8
    block: tuple[int, int] = (128, 128)

    def config(self) -> dict[str, Any]:
        integers = {"bits": self.bits, "group_size": self.group, "quant_method": self.method}
        if self.method == "awq":
            return integers | {"version": "gemm", "zero_point": True}
        if self.method == "gptq":
            version = "gptq_v2" if self.second_version else "gptq"
            shuffled = {"desc_act": self.shuffled, "sym": self.symmetric}
            return integers | shuffled | {"checkpoint_format": version}
        fields: dict[str, Any]
        if self.method == "fp8":
            fields = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
            block = {"weight_block_size": list(self.block)} if self.scales == "block" else {}
            return fields | block
        fields = {"quant_method": "compressed-tensors", "format": self.form, "ignore": ["lm_head"]}
        if self.form != "float-quantized":
            group = {"strategy": "channel" if self.group == -1 else "group"}
            kind = {"num_bits": self.bits, "type": "int", "symmetric": True}
            weights = kind | group | {"group_size": self.group}
            return fields | {"config_groups": {"group_0": {"weights": weights}}}
        strategy = {"matrix": "tensor", "output": "channel", "block": "block"}[self.scales]
        block = {"block_structure": list(self.block)} if self.scales == "block" else {}
        weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
        group_0 = {"targets": ["Linear"], "weights": weights | block}
        return fields | {"config_groups": {"group_0": group_0}}


def write_packed(directory: Path, packed: Packed, **model: Any) -> Path:
    """The packed model in ``directory``, which is returned; what it holds, in ``plain`` there."""
    plain = write_small_model(directory / "plain", **model)
    random = np.random.default_rng(7)
    tensors, dequantised = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight")):
            tensors[name] = dequantised[name] = tensor.bfloat16()
            continue
        integers = packed.method in ("awq", "gptq") or packed.form != "float-quantized"
        parts, weight = (_integers if integers else _floats)(tensor.shape, packed, random)
        module = name.rpartition(".")[0]
        tensors |= {f"{module}.{part}": value for part, value in parts.items()}
        dequantised[name] = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(dequantised, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = packed.config()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _integers(
    shape: torch.Size, packed: Packed, random: np.random.Generator
) -> tuple[Mapping[str, Tensor], Array]:
    outputs, channels = shape
    largest = (1 << packed.bits) - 1
    group = channels if packed.group == -1 else packed.group
    groups = -(-channels // group)
    of_channel = np.arange(channels) // group
    if packed.shuffled:
        random.shuffle(of_channel)
    numbers = random.integers(0, largest + 1, (channels, outputs))
    zeros = random.integers(0, largest + 1, (groups, outputs))
    if packed.symmetric:
        zeros[:] = (largest + 1) // 2
    drawn = random.uniform(0.5, 2, (groups, outputs)) * 0.3 / largest
    scales = torch.from_numpy(drawn).to(packed.scale_type)
    scale = scales.double().numpy()
    weight = (numbers - zeros[of_channel]) * scale[of_channel]
    if packed.method == "awq":
        words = _packed_across(numbers, packed.bits, _AWQ_ORDER)
        zero_words = _packed_across(zeros, packed.bits, _AWQ_ORDER)
        return {"qweight": words, "qzeros": zero_words, "scales": scales}, weight.T
    order = tuple(range(32 // packed.bits))
    if packed.method == "compressed-tensors":
        rows = {"weight_scale": scales.T.contiguous()}
        if packed.form == "int-quantized":
            signed = (numbers.T - 128).astype(np.int8)
            return rows | {"weight": torch.from_numpy(np.ascontiguousarray(signed))}, weight.T
        full = -channels % len(order)
        words = _packed_across(np.pad(numbers.T, ((0, 0), (0, full))), packed.bits, order)
        sizes = torch.tensor([outputs, channels])
        if packed.shuffled:
            rows["weight_g_idx"] = torch.from_numpy(of_channel.astype(np.int32))
        return rows | {"weight_packed": words, "weight_shape": sizes}, weight.T
    stored_zeros = zeros if packed.second_version else (zeros - 1) & largest
    parts = {
        "qweight": _packed_across(numbers.T, packed.bits, order).T.contiguous(),
        "qzeros": _packed_across(stored_zeros, packed.bits, order),
        "scales": scales,
        "g_idx": torch.from_numpy(of_channel.astype(np.int32)),
    }
    return parts, weight.T


def _packed_across(numbers: Array, bits: int, order: tuple[int, ...]) -> Tensor:
    """Neighbours of a row in one int32, in this order from the lowest bits on."""
    rows, columns = numbers.shape
    words = np.zeros((rows, columns // len(order)), dtype=np.uint32)
    for word in range(words.shape[1]):
        for place, column in enumerate(order):
            one = numbers[:, word * len(order) + column].astype(np.uint32)
            words[:, word] |= one << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32))


def _floats(
    shape: torch.Size, packed: Packed, random: np.random.Generator
) -> tuple[Mapping[str, Tensor], Array]:
    outputs, channels = shape
    eight = torch.from_numpy(random.uniform(-400, 400, (outputs, channels))).to(torch.float8_e4m3fn)
    sizes = {"matrix": shape, "output": (1, channels), "block": packed.block}
    high, wide = sizes[packed.scales]
    down, across = -(-outputs // high), -(-channels // wide)
    drawn = random.uniform(0.5, 2, (down, across)) * 1e-3
    scales = torch.from_numpy(drawn.astype(np.float32))
    weight = eight.float().numpy().copy()
    for top, left in _corners(outputs, channels, high, wide):
        weight[top : top + high, left : left + wide] *= scales[top // high, left // wide].numpy()
    stored = scales.reshape(()) if packed.scales == "matrix" else scales
    name = "weight_scale_inv" if (packed.method, packed.scales) == ("fp8", "block") else None
    parts = {"weight": eight, name or "weight_scale": stored}
    return parts | {"input_scale": torch.ones(())}, weight


def _corners(outputs: int, channels: int, high: int, wide: int) -> Iterator[tuple[int, int]]:
    for top in range(0, outputs, high):
        for left in range(0, channels, wide):
            yield top, left
