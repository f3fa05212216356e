"""What a model looks like, read from its files before a single weight is.

One dataclass for the whole Llama family: Llama (SmolLM2 is one), Mistral, Qwen2, Qwen3. They differ
in a bias on q, k and v (Qwen2), a norm on q and k (Qwen3), tied or separate output weights, and in
how rotary frequencies are stretched (``rope.py``). What we cannot compute is refused by name here,
before anything is loaded. No torch in this file: the gateway reads it too.

*Sliding windows* are not computed. Within its window such a model is an ordinary one, so a window
shortens ``context_tokens`` instead of changing an answer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.config import ModelConfig
from pdserve.errors import ConfigError
from pdserve.model.gguf_file import GgufFile
from pdserve.model.rope import Rope, rope_of_config, rope_of_gguf
from pdserve.model.source import ModelFiles

_FAMILY_OF_CLASS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_FAMILIES_OF_GGUF = ("llama", "qwen2", "qwen3")  # Mistral's files say "llama"
_EOS_FIELDS_OF_GGUF = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    family: str
    layer_count: int
    hidden: int
    head_count: int
    kv_head_count: int
    head_dim: int
    ffn: int
    vocab_size: int
    context_tokens: int
    norm_eps: float
    rope: Rope
    tied_head: bool
    qk_norm: bool
    qkv_bias: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    def __post_init__(self) -> None:
        for name in (
            "layer_count", "hidden", "head_count", "kv_head_count", "head_dim", "ffn",
            "vocab_size", "context_tokens",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"the model's {name} is {getattr(self, name)}, must be positive")
        if self.head_count % self.kv_head_count:
            raise ConfigError(
                f"the model has {self.head_count} heads, no multiple of its "
                f"{self.kv_head_count} key/value heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"the model's head_dim is {self.head_dim}, must be even to be turned")

    @property
    def attention_like_linear_tokens(self) -> int:
        """With so many tokens before it, a token's attention takes as many multiplications as its
        linear layers: P / (2 · H · D) for a layer whose matrices have P elements."""
        attended = self.head_count * self.head_dim
        kept = self.kv_head_count * self.head_dim
        elements = self.hidden * (2 * attended + 2 * kept + 3 * self.ffn)
        return elements // (2 * attended)


def read_architecture(files: ModelFiles) -> Architecture:
    """The architecture that the model's files declare.

    Raises:
        ConfigError: an unknown architecture, a feature we do not compute, a missing field.
    """
    if files.format == "gguf":
        return _of_gguf(GgufFile(files.path))
    return _of_directory(files.path)


def context_limit(architecture: Architecture, config: ModelConfig) -> int:
    """Tokens a sequence may have: the model's own limit, or the smaller one that is configured."""
    if config.context_tokens is None:
        return architecture.context_tokens
    if config.context_tokens > architecture.context_tokens:
        raise ConfigError(
            f"model.context_tokens is {config.context_tokens}, the model's own limit is "
            f"{architecture.context_tokens}; lower it, or leave it out"
        )
    return config.context_tokens


def _of_gguf(file: GgufFile) -> Architecture:
    family = file.field("general.architecture", str)
    if family not in _FAMILIES_OF_GGUF:
        raise ConfigError(
            f"{file.path.name} has architecture {family!r}; known: {', '.join(_FAMILIES_OF_GGUF)}"
        )

    def number(name: str, default: int | None = None) -> int:
        return file.field(f"{family}.{name}", int, default)

    heads = number("attention.head_count")
    hidden = number("embedding_length")
    head_dim = number("attention.key_length", hidden // heads)
    if number("attention.value_length", head_dim) != head_dim:
        raise ConfigError(f"{file.path.name}: keys and values have different lengths")
    if number("rope.dimension_count", head_dim) != head_dim:
        raise ConfigError(f"{file.path.name}: only a part of each head is turned; not supported")
    if number("expert_count", 0):
        raise ConfigError(f"{file.path.name} is a mixture of experts; not supported")
    context = number("context_length")
    window = number("attention.sliding_window", 0)
    eos = (file.metadata.get(f"tokenizer.ggml.{name}") for name in _EOS_FIELDS_OF_GGUF)
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    return Architecture(
        family=family,
        layer_count=number("block_count"),
        hidden=hidden,
        head_count=heads,
        kv_head_count=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=number("feed_forward_length"),
        vocab_size=file.tensor("token_embd.weight").shape[0],
        context_tokens=min(context, window) if window else context,
        norm_eps=file.field(f"{family}.attention.layer_norm_rms_epsilon", float),
        rope=rope_of_gguf(file, family, head_dim, context),
        tied_head="output.weight" not in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        eos_token_ids=tuple(dict.fromkeys(int(token) for token in eos if token is not None)),
        bos_token_id=None if bos is None else int(bos),
    )


def _of_directory(directory: Path) -> Architecture:
    config = read_json(directory / "config.json")
    classes = config.get("architectures") or [f"model_type {config.get('model_type')!r}"]
    family = _FAMILY_OF_CLASS.get(classes[0])
    if family is None:
        raise ConfigError(
            f"{directory.name} has architecture {classes[0]}; known: {', '.join(_FAMILY_OF_CLASS)}"
        )
    if "quantization_config" in config:
        raise ConfigError(
            f"{directory.name} is quantised ({config['quantization_config'].get('quant_method')}); "
            "use unquantised safetensors or a GGUF file"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{directory.name}: activation {config['hidden_act']!r} is not supported")

    def number(name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int):
            raise ConfigError(f"{directory.name}/config.json: {name} is {value!r}, not a number")
        return value

    heads = number("num_attention_heads")
    return Architecture(
        family=family,
        layer_count=number("num_hidden_layers"),
        hidden=number("hidden_size"),
        head_count=heads,
        kv_head_count=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or number("hidden_size") // heads,
        ffn=number("intermediate_size"),
        vocab_size=number("vocab_size"),
        context_tokens=_context_of(config, directory, number("max_position_embeddings")),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope_of_config(config, number("max_position_embeddings")),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
        eos_token_ids=_eos_of(config, directory),
        bos_token_id=config.get("bos_token_id"),
    )


def _context_of(config: Mapping[str, Any], directory: Path, own: int) -> int:
    """The model's context, shortened to the window where some layers see only that much."""
    kinds = set(config.get("layer_types") or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{directory.name} has layers of type {', '.join(sorted(kinds))}")
    window = config.get("sliding_window")
    slides = config.get("use_sliding_window", True) and (not kinds or "sliding_attention" in kinds)
    return min(own, int(window)) if window and slides else own


def _eos_of(config: Mapping[str, Any], directory: Path) -> tuple[int, ...]:
    """From both files: instruct models name the end of a turn in the second one only."""
    found: list[int] = []
    generation = directory / "generation_config.json"
    for source in (config, read_json(generation) if generation.exists() else {}):
        value = source.get("eos_token_id")
        found.extend(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(dict.fromkeys(found))


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold an object, not {type(value).__name__}")
    return value
