"""Qwen3 with experts: Qwen3 whose feed-forward layers are mixtures, all or every n-th of them."""

import dataclasses

from pdserve.model.architecture import Architecture, Experts
from pdserve.model.families.config_json import ConfigJson, alike, common
from pdserve.model.families.family import Family


def _read(config: ConfigJson) -> Architecture:
    experts = Experts(
        count=config.number("num_experts"),
        per_token=config.number("num_experts_per_tok"),
        ffn=config.number("moe_intermediate_size"),
        normalised=bool(config.get("norm_topk_prob", False)),
    )
    dense = set(config.get("mlp_only_layers") or ())
    step = int(config.get("decoder_sparse_step", 1))
    kinds = alike(config, slides=lambda _: True, windowed_by_default=False)
    layers = [
        kind if index in dense or (index + 1) % step else dataclasses.replace(kind, experts=experts)
        for index, kind in enumerate(kinds)
    ]
    return dataclasses.replace(common(config, "qwen3_moe", layers), qk_norm=True)


FAMILY = Family(
    name="qwen3_moe", config_class="Qwen3MoeForCausalLM", read=_read, gguf_name="qwen3moe"
)
