"""Weights from a GGUF file, dequantised or not, under the names of safetensors directories.

Files that say "llama" hold the rows of q and k with the two channels of a rotary pair side by side;
ours, and those of the other architectures, have the first halves of all pairs, then the second.
``_halves`` undoes that. The matrices of a layer's experts are one tensor, a stack (in files of
early 2024 and before, one each); here each has a name of its own, and is read alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdserve.model.architecture import Architecture
from pdserve.model.families.family import TensorNames
from pdserve.model.families.registry import FAMILIES
from pdserve.model.gguf_file import GgufFile, GgufTensor
from pdserve.model.quantised import QuantisedWeight, from_blocks

AnyArray = np.ndarray[Any, np.dtype[Any]]

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # read with the architecture


@dataclass(frozen=True, slots=True)
class _Place:
    stored: str
    part: int | None = None
    """Which matrix of the tensor, where that is a stack."""


class GgufWeights:
    def __init__(self, path: Path, architecture: Architecture) -> None:
        self._file = GgufFile(path)
        self._file.check_whole()
        self._architecture = architecture
        self._has_pairs = self._file.field("general.architecture", str) == "llama"
        names = FAMILIES[architecture.family].names
        self._places = {
            ours: place
            for tensor in self._file.tensors.values()
            if tensor.name != _ROPE_FACTORS
            for ours, place in _places_of(tensor, names).items()
        }

    def names(self) -> Iterable[str]:
        return self._places.keys()

    def tensor(self, name: str) -> Tensor:
        place = self._places[name]
        values = self._file.dequantised(place.stored, place.part)
        return self._in_our_order(place.stored, values)

    def quantised(self, name: str) -> QuantisedWeight | None:
        place = self._places[name]
        type_name, blocks = self._file.blocks(place.stored, place.part)
        if blocks.ndim != 2:
            return None
        return from_blocks(type_name, self._in_our_order(place.stored, blocks))

    def _in_our_order(self, stored: str, rows: AnyArray) -> Tensor:
        shape = self._architecture
        if self._has_pairs and ".attn_q." in stored:
            rows = _halves(rows, shape.head_count)
        elif self._has_pairs and ".attn_k." in stored:
            rows = _halves(rows, shape.kv_head_count)
        return torch.from_numpy(np.require(rows, requirements=["C", "W"]))


def _places_of(tensor: GgufTensor, names: TensorNames) -> Mapping[str, _Place]:
    """Our names of a tensor's matrices: ``blk.3.attn_q.weight`` is that of
    ``model.layers.3.self_attn.q_proj.weight``; an unknown one keeps its own."""
    whole = _Place(tensor.name)
    part, _, kind = tensor.name.rpartition(".")
    if part in _TOP:
        return {f"{_TOP[part]}.{kind}": whole}
    prefix, _, rest = part.partition(".")
    layer, _, module = rest.partition(".")
    at = f"model.layers.{layer}."
    experts = _experts_of(names)
    if prefix == "blk" and module in experts and len(tensor.shape) == 3:
        return {
            f"{at}{names.experts}.{expert}.{experts[module]}.{kind}": _Place(tensor.name, expert)
            for expert in range(tensor.shape[0])
        }
    of_experts, _, expert = module.partition(".")
    if prefix == "blk" and expert.isdigit() and f"{of_experts}_exps" in experts:
        return {f"{at}{names.experts}.{expert}.{experts[f'{of_experts}_exps']}.{kind}": whole}
    ours = _IN_LAYER.get(module) or _of_family(names).get(module)
    if prefix == "blk" and ours:
        return {f"{at}{ours}.{kind}": whole}
    return {tensor.name: whole}


def _of_family(names: TensorNames) -> Mapping[str, str]:
    return {
        "ffn_norm": names.ffn_norm,
        "post_attention_norm": names.attention_output_norm,
        "post_ffw_norm": names.ffn_output_norm,
        "ffn_gate_inp": names.router,
    }


def _experts_of(names: TensorNames) -> Mapping[str, str]:
    return {
        "ffn_gate_exps": names.expert_gate,
        "ffn_up_exps": names.expert_up,
        "ffn_down_exps": names.expert_down,
    }


def _halves(values: AnyArray, head_count: int) -> AnyArray:
    """Rows (or bias entries) of each head: from pairs side by side to first, then second halves."""
    rows = values.shape[0]
    if rows % (2 * head_count):
        return values  # a wrong shape; whoever checks shapes says so with the right words
    pairs = values.reshape(head_count, rows // head_count // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
