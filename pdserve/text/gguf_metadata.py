"""The key-value section at the head of a GGUF file, without the tensors behind it.

The layout, all little-endian: magic ``GGUF``, version (uint32), tensor count and pair count
(uint64), then the pairs: key, type (uint32), value. A string is its length (uint64) and UTF-8
bytes; an array is its item type (uint32), its item count (uint64) and the items.

Why not ``gguf.GGUFReader``: it makes a NumPy view of every string, which takes two seconds for a
vocabulary of 49,152; reading the same bytes with ``struct`` takes a tenth of one.

Source: the GGUF specification, versions 2 and 3.
"""

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError

MAGIC = b"GGUF"
VERSIONS = (2, 3)

_STRING = 8
_ARRAY = 9
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


def read_metadata(path: Path, prefix: str = "") -> Mapping[str, Any]:
    """The pairs whose key begins with ``prefix``: numbers, booleans, strings, lists of them.

    Raises:
        ConfigError: the file cannot be read, or is not GGUF of a version known here.
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _pairs(data, path, prefix)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (struct.error, ValueError, KeyError) as error:  # ValueError: an empty file, bad UTF-8
        raise ConfigError(
            f"{path} is damaged or no GGUF file ({error}); fetch it again, or name another model"
        ) from error


def _pairs(data: mmap.mmap, path: Path, prefix: str) -> dict[str, Any]:
    if data[:4] != MAGIC:
        raise ConfigError(f"{path} does not begin with {MAGIC!r}: it is no GGUF file")
    version, _, pair_count = struct.unpack_from("<IQQ", data, 4)
    if version not in VERSIONS:
        raise ConfigError(f"{path} is GGUF version {version}; versions {VERSIONS} can be read")
    reader = _Reader(data, offset=24)
    pairs = {}
    for _ in range(pair_count):
        key = reader.string()
        value = reader.value(reader.scalar("I"))
        if key.startswith(prefix):
            pairs[key] = value
    return pairs


class _Reader:
    """A place in the file that moves forward."""

    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self._data = data
        self._offset = offset

    def scalar(self, code: str) -> Any:
        (value,) = self._numbers(1, code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        start = self._offset
        self._offset += length
        if self._offset > len(self._data):
            raise ValueError(f"a string of {length} bytes at byte {start} ends after the file")
        return self._data[start : self._offset].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item_kind = self.scalar("I")
            count = self.scalar("Q")
            if item_kind in _SCALARS:
                return list(self._numbers(count, _SCALARS[item_kind]))
            return [self.value(item_kind) for _ in range(count)]
        return self.scalar(_SCALARS[kind])

    def _numbers(self, count: int, code: str) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        values = struct.unpack_from(layout, self._data, self._offset)
        self._offset += struct.calcsize(layout)
        return values
