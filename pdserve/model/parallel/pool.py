"""The KV pool of a split model: whole blocks go in and out, each rank moves its own rectangles.

A part's share of a block is what a ``KvPool`` of that part holds: all layers, its key/value heads.
In the whole block it is the *rectangle* of that head group (``rectangles``). A rank has the blocks
of its first part first, then those of its second: one ``KvPool`` for all.

Ranks meet in a *staging* buffer of one block, which all of them have mapped: on its way out each
puts its rectangles there, and the first takes the block; on its way in the other way round. It is
the worker's own memory and no slot of a store: a rank that is late, after its first rank has died,
writes where nobody looks.
"""

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from pdserve.model.architecture import Architecture
from pdserve.model.parallel.parts import Split, part_of
from pdserve.model.parallel.rectangles import objects
from pdserve.model.pool import Direct, KvPool

ByteArray = np.ndarray[Any, np.dtype[np.uint8]]


class OtherRank(Protocol):
    """The shares of another rank. It answers with ``done``, so that several ranks may be at work at
    once; all may raise ``RankLost``."""

    def put(self, block: int, layers: range) -> None: ...
    def take(self, block: int) -> None: ...
    def copy(self, source: int, target: int) -> None: ...
    def done(self) -> None:
        """Returns when the last of these has happened."""
        ...


class PartedPool(Direct):
    """One rank's shares, as a pool of its own, and with ``others`` the whole."""

    def __init__(
        self,
        architecture: Architecture,
        split: Split,
        *,
        block_count: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        others: Sequence[OtherRank] = (),
        staging: memoryview | None = None,
    ) -> None:
        """``architecture`` is the whole model's; ``others`` are the ranks behind this one, which
        then is the first, in order. ``staging``, of a block at least, is the ranks' in common; None
        where there is one rank."""
        self._own = KvPool(
            part_of(architecture, split.part_count),
            block_count=block_count * split.parts_per_rank,
            block_tokens=block_tokens,
            dtype=dtype,
            device=device,
        )
        self.tensor = self._own.tensor
        self.block_count = block_count
        self.block_tokens = block_tokens
        self.block_bytes = self._own.block_bytes * split.part_count
        self.layer_bytes = self.block_bytes // architecture.layer_count
        self._layers = range(architecture.layer_count)
        self._split = split
        self._others = others
        self._lock = threading.Lock()  # whose block is in the staging buffer now
        staging = memoryview(bytearray(self.block_bytes)) if staging is None else staging
        self._staging = np.frombuffer(staging, dtype=np.uint8, count=self.block_bytes)
        self._share = memoryview(bytearray(self._own.block_bytes))

    def read_block(self, block: int, out: memoryview) -> None:
        """Copy the bytes of the whole ``block`` to ``out``, exactly ``block_bytes`` long."""
        self.read_layers(block, 0, self._layers.stop, out)

    def await_layers(self, done: Any) -> None:
        """All ranks have written what this one's event stands for: they met in the sum after it."""
        if done is not None:
            done.synchronize()

    def read_layers(self, block: int, first: int, end: int, out: memoryview) -> None:
        """Copy the bytes of layers ``first:end`` of the whole ``block`` to ``out``."""
        layers = range(first, end)
        target = self._checked(block, layers, out)
        with self._lock:
            for other in self._others:
                other.put(block, layers)
            self.put_shares(block, layers)
            for other in self._others:
                other.done()
            np.copyto(target, self._staging[: target.size])

    def write_block(self, block: int, data: memoryview) -> None:
        """Make ``data``, exactly ``block_bytes`` long, the bytes of the whole ``block``."""
        source = self._checked(block, self._layers, data)
        with self._lock:
            np.copyto(self._staging, source)
            for other in self._others:
                other.take(block)
            self.take_shares(block)
            for other in self._others:
                other.done()

    def copy_block(self, source: int, target: int) -> None:
        with self._lock:
            for other in self._others:
                other.copy(source, target)
            self.copy_shares(source, target)
            for other in self._others:
                other.done()

    def put_shares(self, block: int, layers: range) -> None:
        """This rank's rectangles of these layers of ``block`` go into the staging buffer."""
        piece = self._staging[: len(layers) * self.layer_bytes]
        share = self._share[: len(layers) * self._own.layer_bytes]
        for place, rectangle in zip(self._places(block), objects(self._split, layers), strict=True):
            self._own.read_layers(place, layers.start, layers.stop, share)
            bytes_XE = rectangle.of(piece)
            np.copyto(bytes_XE, np.frombuffer(share, np.uint8).reshape(bytes_XE.shape))

    def take_shares(self, block: int) -> None:
        """This rank's rectangles of the block in the staging buffer become those of ``block``."""
        share = np.frombuffer(self._share, np.uint8)
        rectangles = objects(self._split, self._layers)
        for place, rectangle in zip(self._places(block), rectangles, strict=True):
            bytes_XE = rectangle.of(self._staging)
            np.copyto(share.reshape(bytes_XE.shape), bytes_XE)
            self._own.write_block(place, self._share)

    def copy_shares(self, source: int, target: int) -> None:
        for before, after in zip(self._places(source), self._places(target), strict=True):
            self._own.copy_block(before, after)

    def _places(self, block: int) -> list[int]:
        """Where each part's share lies in this rank's own pool."""
        self._check(block)
        return [block + part * self.block_count for part in range(self._split.parts_per_rank)]

    def _checked(self, block: int, layers: range, buffer: memoryview) -> ByteArray:
        self._check(block)
        if not 0 <= layers.start <= layers.stop <= self._layers.stop:
            raise ValueError(f"layers {layers.start} to {layers.stop} of {self._layers.stop}")
        size = self.layer_bytes * len(layers)
        if buffer.nbytes != size:
            raise ValueError(f"the buffer has {buffer.nbytes} bytes, not {size}")
        return np.frombuffer(buffer, dtype=np.uint8)

    def _check(self, block: int) -> None:
        if not 0 <= block < self.block_count:
            raise ValueError(f"block {block} is not in a pool of {self.block_count}")
