"""Writes a small model (``small.py``) as a GGUF file, in types of one's choice."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from tests.models.small import Family

FloatArray = np.ndarray[Any, np.dtype[np.float32]]

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_NAMES[module]}.{kind}"


def _pairs_side_by_side(weight: FloatArray, heads: int) -> FloatArray:
    """What converters do to q and k of the architecture "llama"."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    directory: Path,
    path: Path,
    kind: str = "F32",
    *,
    family: Family = "llama",
    kinds: Mapping[str, str] | None = None,
) -> dict[str, torch.Tensor]:
    """The model of ``directory`` as GGUF; the weights that a reader gets.

    Args:
        kind: GGUF's type of the matrices, but for those …
        kinds: … whose name ends so: another type.
    """
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_token_list([f"<{index}>" for index in range(config["vocab_size"])])
    stored = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        values, turned = tensor.numpy(), "q_proj" in name or "k_proj" in name
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        if turned and family == "llama":
            values = _pairs_side_by_side(values, heads)
        other = [to for end, to in (kinds or {}).items() if name.endswith(f"{end}.weight")]
        type_name = [*other, kind][0] if values.ndim == 2 else "F32"
        tensor_kind = gguf.GGMLQuantizationType[type_name]
        data = gguf.quantize(values, tensor_kind)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=tensor_kind)
        values = gguf.dequantize(data, tensor_kind).reshape(tensor.shape)
        if turned and family == "llama":
            shape = (heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
            values = values.reshape(shape).swapaxes(1, 2).reshape(values.shape)
        stored[name] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored
