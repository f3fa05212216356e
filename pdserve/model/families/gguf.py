"""What a GGUF file's metadata declares, under field names that its families share."""

import dataclasses

from pdserve.errors import ConfigError
from pdserve.model.architecture import Architecture, Experts, LayerKind
from pdserve.model.gguf_file import GgufFile
from pdserve.model.rope import rope_of_gguf

_SOFTMAX = 1  # as GGUF counts the ways to share a token out among experts
_EOS_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def architecture_of_gguf(file: GgufFile, name: str, family: str) -> Architecture:
    """A Llama with what the file declares under ``name``, with experts where its tensors have any;
    families change what theirs have otherwise (``Family.of_gguf``)."""

    def number(field: str, default: int | None = None) -> int:
        return file.field(f"{name}.{field}", int, default)

    heads = number("attention.head_count")
    hidden = number("embedding_length")
    head_dim = number("attention.key_length", hidden // max(heads, 1))
    if number("attention.value_length", head_dim) != head_dim:
        raise ConfigError(f"{file.path.name}: keys and values have different lengths")
    if number("rope.dimension_count", head_dim) != head_dim:
        raise ConfigError(f"{file.path.name}: only a part of each head is turned; not supported")
    context, layer_count = number("context_length"), number("block_count")
    if layer_count > len(file.tensors):
        raise ConfigError(
            f"{file.path.name} declares {layer_count} layers and has {len(file.tensors)} tensors; "
            "download it again"
        )
    # Which layers slide is not declared; within the window, all of them see all.
    window = number("attention.sliding_window", 0)
    eos = (file.metadata.get(f"tokenizer.ggml.{name}") for name in _EOS_FIELDS)
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    dense = LayerKind(rope=rope_of_gguf(file, name, head_dim, context))
    sparse = dataclasses.replace(dense, experts=_experts(file, name))
    return Architecture(
        family=family,
        layers=tuple(
            sparse if f"blk.{index}.ffn_gate_inp.weight" in file.tensors else dense
            for index in range(layer_count)
        ),
        hidden=hidden,
        head_count=heads,
        kv_head_count=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=number("feed_forward_length"),
        vocab_size=file.tensor("token_embd.weight").shape[0],
        context_tokens=min(context, window) if window else context,
        norm_eps=file.field(f"{name}.attention.layer_norm_rms_epsilon", float),
        attention_scale=head_dim**-0.5,
        tied_head="output.weight" not in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        eos_token_ids=tuple(dict.fromkeys(int(token) for token in eos if token is not None)),
        bos_token_id=None if bos is None else int(bos),
    )


def _experts(file: GgufFile, name: str) -> Experts | None:
    count = file.field(f"{name}.expert_count", int, 0)
    if not count:
        return None
    for field, plain in (
        ("expert_shared_count", 0), ("expert_gating_func", _SOFTMAX), ("expert_group_count", 1),
        ("expert_weights_scale", 1.0),
    ):  # fmt: skip
        value = file.metadata.get(f"{name}.{field}", plain)
        if value not in (0, plain):
            raise ConfigError(f"{file.path.name}: {name}.{field} is {value}; not supported")
    dense_ffn = file.field(f"{name}.feed_forward_length", int)
    return Experts(
        count=count,
        per_token=file.field(f"{name}.expert_used_count", int),
        ffn=file.field(f"{name}.expert_feed_forward_length", int, dense_ffn),
        normalised=bool(file.metadata.get(f"{name}.expert_weights_norm", True)),
    )
