"""Which families there are, and which one a model's files are of."""

from collections.abc import Mapping
from pathlib import Path

from pdserve.errors import ConfigError
from pdserve.model.architecture import Architecture
from pdserve.model.families import gemma3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from pdserve.model.families.config_json import ConfigJson
from pdserve.model.families.family import Family
from pdserve.model.families.gguf import architecture_of_gguf
from pdserve.model.gguf_file import GgufFile
from pdserve.model.packing import packing_of
from pdserve.model.source import ModelFiles

_MODULES = (llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma3)
FAMILIES: Mapping[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}


def read_architecture(files: ModelFiles) -> Architecture:
    """The architecture that the model's files declare.

    Raises:
        ConfigError: an unknown architecture, a feature we do not compute, a missing field.
    """
    if files.format == "gguf":
        return _of_gguf(GgufFile(files.path))
    return _of_directory(files.path)


def _of_gguf(file: GgufFile) -> Architecture:
    name = file.field("general.architecture", str)
    by_name = {family.gguf_name: family for family in FAMILIES.values() if family.gguf_name}
    if name not in by_name:
        raise ConfigError(
            f"{file.path.name} has architecture {name!r}; known: {', '.join(by_name)}"
        )
    if (parts := file.field("split.count", int, 1)) > 1:
        raise ConfigError(
            f"{file.path.name} is one of {parts} parts of a model; make one file of them with "
            "llama-gguf-split --merge"
        )
    family = by_name[name]
    return family.of_gguf(file, architecture_of_gguf(file, name, family.name))


def _of_directory(directory: Path) -> Architecture:
    config = ConfigJson(directory)
    classes = config.get("architectures") or [f"model_type {config.get('model_type')!r}"]
    by_class = {family.config_class: family for family in FAMILIES.values()}
    if classes[0] not in by_class:
        raise ConfigError(
            f"{directory.name} has architecture {classes[0]}; known: {', '.join(by_class)}"
        )
    packing_of(config)  # refuses what the weights could not be read from
    return by_class[classes[0]].read(config)
