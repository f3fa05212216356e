"""Values in the tensors of KServe's inference protocol.

A tensor's values lie in its own ``contents``, in the field of its datatype; or all tensors' values
lie in the request's ``raw_input_contents``, little-endian, where a string has its length before it
in 4 bytes. Shapes only say how many there are.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from pdserve.errors import InvalidField
from pdserve.proto.kserve import inference_pb2 as pb

VALUES_MAX = 1 << 20
"""Of one tensor: more than any context has tokens."""

BYTES = "BYTES"

_FIELDS: Mapping[str, tuple[str, str]] = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
    BYTES: ("bytes_contents", ""),
}
"""Where values of a datatype lie, and how ``struct`` names it."""

_LENGTH = struct.Struct("<I")


def inputs_of(request: pb.ModelInferRequest) -> dict[str, Sequence[Any]]:
    """The values of every input tensor, flat, by its name. Strings are bytes.

    Raises:
        InvalidField: a tensor is not what it says, or two have one name.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidField(
            "raw_input_contents", f"has {len(raw)} entries for {len(request.inputs)} inputs"
        )
    values: dict[str, Sequence[Any]] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name in values:
            raise InvalidField(f"inputs.{index}.name", "is that of an input before it")
        values[tensor.name] = _values(tensor, raw[index] if raw else None)
    return values


def raw_strings(strings: Sequence[str]) -> bytes:
    encoded = [string.encode() for string in strings]
    return b"".join(_LENGTH.pack(len(string)) + string for string in encoded)


def _values(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Sequence[Any]:
    field = _FIELDS.get(tensor.datatype)
    if field is None:
        raise InvalidField(
            f"{tensor.name}.datatype", f"is unknown; it must be one of {', '.join(_FIELDS)}"
        )
    count = _count(tensor)
    content, code = field
    if raw is None:
        values: Sequence[Any] = getattr(tensor.contents, content)
    elif tensor.datatype == BYTES:
        values = _strings(tensor.name, raw)
    else:
        layout = struct.Struct(f"<{count}{code}")
        if len(raw) != layout.size:
            raise InvalidField(
                tensor.name,
                f"has {len(raw)} bytes, {count} of {tensor.datatype} have {layout.size}",
            )
        values = layout.unpack(raw)
    if len(values) != count:
        raise InvalidField(
            tensor.name, f"has {len(values)} values of {tensor.datatype}, its shape says {count}"
        )
    return values


def _count(tensor: pb.ModelInferRequest.InferInputTensor) -> int:
    if any(size < 0 for size in tensor.shape) or math.prod(tensor.shape) > VALUES_MAX:
        raise InvalidField(f"{tensor.name}.shape", f"must be of 0 to {VALUES_MAX} values in all")
    return math.prod(tensor.shape)


def _strings(name: str, raw: bytes) -> list[bytes]:
    strings: list[bytes] = []
    at = 0
    while at < len(raw):
        end = at + _LENGTH.size
        length = _LENGTH.unpack_from(raw, at)[0] if end <= len(raw) else 0
        if end + length > len(raw):
            raise InvalidField(name, "ends within a string: each has its length before it")
        strings.append(raw[end : end + length])
        at = end + length
    return strings
