"""Writes a small model (``small.py``) as a GGUF file, in types of one's choice."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from tests.models.small import Family

FloatArray = np.ndarray[Any, np.dtype[np.float32]]

_ARCHITECTURES: Mapping[str, str] = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}  # fmt: skip
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERT_NAMES = {
    "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps",
}  # fmt: skip
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _gguf_name(name: str, family: Family) -> str:
    """An expert's is that of the stack it goes into."""
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    if ".experts." in module:
        return f"blk.{layer}.{_EXPERT_NAMES[module.rpartition('.')[2]]}.{kind}"
    names = _NAMES | (_GEMMA_NAMES if family == "gemma3" else {})
    return f"blk.{layer}.{names[module]}.{kind}"


def _pairs_side_by_side(weight: FloatArray, heads: int) -> FloatArray:
    """What converters do to q and k of the architecture "llama"."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def random_blocks(
    shape: tuple[int, ...], kind: gguf.GGMLQuantizationType
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Blocks of types that the package reads but does not write: any bytes, with scales that make
    weights as small as those of a model."""
    group, group_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(sum(shape))
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // group, group_bytes), np.uint8)
    scales_at = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
    for at in scales_at:
        scale = random.uniform(1e-4, 3e-4, blocks.shape[:-1]).astype(np.float16)
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def _stored(
    values: FloatArray, kind: gguf.GGMLQuantizationType
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        return random_blocks(values.shape, kind)


def write_gguf(
    directory: Path,
    path: Path,
    kind: str = "F32",
    *,
    family: Family = "llama",
    kinds: Mapping[str, str] | None = None,
    fields: Mapping[str, Any] | None = None,
    stacked: bool = True,
) -> dict[str, torch.Tensor]:
    """The model of ``directory`` as GGUF; the weights that a reader gets, norms as in safetensors.

    Args:
        kind: GGUF's type of the matrices, but for those …
        kinds: … whose name ends so: another type. Weights of Q4_K, Q5_K and Q6_K are drawn anew.
        fields: further metadata, less the architecture in front.
        stacked: a layer's experts are one tensor; else one each, as in old files.
    """
    config = json.loads((directory / "config.json").read_text())
    architecture = _ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, architecture)
    _declare(writer, config, architecture, fields or {})
    stored = {}
    stacks: dict[str, list[tuple[Any, gguf.GGMLQuantizationType]]] = {}
    for name, tensor in sorted(load_file(directory / "model.safetensors").items(), key=_in_order):
        values, turned = tensor.numpy(), "q_proj" in name or "k_proj" in name
        turned = turned and architecture == "llama"
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        offset = 1 if family == "gemma3" and name.endswith("norm.weight") else 0
        values = (_pairs_side_by_side(values, heads) if turned else values) + np.float32(offset)
        other = [to for end, to in (kinds or {}).items() if name.endswith(f"{end}.weight")]
        type_name = [*other, kind][0] if values.ndim == 2 else "F32"
        tensor_kind = gguf.GGMLQuantizationType[type_name]
        data = _stored(values, tensor_kind)
        stacks.setdefault(_gguf_name(name, family), []).append((data, tensor_kind))
        values = gguf.dequantize(data, tensor_kind).reshape(tensor.shape) - np.float32(offset)
        if turned:
            shape = (heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
            values = values.reshape(shape).swapaxes(1, 2).reshape(values.shape)
        stored[name] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    for name, parts in stacks.items():
        if "_exps" not in name:
            writer.add_tensor(name, parts[0][0], raw_dtype=parts[0][1])
        elif stacked:
            data = np.stack([data for data, _ in parts])
            writer.add_tensor(name, data, raw_dtype=parts[0][1])
        else:
            for expert, (data, part_kind) in enumerate(parts):
                alone = name.replace("_exps", f".{expert}")
                writer.add_tensor(alone, data, raw_dtype=part_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _declare(
    writer: gguf.GGUFWriter,
    config: Mapping[str, Any],
    architecture: str,
    fields: Mapping[str, Any],
) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_token_list([f"<{index}>" for index in range(config["vocab_size"])])
    if experts := config.get("num_experts") or config.get("num_local_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if architecture == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    for name, value in fields.items():
        adds: dict[type, Any] = {
            float: writer.add_float32, int: writer.add_uint32, str: writer.add_string,
            list: writer.add_array,
        }  # fmt: skip
        adds[type(value)](f"{architecture}.{name}", value)


def _in_order(item: tuple[str, torch.Tensor]) -> list[str | int]:
    """Experts by their numbers, so that they come to lie in the stack as they are counted."""
    return [int(part) if part.isdigit() else part for part in re.split(r"\.", item[0])]
