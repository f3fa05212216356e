"""The paged KV cache of one worker: one tensor, cut into blocks that are single pieces of memory.

Shape letters: P blocks, L layers, 2 (keys, values), G key/value heads, T tokens of a block,
D channels of a head. ``pool[block]`` is contiguous, so a block leaves and enters as ``block_bytes``
bytes, exact to the bit. Who holds which block is decided elsewhere; nothing here counts references.
"""

import math
import threading
from typing import Any

import numpy as np
import torch

from pdserve.model.architecture import Architecture

ByteArray = np.ndarray[Any, np.dtype[np.uint8]]

LAYOUT = "layer,kv,head,token,dim/1"
"""Name and version of the order of bytes in a block; part of what blocks must agree on."""


def block_shape(architecture: Architecture, block_tokens: int) -> tuple[int, int, int, int, int]:
    return (
        architecture.layer_count,
        2,
        architecture.kv_head_count,
        block_tokens,
        architecture.head_dim,
    )


def block_bytes(architecture: Architecture, block_tokens: int, dtype: torch.dtype) -> int:
    return math.prod(block_shape(architecture, block_tokens)) * dtype.itemsize


class KvPool:
    def __init__(
        self,
        architecture: Architecture,
        *,
        block_count: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if block_count < 1:
            raise ValueError(f"block_count is {block_count}, must be positive")
        self.block_count = block_count
        self.block_tokens = block_tokens
        self.block_bytes = block_bytes(architecture, block_tokens, dtype)
        # Zeros: memory is taken page by page as blocks are first written, and a masked token that
        # was never written is 0, not a NaN that survives being multiplied by 0.
        self.tensor = torch.zeros(
            (block_count, *block_shape(architecture, block_tokens)), dtype=dtype, device=device
        )
        self._bytes_PE = self.tensor.view(block_count, -1).view(torch.uint8)
        self._staging_lock = threading.Lock()
        self._staging_E = (
            None
            if device.type == "cpu"
            else torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=True)
        )

    def read_block(self, block: int, out: memoryview) -> None:
        """Copy the bytes of ``block`` to ``out``, which must hold exactly ``block_bytes``."""
        target = self._as_array(block, out)
        if self._staging_E is None:
            np.copyto(target, self._bytes_PE[block].numpy())
            return
        with self._staging_lock:
            self._staging_E.copy_(self._bytes_PE[block])
            np.copyto(target, self._staging_E.numpy())

    def write_block(self, block: int, data: memoryview) -> None:
        """Make ``data``, exactly ``block_bytes`` long, the bytes of ``block``."""
        source = self._as_array(block, data)
        if self._staging_E is None:
            np.copyto(self._bytes_PE[block].numpy(), source)
            return
        with self._staging_lock:
            np.copyto(self._staging_E.numpy(), source)
            self._bytes_PE[block].copy_(self._staging_E)

    def copy_block(self, source: int, target: int) -> None:
        self._check(source)
        self._check(target)
        self.tensor[target].copy_(self.tensor[source])

    def _as_array(self, block: int, buffer: memoryview) -> ByteArray:
        self._check(block)
        if buffer.nbytes != self.block_bytes:
            raise ValueError(f"the buffer has {buffer.nbytes} bytes, a block {self.block_bytes}")
        return np.frombuffer(buffer, dtype=np.uint8)

    def _check(self, block: int) -> None:
        if not 0 <= block < self.block_count:
            raise ValueError(f"block {block} is not in a pool of {self.block_count}")
