"""Qwen3, dense: a norm on each head of q and k."""

import dataclasses

from pdserve.model.architecture import Architecture
from pdserve.model.families.config_json import ConfigJson, common
from pdserve.model.families.family import Family
from pdserve.model.families.qwen2 import qwen_layers


def _read(config: ConfigJson) -> Architecture:
    return dataclasses.replace(common(config, "qwen3", qwen_layers(config)), qk_norm=True)


FAMILY = Family(name="qwen3", config_class="Qwen3ForCausalLM", read=_read, gguf_name="qwen3")
