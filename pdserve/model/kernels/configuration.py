"""One way in which a kernel is launched: enough to compile it without a GPU and without tensors.

Triton compiles a kernel anew for every combination of argument types, of integers that are 1 or
multiples of 16, and of options. A ``Configuration`` names one such combination by example: the
arguments of a launch as they would be, with a dtype in place of each tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What weights and KV blocks may be made of."""

HEAD_DIMS = (64, 128, 256)
"""Of the families that we serve. The kernels take any power of two from 16 to 256."""

OPTIONS: Mapping[str, Any] = {"enable_fp_fusion": False}
"""Of every launch. The compiler must not fuse a multiplication and an addition where it likes: two
kernels that compute one thing could round differently. Where fusing pays, ``tl.fma`` says so."""


@dataclass(frozen=True, slots=True)
class Configuration:
    kernel: Any
    """The ``@triton.jit`` function."""

    name: str
    arguments: Mapping[str, torch.dtype | int | float]
    """By the kernel's own names. A dtype stands for a 16-byte aligned tensor of it."""

    constants: Mapping[str, Any]
    options: Mapping[str, int]
    """``num_warps``, ``num_stages``; besides ``OPTIONS``."""

    capability_min: int = 0
    """The first GPU generation that this is launched on."""
