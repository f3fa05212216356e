"""A pool of codes for tests of kernels: what ``KvPool`` shows, without an architecture."""

import torch
from torch import Tensor

from pdserve.model.kv_codec import head_bytes


def coded_pool(P: int, L: int, G: int, T: int, D: int, dtype: torch.dtype) -> Tensor:
    """[P, L, 2, G, T, D], with room for scales, all zero."""
    bytes_PL2GE = torch.zeros(P, L, 2, G, head_bytes(T, D, dtype), dtype=torch.uint8)
    return bytes_PL2GE.view(dtype)[..., : T * D].view(P, L, 2, G, T, D)
