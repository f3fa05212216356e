"""Reading a GGUF file's header: metadata and where each tensor lies.

The layout is public and small: magic, version, counts, key/value pairs, tensor entries, then the
tensors, each aligned. The ``gguf`` package reads it too, but builds an array object per token of
the vocabulary (two seconds for 49,152 of them); a start of a worker should not wait for that.
Arrays are skipped here: nothing in ``model`` needs one. Dequantising stays with ``gguf``.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from pdserve.errors import ConfigError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_ALIGNMENT_DEFAULT = 32
_DIMENSIONS_MAX = 4
_ARRAY_DEPTH_MAX = 4

TYPES = (
    *("F32", "F16", "BF16"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q4_K", "Q5_K", "Q6_K"),
)
"""Those of weights that are read: what files of Q4_K_M, Q5_K_M, Q6_K and Q8_0 consist of. (Where
rows are no multiples of 256, as in the smallest models, such files hold Q5_0, Q5_1 and Q8_0 instead
of K types.) The ``gguf`` package dequantises more; what is not compared with the format's own
arithmetic in ``tests`` is refused rather than believed."""

_WAY_OUT = f"use a file of {', '.join(TYPES[:-1])} or {TYPES[-1]}, such as one of Q4_K_M or Q8_0"

Value = TypeVar("Value", str, int, float)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as torch and numpy say it."""

    type_id: int
    offset: int
    """From the start of the file."""


class GgufFile:
    """A mapped file with its header read. ``metadata`` has every field that is not an array."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str | int | float | bool] = {}
        self._arrays: set[str] = set()  # names alone
        self.tensors: dict[str, GgufTensor] = {}
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:  # an empty file cannot be mapped
            raise ConfigError(f"{path} is empty") from error
        try:
            self._read()
        except (struct.error, UnicodeDecodeError, KeyError, IndexError) as error:
            raise ConfigError(f"{path} is not a whole GGUF file: {error}") from error

    def field(self, name: str, kind: type[Value], default: Value | None = None) -> Value:
        value = self.metadata.get(name, default)
        if name in self._arrays:
            raise ConfigError(f"{self.path.name}: {name} is an array; only one value is supported")
        if value is None:
            raise ConfigError(f"{self.path.name} lacks the field {name}")
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind):
            raise ConfigError(f"{self.path.name}: {name} is {value!r}, must be {kind.__name__}")
        return value

    def tensor(self, name: str) -> GgufTensor:
        if name not in self.tensors:
            raise ConfigError(f"{self.path.name} lacks the tensor {name}")
        return self.tensors[name]

    def blocks(
        self, name: str, part: int | None = None
    ) -> tuple[str, np.ndarray[Any, np.dtype[np.uint8]]]:
        """The type's name and the stored bytes, [..., B]: those of a row along the last axis.

        Args:
            part: which one along the first axis, of a tensor that is a stack of matrices.
        """
        tensor = self.tensor(name)
        kind, byte_count = self._stored_as(tensor)
        raw = np.frombuffer(self.data, np.uint8, byte_count, tensor.offset)
        blocks = raw.reshape(*tensor.shape[:-1], -1)
        return kind, blocks if part is None else blocks[part]

    def dequantised(
        self, name: str, part: int | None = None
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The tensor, or a part of it, in float32 and of its own shape."""
        from gguf import GGMLQuantizationType, dequantize

        type_name, blocks = self.blocks(name, part)
        values = dequantize(blocks, GGMLQuantizationType[type_name])
        shape = self.tensor(name).shape
        values = np.asarray(values, dtype=np.float32)
        return values.reshape(shape if part is None else shape[1:])

    def check_whole(self) -> None:
        """Every tensor has one of ``TYPES`` and lies within the file: said before any is read."""
        for tensor in self.tensors.values():
            self._stored_as(tensor)

    def _stored_as(self, tensor: GgufTensor) -> tuple[str, int]:
        """The type's name, and how many bytes of the file the tensor is."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(tensor.type_id)
        except ValueError as error:
            raise ConfigError(
                f"{self.path.name}: tensor {tensor.name} has the unknown type {tensor.type_id}; "
                f"{_WAY_OUT}"
            ) from error
        if kind.name not in TYPES:
            raise ConfigError(
                f"{self.path.name}: tensor {tensor.name} has the type {kind.name}, which is not "
                f"supported; {_WAY_OUT}"
            )
        group, group_bytes = GGML_QUANT_SIZES[kind]
        if not tensor.shape or tensor.shape[-1] % group:
            raise ConfigError(
                f"{self.path.name}: tensor {tensor.name} has the shape {tensor.shape}, of type "
                f"{kind.name}, whose rows are multiples of {group}; the file is damaged"
            )
        byte_count = math.prod(tensor.shape) // group * group_bytes
        if tensor.offset + byte_count > len(self.data):
            raise ConfigError(
                f"{self.path.name} ends within the tensor {tensor.name}; download it again"
            )
        return kind.name, byte_count

    def _read(self) -> None:
        cursor = _Cursor(self.data)
        if cursor.take(4) != _MAGIC:
            raise ConfigError(f"{self.path} is not a GGUF file")
        version = cursor.scalar("<I")
        if version not in _VERSIONS:
            raise ConfigError(f"{self.path} is GGUF version {version}; known: 2, 3")
        tensor_count, field_count = cursor.scalar("<Q"), cursor.scalar("<Q")
        for _ in range(field_count):
            name = cursor.text()
            value = cursor.value(cursor.scalar("<I"))
            if value is None:
                self._arrays.add(name)
            else:
                self.metadata[name] = value
        entries = [self._entry(cursor) for _ in range(tensor_count)]
        alignment = self.field("general.alignment", int, _ALIGNMENT_DEFAULT)
        if alignment < 1:
            raise IndexError(f"its tensors are aligned to {alignment} bytes")
        start = -(-cursor.position // alignment) * alignment
        for name, shape, type_id, offset in entries:
            self.tensors[name] = GgufTensor(name, shape, type_id, start + offset)

    @staticmethod
    def _entry(cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.text()
        dimension_count = cursor.scalar("<I")
        if dimension_count > _DIMENSIONS_MAX:
            raise IndexError(f"tensor {name} has {dimension_count} dimensions")
        shape = tuple(cursor.scalar("<Q") for _ in range(dimension_count))[::-1]
        return name, shape, cursor.scalar("<I"), cursor.scalar("<Q")


class _Cursor:
    """Walks over the header; a length that leads past the end raises ``struct.error``."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        if self.position + count > len(self._data):
            raise struct.error(f"ends at byte {len(self._data)}, wanted {self.position + count}")
        taken = self._data[self.position : self.position + count]
        self.position += count
        return taken

    def scalar(self, layout: str) -> Any:
        value = struct.unpack_from(layout, self._data, self.position)[0]
        self.position += struct.calcsize(layout)
        return value

    def text(self) -> str:
        return self.take(self.scalar("<Q")).decode()

    def value(self, kind: int, depth: int = 0) -> str | int | float | bool | None:
        """The value, or None for an array, which is passed over; ``depth`` arrays are around it."""
        if depth > _ARRAY_DEPTH_MAX:
            raise IndexError(f"arrays within arrays, {depth} deep")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return cast("int | float | bool", self.scalar(_SCALARS[kind]))
        element, count = self.scalar("<I"), self.scalar("<Q")
        if element in _SCALARS:
            self.position += count * struct.calcsize(_SCALARS[element])
        else:
            for _ in range(count):
                if element == _STRING:
                    length = self.scalar("<Q")
                    self.position += length
                else:
                    self.value(element, depth + 1)
        return None
