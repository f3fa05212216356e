"""A pool whose blocks leave it packed in 8 bits, and are unpacked as they enter (``store_codec``).

For a mover and nobody else: steps compute with the plain pool behind it. A packed block has its
layers in order, each in one piece, so it leaves by layers as a plain one does.
"""

from typing import Any

import torch

from pdserve.model.architecture import Architecture
from pdserve.model.pool import Direct, Pool
from pdserve.model.store_codec import BlockCodec

CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""By the names of ``store.codec``."""


class PackedPool(Direct):
    def __init__(self, pool: Pool, architecture: Architecture, codec: str) -> None:
        """``codec``: of ``CODE_DTYPES``. The numbers of ``pool`` must be plain ones."""
        self._pool = pool
        self._architecture = architecture
        self._code = CODE_DTYPES[codec]
        self._layer_count = architecture.layer_count
        self._whole = self._codec_of(self._layer_count)
        self.block_bytes = self._whole.packed_bytes
        self.layer_bytes = self.block_bytes // self._layer_count

    def read_block(self, block: int, out: memoryview) -> None:
        """Pack ``block`` into ``out``, which must hold exactly ``block_bytes``."""
        plain = memoryview(bytearray(self._pool.block_bytes))
        self._pool.read_block(block, plain)
        self._whole.pack(plain, out)

    def await_layers(self, done: Any) -> None:
        self._pool.await_layers(done)

    def read_layers(self, block: int, first: int, end: int, out: memoryview) -> None:
        """Pack layers ``first:end`` of ``block`` into ``out``, ``layer_bytes`` for each."""
        codec = self._codec_of(end - first)
        plain = memoryview(bytearray(codec.plain_bytes))
        self._pool.read_layers(block, first, end, plain)
        codec.pack(plain, out)

    def write_block(self, block: int, data: memoryview) -> None:
        """Unpack ``data``, exactly ``block_bytes`` long, into ``block``."""
        plain = memoryview(bytearray(self._pool.block_bytes))
        self._whole.unpack(data, plain)
        self._pool.write_block(block, plain)

    def _codec_of(self, layer_count: int) -> BlockCodec:
        architecture = self._architecture
        return BlockCodec(
            layer_count=layer_count,
            kv_head_count=architecture.kv_head_count,
            block_tokens=self._pool.block_tokens,
            head_dim=architecture.head_dim,
            plain=self._pool.tensor.dtype,
            code=self._code,
        )
