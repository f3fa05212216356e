"""Linear layers of whole numbers packed into int32: ``weight = scale * (number - zero)``.

*GPTQ*: an int32 holds neighbouring channels of an output, the lowest bits the first; its zeros,
neighbouring outputs. ``g_idx`` says which group a channel belongs to, where groups were made in
another order than that of the channels (``desc_act``).

*AWQ* (``gemm``): an int32 holds 8 neighbouring outputs of a channel, the lowest bits the first,
then the third, the fifth and the seventh, the second …: its kernels unpack two at a time.

Both have matrices the other way round than we do: [channels, outputs].

*compressed-tensors* ("rows"): outputs by channels, as we have them. An int32 holds neighbouring
channels, the lowest bits the first, or each number is an int8. Zero is the middle of the numbers.

Sources: AutoGPTQ, AutoAWQ and compressed-tensors, by whose rules the files are written.

Shape letters: O outputs, C channels, G groups of channels, X 32 neighbouring channels, P numbers of
an int32.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.errors import ConfigError
from pdserve.model.packing import Packing
from pdserve.model.quantised import GROUP, QuantisedWeight, wide_bytes, wide_nibbles

_COLUMN_PARTS = ("qweight", "qzeros", "scales")  # of AWQ and GPTQ
_SCALE, _WORDS, _BYTES, _SHAPE = "weight_scale", "weight_packed", "weight", "weight_shape"  # rows
_GROUPS = ("g_idx", "weight_g_idx")
PARTS = (*_COLUMN_PARTS, _SCALE, _WORDS, _BYTES, _SHAPE, *_GROUPS)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in an int32 the outputs are
_WORD_BITS = 32
_SCALE_MIN = 1e-30  # a kernel takes what is nearly denormal in float32 for zero


@dataclass(frozen=True, slots=True)
class Affine:
    number_OC: Tensor  # uint8
    zero_OG: Tensor  # float32
    scale_OG: Tensor
    group_C: Tensor
    bits: int

    def dequantised(self) -> Tensor:
        """[O, C] in float32; exact where the scale is a float16 or bfloat16, else rounded once."""
        # Ten times as fast as indexing with the groups.
        zero_OC = self.zero_OG.index_select(1, self.group_C)
        scale_OC = self.scale_OG.float().index_select(1, self.group_C)
        return self.number_OC.float().sub_(zero_OC).mul_(scale_OC)

    def quantised(self) -> QuantisedWeight | None:
        """The very same weights in a format of ours, or None: groups that share no 32 neighbouring
        channels, scales that are too small, or for 4 bits have too many digits, or 8 bits with a
        zero that is not 128."""
        if self.group_C.numel() % GROUP:
            return None
        groups_XC = self.group_C.view(-1, GROUP)
        if not (groups_XC == groups_XC[:, :1]).all():
            return None
        too_small = (self.scale_OG.abs() < _SCALE_MIN) & (self.scale_OG != 0)
        too_long = self.bits == 4 and self.scale_OG.dtype == torch.float32
        aside = self.bits == 8 and not (self.zero_OG == 128).all()
        if too_small.any() or too_long or aside:
            return None
        group_X = groups_XC[:, 0]
        scale_OX = self.scale_OG.float()[:, group_X]
        if self.bits == 4:
            minimum_OX = -(self.zero_OG[:, group_X] * scale_OX)
            return wide_nibbles(scale_OX, minimum_OX, self.number_OC)
        number_OC = (self.number_OC.to(torch.int16) - 128).to(torch.int8)
        return wide_bytes(scale_OX.repeat_interleave(2, 1), number_OC)


def missing(parts: Set[str]) -> tuple[str, ...]:
    """What ``parts`` lack to be a weight."""
    if parts & {_SCALE, _WORDS, _SHAPE}:
        numbers = () if parts & {_WORDS, _BYTES} else (_WORDS,)
        return (*numbers, *({_SCALE} - parts))
    return tuple(part for part in _COLUMN_PARTS if part not in parts)


def unpacked(name: str, parts: Mapping[str, Tensor], packing: Packing) -> Affine:
    """The weight that ``parts`` are; which group a channel is of need not be among them.

    Raises:
        ConfigError: their shapes or types do not fit together.
    """
    affine = (_of_rows if packing.kind == "rows" else _of_columns)(name, parts, packing)
    groups, channels = affine.scale_OG.shape[1], affine.group_C.numel()
    if (
        channels == 0
        or groups != -(-channels // (packing.group or channels))  # rounded up
        or int(affine.group_C.min()) < 0
        or int(affine.group_C.max()) >= groups
    ):
        raise _misfit(name, parts)
    return affine


def _of_rows(name: str, parts: Mapping[str, Tensor], packing: Packing) -> Affine:
    scale_OG, packed = parts[_SCALE], _WORDS in parts
    stored = parts[_WORDS] if packed else parts[_BYTES]
    shape = parts.get(_SHAPE, torch.tensor(stored.shape))
    if (
        stored.dtype != (torch.int32 if packed else torch.int8)
        or not (packed or packing.bits == 8)
        or (stored.ndim, scale_OG.ndim, shape.numel()) != (2, 2, 2)
        or len(stored) != len(scale_OG)
        or not scale_OG.is_floating_point()
    ):
        raise _misfit(name, parts)
    middle = 1 << packing.bits - 1
    if packed:
        number_OC = _numbers_across(stored, packing)
        if _SHAPE in parts:  # the last int32 of a row may be in part unused
            number_OC = number_OC[:, : int(shape[1])]
    else:
        number_OC = (stored.to(torch.int16) + middle).to(torch.uint8)
    group_C = _groups(name, parts, packing, number_OC.shape[1])
    zero_OG = torch.full(scale_OG.shape, float(middle))
    return Affine(number_OC, zero_OG, scale_OG, group_C, packing.bits)


def _of_columns(name: str, parts: Mapping[str, Tensor], packing: Packing) -> Affine:
    per_word = _WORD_BITS // packing.bits
    scale_GO = parts["scales"]
    words, zero_words = parts["qweight"], parts["qzeros"]
    if scale_GO.ndim != 2 or words.ndim != 2 or not scale_GO.is_floating_point():
        raise _misfit(name, parts)
    groups, outputs = scale_GO.shape
    along = words.shape[0]
    channels = along if packing.kind == "awq" else along * per_word
    width = outputs // per_word if packing.kind == "awq" else outputs
    group_C = _groups(name, parts, packing, channels)
    if (
        (words.dtype, zero_words.dtype) != (torch.int32, torch.int32)
        or outputs % per_word
        or words.shape[1] != width
        or zero_words.shape != (groups, outputs // per_word)
    ):
        raise _misfit(name, parts)
    zero_GO = _numbers_across(zero_words, packing)
    zero_GO = (zero_GO + packing.zero_offset) & ((1 << packing.bits) - 1)
    if packing.kind == "awq":
        number_OC = _numbers_across(words, packing).T.contiguous()
    else:
        number_OC = _numbers_across(words.T, packing)
    return Affine(number_OC, zero_GO.T.float(), scale_GO.T.contiguous(), group_C, packing.bits)


def _groups(name: str, parts: Mapping[str, Tensor], packing: Packing, channels: int) -> Tensor:
    """[C]: each channel's group."""
    stored = [parts[part] for part in _GROUPS if part in parts]
    if not stored:
        return torch.arange(channels) // (packing.group or max(channels, 1))
    group_C = stored[0]
    if group_C.shape != (channels,) or group_C.is_floating_point():
        raise _misfit(name, parts)
    return group_C.long()


def _numbers_across(words_XY: Tensor, packing: Packing) -> Tensor:
    """[X, Y * P] uint8: the numbers of each row's int32 in their order."""
    numbers_XZ = words_XY.contiguous().view(torch.uint8)  # the lowest bits first, as in the files
    if packing.bits == 4:
        numbers_XZ = torch.stack((numbers_XZ & 15, numbers_XZ >> 4), dim=-1).flatten(1)
    if packing.kind != "awq":
        return numbers_XZ
    words_XYP = numbers_XZ.view(len(numbers_XZ), -1, len(_AWQ_ORDER))
    return words_XYP.index_select(2, torch.tensor(_AWQ_ORDER)).flatten(1)


def _misfit(name: str, parts: Mapping[str, Tensor]) -> ConfigError:
    shapes = ", ".join(
        f"{part} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        for part, tensor in sorted(parts.items())
    )
    return ConfigError(
        f"the parts of {name} do not fit together or to quantization_config: {shapes}; download "
        "the model again"
    )
