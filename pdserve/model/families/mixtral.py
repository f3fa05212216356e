"""Mixtral: Mistral with experts in every layer."""

import dataclasses

from pdserve.model.architecture import Architecture, Experts
from pdserve.model.families.config_json import ConfigJson, alike, common
from pdserve.model.families.family import Family, TensorNames


def _read(config: ConfigJson) -> Architecture:
    experts = Experts(
        count=config.number("num_local_experts"),
        per_token=config.number("num_experts_per_tok"),
        ffn=config.number("intermediate_size"),
        normalised=True,
    )
    kinds = alike(config, slides=lambda _: True)
    layers = [dataclasses.replace(kind, experts=experts) for kind in kinds]
    return common(config, "mixtral", layers)


FAMILY = Family(
    name="mixtral",
    config_class="MixtralForCausalLM",
    read=_read,
    names=TensorNames(
        router="block_sparse_moe.gate",
        experts="block_sparse_moe.experts",
        expert_gate="w1",
        expert_up="w3",
        expert_down="w2",
    ),
)
