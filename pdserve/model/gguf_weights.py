"""Weights from a GGUF file, dequantised or not, under the names of safetensors directories.

Files of the architecture "llama" hold the rows of q and k with the two channels of a rotary pair
side by side; ours, and those of the other architectures, have the first halves of all pairs, then
the second. ``_halves`` undoes that.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdserve.model.architecture import Architecture
from pdserve.model.gguf_file import GgufFile
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
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # read with the architecture


class GgufWeights:
    def __init__(self, path: Path, architecture: Architecture) -> None:
        self._file = GgufFile(path)
        self._architecture = architecture
        self._stored_name = {
            _our_name(name): name for name in self._file.tensors if name != _ROPE_FACTORS
        }

    def names(self) -> Iterable[str]:
        return self._stored_name.keys()

    def tensor(self, name: str) -> Tensor:
        stored = self._stored_name[name]
        return self._in_our_order(stored, self._file.dequantised(stored))

    def quantised(self, name: str) -> QuantisedWeight | None:
        stored = self._stored_name[name]
        type_name, blocks = self._file.blocks(stored)
        if blocks.ndim != 2:
            return None
        return from_blocks(type_name, self._in_our_order(stored, blocks))

    def _in_our_order(self, stored: str, rows: AnyArray) -> Tensor:
        shape = self._architecture
        if shape.family == "llama" and ".attn_q." in stored:
            rows = _halves(rows, shape.head_count)
        elif shape.family == "llama" and ".attn_k." in stored:
            rows = _halves(rows, shape.kv_head_count)
        return torch.from_numpy(np.require(rows, requirements=["C", "W"]))


def _our_name(stored: str) -> str:
    """``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj.weight``; unknown ones stay."""
    part, _, kind = stored.rpartition(".")
    if part in _TOP:
        return f"{_TOP[part]}.{kind}"
    prefix, _, rest = part.partition(".")
    layer, _, module = rest.partition(".")
    if prefix == "blk" and module in _IN_LAYER:
        return f"model.layers.{layer}.{_IN_LAYER[module]}.{kind}"
    return stored


def _halves(values: AnyArray, head_count: int) -> AnyArray:
    """Rows (or bias entries) of each head: from pairs side by side to first, then second halves."""
    rows = values.shape[0]
    if rows % (2 * head_count):
        return values  # a wrong shape; whoever checks shapes says so with the right words
    pairs = values.reshape(head_count, rows // head_count // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
