"""What ``transformers`` answers with the same weights in float32: the yardstick of right tokens.

A GGUF file is dequantised by ``gguf`` and written as a directory that ``transformers`` reads, its
rotary rows put back by the rule of its converter: no line of our loader takes part. A safetensors
directory is read as it is.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.numpy import save_file

_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def reference_tokens(
    model: Path, prompts: Sequence[Sequence[int]], count: int, *, scratch: Path
) -> list[list[int]]:
    """The ``count`` best tokens after each prompt, one by one; an end of text does not end them.

    Args:
        model: a GGUF file of a Llama, or a safetensors directory.
        scratch: an existing directory; what is written there is gone again on return.
    """
    network = reference_model(model, scratch=scratch)
    return [_greedy(network, prompt, count) for prompt in prompts]


def reference_model(model: Path, *, scratch: Path) -> Any:
    """The network alone, in float32, on the CPU; called with [1, N] token ids."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        path = write_safetensors(model, Path(directory)) if model.is_file() else model
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.inference_mode()
def best_tokens(network: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """At every place of ``answer`` the best token after the prompt and what is before it there.

    Equal to ``answer`` exactly when that is the greedy answer, at the price of one pass instead of
    one per token.
    """
    tokens = torch.tensor([[*prompt, *answer[:-1]]])
    best: list[int] = network(tokens, logits_to_keep=len(answer)).logits[0].argmax(-1).tolist()
    return best


@torch.inference_mode()
def _greedy(network: Any, prompt: Sequence[int], count: int) -> list[int]:
    chosen: list[int] = []
    step, cache = list(prompt), None
    while len(chosen) < count:
        # Only the last row: all 1,500 rows of a prompt would be 300 MB of logits.
        out = network(torch.tensor([step]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        step = [int(out.logits[0, -1].argmax())]
        chosen += step
    return chosen


def write_safetensors(model: Path, directory: Path) -> Path:
    """The weights of a GGUF file as ``directory``, in float32: that of a model, less its tokeniser.
    The directory is made if need be, and returned."""
    directory.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(model)

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        part = tensor.name.removesuffix(".weight").split(".")[-1]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if part in ("attn_q", "attn_k"):
            values = _halves(values, heads if part == "attn_q" else kv_heads)
        tensors[_name(tensor.name, part)] = np.ascontiguousarray(values, dtype=np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _halves(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Each head's rows as two halves, not as the rotary pairs they are stored in."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _name(stored: str, part: str) -> str:
    if part in _TOP:
        return f"{_TOP[part]}.weight"
    return f"model.layers.{stored.split('.')[1]}.{_MODULES[part]}.weight"
