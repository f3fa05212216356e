"""What a GGUF file's metadata declares, under field names that its families share."""

from pdserve.errors import ConfigError
from pdserve.model.architecture import Architecture, LayerKind
from pdserve.model.gguf_file import GgufFile
from pdserve.model.rope import rope_of_gguf

_EOS_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def architecture_of_gguf(file: GgufFile, family: str) -> Architecture:
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
    # Which layers slide is not declared; within the window, all of them see all.
    window = number("attention.sliding_window", 0)
    eos = (file.metadata.get(f"tokenizer.ggml.{name}") for name in _EOS_FIELDS)
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    kind = LayerKind(rope=rope_of_gguf(file, family, head_dim, context))
    return Architecture(
        family=family,
        layers=(kind,) * number("block_count"),
        hidden=hidden,
        head_count=heads,
        kv_head_count=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=number("feed_forward_length"),
        vocab_size=file.tensor("token_embd.weight").shape[0],
        context_tokens=min(context, window) if window else context,
        norm_eps=file.field(f"{family}.attention.layer_norm_rms_epsilon", float),
        attention_scale=head_dim**-0.5,
        tied_head="output.weight" not in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        eos_token_ids=tuple(dict.fromkeys(int(token) for token in eos if token is not None)),
        bos_token_id=None if bos is None else int(bos),
    )
