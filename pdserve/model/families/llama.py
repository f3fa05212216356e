"""Llama 2 and 3, SmolLM2, and whatever else calls itself a Llama.

In GGUF files Mistral and Mixtral do too; with experts it is Mixtral.
"""

import dataclasses

from pdserve.model.architecture import Architecture
from pdserve.model.families.config_json import ConfigJson, alike, common
from pdserve.model.families.family import Family
from pdserve.model.gguf_file import GgufFile


def _read(config: ConfigJson) -> Architecture:
    return common(config, "llama", alike(config, slides=lambda _: False))


def _of_gguf(_: GgufFile, llama: Architecture) -> Architecture:
    sparse = any(kind.experts for kind in llama.layers)
    return dataclasses.replace(llama, family="mixtral") if sparse else llama


FAMILY = Family(
    name="llama",
    config_class="LlamaForCausalLM",
    read=_read,
    gguf_name="llama",
    of_gguf=_of_gguf,
)
