"""Blocks of a GPU's pool packed there on their way out, and unpacked on their way in.

Kernels go between the copies of a move and in their order, on the same stream: a packed block is
copied when it is there, and its row is taken by the next one when that has been copied.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pdserve.model.kernels.store_blocks import pack_blocks, unpack_blocks
from pdserve.model.pool import KvPool, Places
from pdserve.model.store_codec import BlockCodec
from pdserve.model.transfers import Transfers

ROWS_MAX = 64
"""Packed blocks on a GPU at a time; those of a larger move take turns. 64 MiB of blocks that have
2 MiB in the pool."""


class PackedOnDevice:
    def __init__(self, pool: KvPool, codec: BlockCodec, transfers: Transfers) -> None:
        """``transfers``: the pool's."""
        self._pool = pool
        self._codec = codec
        self._transfers = transfers
        self._layers = range(codec.layer_count)
        self.block_bytes = codec.packed_bytes
        self.layer_bytes = self.block_bytes // codec.layer_count
        self._rows_E = torch.empty(0, dtype=torch.uint8)
        self._entering: list[int] = []  # blocks whose bytes are on their way to the first rows

    def read_block(self, block: int, out: memoryview) -> None:
        """Pack ``block`` into ``out``, which must hold exactly ``block_bytes``."""
        self._read(block, self._layers, out)

    def await_layers(self, done: Any) -> None:
        self._pool.await_layers(done)

    def read_layers(self, block: int, first: int, end: int, out: memoryview) -> None:
        """Pack layers ``first:end`` of ``block`` into ``out``, ``layer_bytes`` for each."""
        self._read(block, range(first, end), out)

    def write_block(self, block: int, data: memoryview) -> None:
        """Unpack ``data``, exactly ``block_bytes`` long, into ``block``."""
        self._pool.check(block, data, self.block_bytes)
        row_J = self._rows(ROWS_MAX, self._layers)[len(self._entering)]
        self._transfers.write(data, row_J)
        self._entering.append(block)
        if not self._transfers.writes_late:
            self._unpack()
            self._transfers.copies.finish()
        elif len(self._entering) == ROWS_MAX:
            self._unpack()

    def pin(self, memory: Callable[[], Sequence[memoryview]]) -> None:
        self._pool.pin(memory)

    def unpin(self) -> None:
        self._pool.unpin()

    @contextlib.contextmanager
    def reading(self, places: Places, layers: range | None = None) -> Iterator[None]:
        layers = layers or self._layers
        direct = [place for place in places if self._transfers.is_direct(place[1])]
        with self._transfers.reading():
            for start in range(0, len(direct), ROWS_MAX):
                some = direct[start : start + ROWS_MAX]
                rows_SJ = self._packed([block for block, _ in some], layers)
                for row_J, (_, out) in zip(rows_SJ, some, strict=True):
                    self._transfers.begin(row_J, out)
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        with self._transfers.writing():
            try:
                yield
            finally:
                self._unpack()

    def _read(self, block: int, layers: range, out: memoryview) -> None:
        self._pool.check(block, out, len(layers) * self.layer_bytes)
        if not self._transfers.has_come(out):
            self._transfers.read(self._packed([block], layers)[0], out)

    def _packed(self, blocks: Sequence[int], layers: range) -> Tensor:
        """Where they are when the kernel, launched here, is done: [S, J]."""
        rows_SJ = self._rows(len(blocks), layers)
        pool = self._pool.tensor
        self._transfers.copies.launch(
            lambda: pack_blocks(pool, self._ids(blocks), layers, self._codec.code, rows_SJ)
        )
        return rows_SJ

    def _unpack(self) -> None:
        blocks, self._entering = self._entering, []
        if not blocks:
            return
        rows_SJ, pool = self._rows(len(blocks), self._layers), self._pool.tensor
        self._transfers.copies.launch(
            lambda: unpack_blocks(rows_SJ, self._codec.code, self._ids(blocks), pool)
        )

    def _rows(self, count: int, layers: range) -> Tensor:
        """The first of them; who is given them next waits on the stream, not here."""
        if not len(self._rows_E):
            self._rows_E = torch.empty(
                ROWS_MAX * self.block_bytes, dtype=torch.uint8, device=self._pool.tensor.device
            )
        size = len(layers) * self.layer_bytes
        return self._rows_E[: count * size].view(count, size)

    def _ids(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int32, device=self._pool.tensor.device)
