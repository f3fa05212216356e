"""Mistral: a Llama, all of whose layers slide where ``sliding_window`` is set (v0.1).

GGUF files of it say "llama".
"""

from pdserve.model.architecture import Architecture
from pdserve.model.families.config_json import ConfigJson, alike, common
from pdserve.model.families.family import Family


def _read(config: ConfigJson) -> Architecture:
    return common(config, "mistral", alike(config, slides=lambda _: True))


FAMILY = Family(name="mistral", config_class="MistralForCausalLM", read=_read)
