"""Writes a small seeded model as a safetensors directory, with the real tokeniser if asked.

Random output weights make every token about as likely as the next best, so that any rounding turns
an answer. Here 256 tokens have output rows much longer than all others, with lengths drawn from a
wide distribution: the best token stands clear of the second, while which one it is still depends on
the whole context through every layer. Special tokens are never among the 256: a text does not end
before its limit.

    python -m tests.models.small DIRECTORY [--tokenizer FILE.gguf]
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

Family = Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3"]

CLASS_OF_FAMILY: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_FIELDS_OF_FAMILY: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3": {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "rope_local_base_freq": 1_000.0,
        "sliding_window": 24,
        "sliding_window_pattern": 2,
        "pad_token_id": 0,
    },
}
_FIRST_LIKELY_TOKEN = 32  # below are special tokens and single bytes
_LIKELY_TOKENS = 256
_VOCAB_WITHOUT_TOKENIZER = 512
_DENSE = "gate_proj up_proj down_proj"
_CONTROL_TOKEN = 3  # token type in GGUF


def write_small_model(
    directory: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int | None = None,
    vocab: int | None = None,
    seed: int = 0,
    tokenizer_from: Path | None = None,
    family: Family = "llama",
    tied: bool = False,
    context_tokens: int = 8192,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write config.json, model.safetensors and, with ``tokenizer_from``, the tokeniser's files.

    Args:
        directory: made if need be; returned.
        vocab: None takes the tokeniser's, or 512 without one.
        tokenizer_from: a GGUF file, or a directory that has tokenizer.json.
        tied: output rows are the embedding's. Less clear-cut: there is no long row then.
        config: further fields of config.json, rope scaling for example.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = {} if tokenizer_from is None else write_tokenizer(tokenizer_from, directory)
    fields = {
        "architectures": [CLASS_OF_FAMILY[family]],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn or 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab or tokenizer.get("vocab_size", _VOCAB_WITHOUT_TOKENIZER),
        "max_position_embeddings": context_tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": tied,
        "sliding_window": None,
        "bos_token_id": tokenizer.get("bos_token_id", 1),
        "eos_token_id": tokenizer.get("eos_token_id", 2),
        "torch_dtype": "float32",
        **_FIELDS_OF_FAMILY.get(family, {}),
        **(config or {}),
    }
    (directory / "config.json").write_text(json.dumps(fields, indent=1))
    save_file(
        _weights(fields, family, torch.Generator().manual_seed(seed)),
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    return directory


def _weights(
    config: Mapping[str, Any], family: Family, generator: torch.Generator
) -> dict[str, Tensor]:
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def matrix(rows: int, columns: int, gain: float = 1.5) -> Tensor:
        scale = gain * float(columns) ** -0.5
        return torch.randn(rows, columns, generator=generator).mul_(scale)

    def around_one(count: int) -> Tensor:
        return torch.randn(count, generator=generator).mul_(0.2).add_(1)

    def norm(count: int) -> Tensor:
        return around_one(count) - (1 if family == "gemma3" else 0)

    def feed_forward(at: str, names: str, ffn: int) -> None:
        gate, up, down = names.split()
        state[f"{at}{gate}.weight"] = matrix(ffn, hidden)
        state[f"{at}{up}.weight"] = matrix(ffn, hidden)
        state[f"{at}{down}.weight"] = matrix(hidden, ffn)

    state = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, generator=generator),
        "model.norm.weight": norm(hidden),
    }
    if not config["tie_word_embeddings"]:
        state["lm_head.weight"] = _peaked_head(config["vocab_size"], hidden, generator)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        state[at + "input_layernorm.weight"] = norm(hidden)
        state[at + "post_attention_layernorm.weight"] = norm(hidden)
        if family == "gemma3":
            state[at + "pre_feedforward_layernorm.weight"] = norm(hidden)
            state[at + "post_feedforward_layernorm.weight"] = norm(hidden)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            state[f"{at}self_attn.{name}_proj.weight"] = matrix(rows, hidden)
            if family == "qwen2":
                state[f"{at}self_attn.{name}_proj.bias"] = around_one(rows) - 1
        if family in ("qwen3", "qwen3_moe", "gemma3"):
            state[at + "self_attn.q_norm.weight"] = norm(head_dim)
            state[at + "self_attn.k_norm.weight"] = norm(head_dim)
        state[at + "self_attn.o_proj.weight"] = matrix(hidden, q)
        if family == "mixtral":
            state[at + "block_sparse_moe.gate.weight"] = matrix(config["num_local_experts"], hidden)
            for expert in range(config["num_local_experts"]):
                feed_forward(f"{at}block_sparse_moe.experts.{expert}.", "w1 w3 w2", ffn)
        elif family == "qwen3_moe" and layer not in config.get("mlp_only_layers", ()):
            state[at + "mlp.gate.weight"] = matrix(config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                channels = config["moe_intermediate_size"]
                feed_forward(f"{at}mlp.experts.{expert}.", _DENSE, channels)
        else:
            feed_forward(f"{at}mlp.", _DENSE, ffn)
    return state


def _peaked_head(vocab: int, hidden: int, generator: torch.Generator) -> Tensor:
    head = torch.randn(vocab, hidden, generator=generator)
    head *= 0.3 * float(hidden) ** -0.5
    candidates = torch.randperm(vocab - _FIRST_LIKELY_TOKEN, generator=generator)
    likely = candidates[:_LIKELY_TOKENS] + _FIRST_LIKELY_TOKEN
    lengths = torch.exp(0.5 * torch.randn(likely.numel(), generator=generator))
    head[likely] *= 10 * lengths[:, None]
    return head


def write_tokenizer(source: Path, directory: Path) -> dict[str, Any]:
    """tokenizer.json and its configuration; returns the fields that config.json repeats."""
    if source.is_dir():
        for path in (*source.glob("tokenizer*.json"), *source.glob("chat_template.jinja")):
            shutil.copy(path, directory / path.name)
        config = json.loads((source / "config.json").read_text())
        return {name: config[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    return _convert_tokenizer(source, directory)


def _convert_tokenizer(source: Path, directory: Path) -> dict[str, Any]:
    """Byte-level BPE with single digits, which is what SmolLM2's file declares."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from pdserve.text.gguf_metadata import read_metadata

    metadata = read_metadata(source, "tokenizer.")
    tokens = list(metadata["tokenizer.ggml.tokens"])
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)}, merges, byte_fallback=False
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    bos, eos = (metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": tokens[bos],
                "eos_token": tokens[eos],
                "chat_template": metadata.get("tokenizer.chat_template"),
            }
        )
    )
    return {"vocab_size": len(tokens), "bos_token_id": int(bos), "eos_token_id": int(eos)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    arguments = parser.parse_args()
    print(write_small_model(arguments.directory, tokenizer_from=arguments.tokenizer))
