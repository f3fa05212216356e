"""Qwen2 and Qwen2.5: a bias on q, k and v; windows in the upper layers where they are asked for."""

import dataclasses

from pdserve.model.architecture import Architecture, LayerKind
from pdserve.model.families.config_json import ConfigJson, alike, common
from pdserve.model.families.family import Family

_MAX_WINDOW_LAYERS = 28  # where config.json does not say it


def qwen_layers(config: ConfigJson) -> tuple[LayerKind, ...]:
    """Despite its name, ``max_window_layers`` counts the lowest layers, which have no window."""
    first = int(config.get("max_window_layers", _MAX_WINDOW_LAYERS))
    return alike(config, slides=lambda index: index >= first, windowed_by_default=False)


def _read(config: ConfigJson) -> Architecture:
    return dataclasses.replace(common(config, "qwen2", qwen_layers(config)), qkv_bias=True)


FAMILY = Family(name="qwen2", config_class="Qwen2ForCausalLM", read=_read, gguf_name="qwen2")
