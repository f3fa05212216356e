"""Weights from a directory of safetensors files; one, or many with an index."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from pdserve.errors import ConfigError
from pdserve.model.families.config_json import read_json
from pdserve.model.quantised import QuantisedWeight

_INDEX = "model.safetensors.index.json"


class SafetensorsWeights:
    """Files stay mapped while this object lives; a tensor is copied when it is asked for."""

    def __init__(self, directory: Path) -> None:
        from safetensors import SafetensorError, safe_open

        index = directory / _INDEX
        if index.exists():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            paths = [directory / name for name in names]
        else:
            paths = sorted(directory.glob("*.safetensors"))
        self._file_of: dict[str, Any] = {}
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"cannot read {path}: {error}; download it again") from error
            self._file_of.update(dict.fromkeys(file.keys(), file))

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def tensor(self, name: str) -> Tensor:
        return cast(Tensor, self._file_of[name].get_tensor(name))

    def quantised(self, name: str) -> QuantisedWeight | None:  # noqa: ARG002  (none is)
        return None
