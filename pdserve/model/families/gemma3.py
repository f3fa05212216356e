"""Gemma 3, text: two kinds of layers, four norms in each, and scales of its own.

Five of six layers slide and turn by a rope of their own, which no scaling stretches. GGUF files
hold norm weights with the 1 added. The attention scale, which layers slide and the rope of those
they need not declare: it is what all published models have, but that the largest, known by its 62
layers, scales its scores otherwise. llama.cpp, whose files they are, reads them by the same rules.
"""

import dataclasses

from pdserve.errors import ConfigError
from pdserve.model.architecture import Architecture, LayerKind
from pdserve.model.families.config_json import ConfigJson, common, sliding, window_of
from pdserve.model.families.family import Family, TensorNames
from pdserve.model.gguf_file import GgufFile
from pdserve.model.rope import Rope, rope_of_config

_HEAD_DIM, _QUERY_SCALAR, _WINDOW_PATTERN = 256, 256, 6  # where config.json does not say them
_GLOBAL_BASE, _LOCAL_BASE = 1e6, 1e4
_LARGEST_LAYERS = 62
_REFUSED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


def _read(config: ConfigJson) -> Architecture:
    for name in _REFUSED:
        if config.get(name):
            raise config.refusal(f"{name} is {config.get(name)!r}; not supported, must be unset")
    pattern = config.get("sliding_window_pattern") or _WINDOW_PATTERN
    if config.get("sliding_window") is None:
        raise config.refusal("sliding_window is not set")
    full, nearby = _kinds(config)
    slides = sliding(config, lambda index: (index + 1) % pattern != 0)
    layers = [nearby if slid else full for slid in slides]
    llama = common(config, "gemma3", layers, head_dim=_HEAD_DIM, tied_by_default=True)
    return dataclasses.replace(
        llama,
        attention_scale=float(config.get("query_pre_attn_scalar") or _QUERY_SCALAR) ** -0.5,
        embedding_scale=llama.hidden**0.5,
        qk_norm=True,
        output_norms=True,
        norm_offset=1.0,
    )


def _kinds(config: ConfigJson) -> tuple[LayerKind, LayerKind]:
    """Full and sliding layers; ropes in the newer spelling (an entry for each) or the older one."""
    context = config.number("max_position_embeddings")
    newer = config.get("rope_parameters") or {}
    everywhere = {
        "rope_theta": config.get("rope_theta") or _GLOBAL_BASE,
        "rope_scaling": config.get("rope_scaling"),
        "rope_parameters": newer.get("full_attention"),
    }
    nearby = {
        "rope_theta": config.get("rope_local_base_freq") or _LOCAL_BASE,
        "rope_parameters": newer.get("sliding_attention"),
    }
    return (
        LayerKind(rope=rope_of_config(everywhere, context)),
        LayerKind(rope=rope_of_config(nearby, context), window=window_of(config)),
    )


def _of_gguf(file: GgufFile, llama: Architecture) -> Architecture:
    for name in _REFUSED:
        if file.metadata.get(f"gemma3.{name}"):
            value = file.metadata[f"gemma3.{name}"]
            raise ConfigError(f"{file.path.name}: {name} is {value}; not supported, must be unset")
    context = file.field("gemma3.context_length", int)
    window = file.field("gemma3.attention.sliding_window", int)
    pattern = file.field("gemma3.attention.sliding_window_pattern", int, _WINDOW_PATTERN)
    if pattern < 1:
        raise ConfigError(f"{file.path.name}: every {pattern}th layer is full, must be positive")
    full = llama.layers[0]
    nearby = LayerKind(
        rope=Rope(base=file.field("gemma3.rope.freq_base_swa", float, _LOCAL_BASE)),
        window=window if window < context else None,
    )
    scaled = llama.hidden // llama.head_count
    return dataclasses.replace(
        llama,
        layers=tuple(
            nearby if (index + 1) % pattern else full for index in range(llama.layer_count)
        ),
        context_tokens=context,
        attention_scale=(scaled if llama.layer_count == _LARGEST_LAYERS else llama.head_dim)
        ** -0.5,
        embedding_scale=llama.hidden**0.5,
        activation="gelu_tanh",
        output_norms=True,
    )


FAMILY = Family(
    name="gemma3",
    config_class="Gemma3ForCausalLM",
    read=_read,
    gguf_name="gemma3",
    of_gguf=_of_gguf,
    names=TensorNames(
        attention_output_norm="post_attention_layernorm",
        ffn_norm="pre_feedforward_layernorm",
        ffn_output_norm="post_feedforward_layernorm",
    ),
)
