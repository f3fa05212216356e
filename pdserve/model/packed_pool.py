"""A pool whose blocks leave it packed in 8 bits, and are unpacked as they enter (``store_codec``).

For a mover and nobody else: steps compute with the plain pool behind it. A packed block has its
layers in order, each in one piece, so it leaves by layers as a plain one does.

Blocks on a GPU are packed there, so that half of the bytes go over the bus; those of a model that
is split over several processes are packed where they are put together, on the CPU.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pdserve.model.architecture import Architecture
from pdserve.model.pool import Direct, KvPool, Pool
from pdserve.model.store_codec import BlockCodec

if TYPE_CHECKING:
    from pdserve.model.packed_on_device import PackedOnDevice

CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""By the names of ``store.codec``."""


def packed_pool(
    pool: Pool, architecture: Architecture, codec: str
) -> "PackedPool | PackedOnDevice":
    """``codec``: of ``CODE_DTYPES``. The numbers of ``pool`` must be plain ones."""
    packing = BlockCodec(
        layer_count=architecture.layer_count,
        kv_head_count=architecture.kv_head_count,
        block_tokens=pool.block_tokens,
        head_dim=architecture.head_dim,
        plain=pool.tensor.dtype,
        code=CODE_DTYPES[codec],
    )
    is_power = architecture.head_dim.bit_count() == 1
    if isinstance(pool, KvPool) and pool.transfers is not None and is_power:
        # Not before: Triton is not everywhere, and decides at its import how it runs.
        from pdserve.model.packed_on_device import PackedOnDevice

        return PackedOnDevice(pool, packing, pool.transfers)
    return PackedPool(pool, packing)


class PackedPool(Direct):
    """By the CPU."""

    def __init__(self, pool: Pool, codec: BlockCodec) -> None:
        """``codec``: of whole blocks of ``pool``."""
        self._pool = pool
        self._whole = codec
        self.block_bytes = codec.packed_bytes
        self.layer_bytes = self.block_bytes // codec.layer_count

    def read_block(self, block: int, out: memoryview) -> None:
        """Pack ``block`` into ``out``, which must hold exactly ``block_bytes``."""
        plain = memoryview(bytearray(self._pool.block_bytes))
        self._pool.read_block(block, plain)
        self._whole.pack(plain, out)

    def await_layers(self, done: Any) -> None:
        self._pool.await_layers(done)

    def read_layers(self, block: int, first: int, end: int, out: memoryview) -> None:
        """Pack layers ``first:end`` of ``block`` into ``out``, ``layer_bytes`` for each."""
        codec = replace(self._whole, layer_count=end - first)
        plain = memoryview(bytearray(codec.plain_bytes))
        self._pool.read_layers(block, first, end, plain)
        codec.pack(plain, out)

    def write_block(self, block: int, data: memoryview) -> None:
        """Unpack ``data``, exactly ``block_bytes`` long, into ``block``."""
        plain = memoryview(bytearray(self._pool.block_bytes))
        self._whole.unpack(data, plain)
        self._pool.write_block(block, plain)
