"""How the linear layers of a quantised checkpoint are packed: what ``quantization_config`` says.

* ``fp8`` (DeepSeek, Qwen, vLLM): 8-bit floats with a float32 scale per matrix, per output or per
  block of 128 by 128.
* ``awq``, in the form ``gemm``, and ``gptq``: whole numbers of 4 bits (GPTQ: or 8) in int32, with a
  scale and a zero for each group of channels of an output.
* ``compressed-tensors``, with field names of its own: ``float-quantized`` is as ``fp8``;
  ``pack-quantized`` and ``int-quantized`` are whole numbers, of 4 or 8 bits, symmetric.

Which layers are so is what their tensors say, not the lists of exceptions beside these fields.
Scales of activations are passed over: inputs are never quantised here.

No torch in this file: what cannot be read is refused before a worker starts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pdserve.errors import ConfigError
from pdserve.model.families.config_json import ConfigJson

Kind = Literal["float8", "awq", "gptq", "rows"]

_BITS = (4, 8)  # of whole numbers
_WAY_OUT = "take another quantisation of the model, its unquantised safetensors or a GGUF file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    method: str
    """``quant_method``, as ``--quantization`` of vLLM names it too."""

    kind: Kind
    bits: int
    group: int | None = None
    """Channels with one scale; None: all of an output. Of whole numbers only: what 8-bit floats
    share a scale is told by the scales' shape."""

    block: tuple[int, int] | None = None
    """Outputs and channels with one scale, where 8-bit floats have one per block."""

    zero_offset: int = 0
    """What was subtracted from zeros before they were stored."""

    def __str__(self) -> str:
        return f"{self.method}, {self.bits} bits"


def packing_of(config: ConfigJson) -> Packing | None:
    """None: the weights are plain.

    Raises:
        ConfigError: they are packed in a way that we do not read; names the field.
    """
    fields = config.get("quantization_config") or config.get("compression_config")
    if not fields:
        return None
    if not isinstance(fields, Mapping):
        raise _refusal(config, f"it is {fields!r}, must be an object")
    readers = {
        "fp8": _fp8,
        "compressed-tensors": _compressed_tensors,
        "awq": _awq,
        "gptq": _gptq,
    }
    method = fields.get("quant_method")
    if method not in readers:
        raise _refusal(config, f"quant_method is {method!r}, known are {', '.join(readers)}")
    return readers[method](config, fields)


def _fp8(config: ConfigJson, fields: Mapping[str, Any]) -> Packing:
    _only(config, fields, fmt=("e4m3", None))
    return Packing(
        method="fp8", kind="float8", bits=8, block=_block(config, fields.get("weight_block_size"))
    )


def _compressed_tensors(config: ConfigJson, fields: Mapping[str, Any]) -> Packing:
    groups = list((fields.get("config_groups") or {}).values())
    weights = [group.get("weights") or {} for group in groups]
    if not weights or any(other != weights[0] for other in weights):
        raise _refusal(config, f"config_groups has {len(groups)} kinds of weights, must be one")
    if (fields.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        raise _refusal(config, "sparsity_config says that zeros are left out")
    _only(config, fields, format=("float-quantized", "pack-quantized", "int-quantized"))
    if fields["format"] == "float-quantized":
        _only(config, weights[0], type=("float",), num_bits=(8,))
        block = _block(config, weights[0].get("block_structure"))
        return Packing(method="compressed-tensors", kind="float8", bits=8, block=block)
    bits = _BITS if fields["format"] == "pack-quantized" else (8,)
    ways = ("group", "channel")
    _only(config, weights[0], type=("int",), num_bits=bits, symmetric=(True,), strategy=ways)
    return Packing(
        method="compressed-tensors",
        kind="rows",
        bits=weights[0]["num_bits"],
        group=_group(config, weights[0]) if weights[0]["strategy"] == "group" else None,
    )


def _awq(config: ConfigJson, fields: Mapping[str, Any]) -> Packing:
    _only(config, fields, version=("gemm", "GEMM", None), bits=(4,))
    return Packing(method="awq", kind="awq", bits=4, group=_group(config, fields))


def _gptq(config: ConfigJson, fields: Mapping[str, Any]) -> Packing:
    _only(config, fields, bits=_BITS, checkpoint_format=("gptq", "gptq_v2", None))
    if any(not str(rule).startswith("-:") for rule in fields.get("dynamic") or {}):
        raise _refusal(config, "dynamic packs some layers in another way than the rest")
    return Packing(
        method="gptq",
        kind="gptq",
        bits=fields["bits"],
        group=_group(config, fields),
        zero_offset=0 if fields.get("checkpoint_format") == "gptq_v2" else 1,
    )


def _group(config: ConfigJson, fields: Mapping[str, Any]) -> int | None:
    size = fields.get("group_size")
    if not isinstance(size, int) or (size < 1 and size != -1):
        raise _refusal(config, f"group_size is {size!r}, must be a positive number or -1")
    return None if size == -1 else size


def _block(config: ConfigJson, size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    whole = isinstance(size, list) and [type(part) for part in size] == [int, int]
    if not whole or min(size) < 1:
        raise _refusal(config, f"a block of weights is {size!r}, must be two positive numbers")
    return size[0], size[1]


def _only(config: ConfigJson, fields: Mapping[str, Any], **known: tuple[Any, ...]) -> None:
    for name, values in known.items():
        if fields.get(name) not in values:
            names = ", ".join(str(value) for value in values if value is not None)
            raise _refusal(config, f"{name} is {fields.get(name)!r}, known are {names}")


def _refusal(config: ConfigJson, reason: str) -> ConfigError:
    return config.refusal(f"quantization_config: {reason}; {_WAY_OUT}")
