"""Weights from a directory of safetensors files; one, or many with an index.

Of a quantised checkpoint several tensors are one weight: its numbers, their scales and so on. It
has the name that it would have if it were plain, ``<module>.weight``.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from pdserve.errors import ConfigError
from pdserve.model import packed_floats, packed_integers
from pdserve.model.families.config_json import ConfigJson, read_json
from pdserve.model.packing import Packing, packing_of
from pdserve.model.quantised import QuantisedWeight

_INDEX = "model.safetensors.index.json"
_PASSED_OVER = (
    *("input_scale", "input_zero_point", "input_global_scale", "activation_scale"),
    *("k_scale", "v_scale", "q_scale", "prob_output_scale"),
)
"""Scales of activations and of KV blocks: neither is quantised by them here."""


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
        self._packing = packing_of(ConfigJson(directory))
        self._stored = _stored_by_weight(self._file_of, self._packing)

    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def tensor(self, name: str) -> Tensor:
        parts = self._parts(name)
        if self._packing is None or len(parts) == 1:
            return _plain(name, *parts.values())
        if self._packing.kind == "float8":
            return packed_floats.dequantised(name, parts, self._packing)
        return packed_integers.unpacked(name, parts, self._packing).dequantised()

    def quantised(self, name: str) -> QuantisedWeight | None:
        if self._packing is None or self._packing.kind == "float8" or len(self._stored[name]) == 1:
            return None
        return packed_integers.unpacked(name, self._parts(name), self._packing).quantised()

    def _parts(self, name: str) -> dict[str, Tensor]:
        return {
            _part(stored): cast(Tensor, self._file_of[stored].get_tensor(stored))
            for stored in self._stored[name]
        }


def _stored_by_weight(
    stored: Iterable[str], packing: Packing | None
) -> Mapping[str, tuple[str, ...]]:
    """Of every weight, the tensors that it is stored as: one, or if it is packed all its parts."""
    if packing is None:
        return {name: (name,) for name in stored}
    of_kind = packed_floats if packing.kind == "float8" else packed_integers
    found: dict[str, tuple[str, ...]] = {}
    for name in stored:
        if _part(name) in _PASSED_OVER:
            continue
        ours = name
        if _part(name) in of_kind.PARTS:
            ours = f"{name.rpartition('.')[0]}.weight"
        found[ours] = (*found.get(ours, ()), name)
    for ours, names in found.items():
        missing = of_kind.missing({_part(name) for name in names}) if names != (ours,) else ()
        if missing:
            raise ConfigError(
                f"the weights have {names[0]}, but lack {', '.join(missing)} beside it; download "
                "the model again"
            )
    return found


def _part(stored: str) -> str:
    return stored.rpartition(".")[2]


def _plain(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype.itemsize == 1:
        raise ConfigError(
            f"{name} is of {str(tensor.dtype).removeprefix('torch.')} and has no scale beside it; "
            "config.json must say how the weights are quantised, and the files must be whole"
        )
    return tensor
