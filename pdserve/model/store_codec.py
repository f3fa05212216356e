"""Whole blocks of KV in 8 bits, for a store: a plain pool's block packed, and unpacked again.

Keys have a scale per channel, since some channels of a key are large in every token; values have
one per token (KIVI, Liu et al. 2024, arXiv:2402.02750). That takes a block that is full and never
changes, as a store's are; a pool's are not, so its codes are others (``kv_codec``).

    of each layer and head: keys [T, D], their scales [D], values [T, D], their scales [T]

Scales are bfloat16: the largest magnitude over the largest code. With int8 a number is off by half
a step of its scale at most; with fp8 (e4m3) by a sixteenth of itself, or half its smallest step.
What is unpacked is not what was packed: KV that has been through here gives other bits than KV
that was computed, so it must not carry a key that promises those (ADR 23).

Shape letters as in ``pool.py``; E bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.model.kv_codec import SCALE_DTYPE, decoded, encoded, is_coded


@dataclass(frozen=True, slots=True)
class BlockCodec:
    """Packs blocks of one shape: ``plain`` numbers into codes of dtype ``code``, and scales."""

    layer_count: int
    kv_head_count: int
    block_tokens: int
    head_dim: int
    plain: torch.dtype
    code: torch.dtype

    def __post_init__(self) -> None:
        assert is_coded(self.code), f"{self.code} is no dtype of codes"
        assert not is_coded(self.plain), f"{self.plain} is coded already"

    @property
    def plain_bytes(self) -> int:
        return self._head_count * 2 * self._head_codes * self.plain.itemsize

    @property
    def packed_bytes(self) -> int:
        return self._head_count * sum(self._parts)

    def pack(self, plain: memoryview, out: memoryview) -> None:
        """``plain`` and ``out`` have exactly ``plain_bytes`` and ``packed_bytes``."""
        keys_LGTD, values_LGTD = self._plain(plain).unbind(1)
        keys_LGDT, key_scales_LGD = encoded(keys_LGTD.transpose(2, 3), self.code)
        codes_LGTD, value_scales_LGT = encoded(values_LGTD, self.code)
        parts = (keys_LGDT.transpose(2, 3), key_scales_LGD, codes_LGTD, value_scales_LGT)
        for into_LGE, part in zip(self._split(out), parts, strict=True):
            into_LGE.copy_(part.contiguous().view(torch.uint8).flatten(2))

    def unpack(self, packed: memoryview, out: memoryview) -> None:
        """The other way; numbers are rounded to ``plain``."""
        self._plain(out).copy_(self.unpacked(packed))

    def unpacked(self, packed: memoryview) -> Tensor:
        """What stands there, in float32: [L, 2, G, T, D]."""
        keys_LGE, key_scales_LGE, codes_LGE, value_scales_LGE = map(
            Tensor.contiguous, self._split(packed)
        )
        sizes = (*keys_LGE.shape[:2], self.block_tokens, self.head_dim)
        keys_LGTD = keys_LGE.view(self.code).view(sizes)
        codes_LGTD = codes_LGE.view(self.code).view(sizes)
        plain_LGDT = decoded(keys_LGTD.transpose(2, 3), key_scales_LGE.view(SCALE_DTYPE))
        values_LGTD = decoded(codes_LGTD, value_scales_LGE.view(SCALE_DTYPE))
        return torch.stack((plain_LGDT.transpose(2, 3), values_LGTD), dim=1)

    @property
    def _head_count(self) -> int:
        return self.layer_count * self.kv_head_count

    @property
    def _head_codes(self) -> int:
        return self.block_tokens * self.head_dim

    @property
    def _parts(self) -> tuple[int, int, int, int]:
        """Bytes of one head: keys, their scales, values, their scales."""
        scale_bytes = SCALE_DTYPE.itemsize
        scales = self.head_dim * scale_bytes, self.block_tokens * scale_bytes
        return self._head_codes, scales[0], self._head_codes, scales[1]

    def _plain(self, block: memoryview) -> Tensor:
        assert block.nbytes == self.plain_bytes, f"{block.nbytes} bytes of {self.plain_bytes}"
        heads = (self.layer_count, 2, self.kv_head_count)
        sizes = (self.block_tokens, self.head_dim)
        return torch.frombuffer(block, dtype=self.plain).view(*heads, *sizes)

    def _split(self, packed: memoryview) -> tuple[Tensor, ...]:
        assert packed.nbytes == self.packed_bytes, f"{packed.nbytes} bytes of {self.packed_bytes}"
        if packed.readonly:  # a store's own memory, which torch wants to be able to change
            packed = memoryview(bytearray(packed))
        bytes_LGE = torch.frombuffer(packed, dtype=torch.uint8)
        heads_LGE = bytes_LGE.view(self.layer_count, self.kv_head_count, -1)
        return torch.split(heads_LGE, list(self._parts), dim=2)
