"""Llama 2 and 3, SmolLM2, and whatever else calls itself a Llama."""

from pdserve.model.architecture import Architecture
from pdserve.model.families.config_json import ConfigJson, alike, common
from pdserve.model.families.family import Family


def _read(config: ConfigJson) -> Architecture:
    return common(config, "llama", alike(config, slides=lambda _: False))


FAMILY = Family(name="llama", config_class="LlamaForCausalLM", read=_read, in_gguf=True)
