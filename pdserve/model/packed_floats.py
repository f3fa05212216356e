"""Linear layers of 8-bit floats: ``weight = float8 * scale``, in float32.

Despite its name, ``weight_scale_inv`` is multiplied with too. A scale belongs to the whole matrix,
to an output, or to a block; the blocks at the end of a row or a column may be smaller.

Shape letters: O outputs, C channels; X, Y blocks along them.
"""

from collections.abc import Mapping, Set

import torch
from torch import Tensor

from pdserve.errors import ConfigError
from pdserve.model.packing import Packing

_SCALES = ("weight_scale", "weight_scale_inv")
PARTS = ("weight", *_SCALES)


def missing(parts: Set[str]) -> tuple[str, ...]:
    """What ``parts`` lack to be a weight."""
    scale = () if parts & set(_SCALES) else (_SCALES[0],)
    return (*({"weight"} - parts), *scale)


def dequantised(name: str, parts: Mapping[str, Tensor], packing: Packing) -> Tensor:
    """[O, C] in float32; ``parts`` are the weight and a scale.

    Raises:
        ConfigError: their shapes or types do not fit together.
    """
    weight_OC = parts["weight"]
    scales = [parts[scale] for scale in _SCALES if scale in parts]
    if weight_OC.dtype != torch.float8_e4m3fn or weight_OC.ndim != 2 or len(scales) != 1:
        raise ConfigError(
            f"{name} is {weight_OC.dtype} {tuple(weight_OC.shape)} with {len(scales)} scales; must "
            f"be a matrix of float8_e4m3fn with one of {' or '.join(_SCALES)}"
        )
    return weight_OC.float() * _spread(name, scales[0].float(), weight_OC.shape, packing)


def _spread(name: str, scale: Tensor, shape: torch.Size, packing: Packing) -> Tensor:
    """The scale as it is multiplied with a matrix of ``shape``."""
    outputs, channels = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.shape in ((outputs,), (outputs, 1)):
        return scale.reshape(outputs, 1)
    if packing.block is not None:
        high, wide = packing.block
        if scale.shape == (-(-outputs // high), -(-channels // wide)):  # rounded up
            rows_OY = scale.repeat_interleave(high, 0)[:outputs]
            return rows_OY.repeat_interleave(wide, 1)[:, :channels]
    raise ConfigError(
        f"{name} is {tuple(shape)} and its scale {tuple(scale.shape)}; must be one in all, one per "
        f"output, or one per block of {packing.block or 'a size that config.json says'}"
    )
