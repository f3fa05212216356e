"""The paged KV cache of one worker: one tensor, cut into blocks that are single pieces of memory.

Shape letters: P blocks, L layers, 2 (keys, values), G key/value heads, T tokens of a block,
D channels of a head. A block is one piece of memory, so it leaves and enters as ``block_bytes``
bytes, exact to the bit; in 8 bits, scales lie between its heads (``kv_codec``). Who holds which
block is decided elsewhere; nothing here counts references.

On a GPU blocks go to and from the host's memory by copies that somebody must wait for. Where that
memory is a store's arena that was ``pin``ned they go there at once, many at a time if they are
begun together (``reading``, ``writing``); elsewhere one by one through a buffer in between.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pdserve.model.architecture import Architecture
from pdserve.model.copies import Copies, CudaCopies
from pdserve.model.kv_codec import head_bytes
from pdserve.model.pinned import CudaPages, PinnedMemory
from pdserve.model.transfers import Transfers

LAYOUT = "layer,kv,head,token,dim/1"
"""Name and version of the order of bytes in a block; part of what blocks must agree on."""


def block_bytes(architecture: Architecture, block_tokens: int, dtype: torch.dtype) -> int:
    """``dtype``: of the pool; with one of 8 bits, scales count too."""
    heads = architecture.layer_count * 2 * architecture.kv_head_count
    return heads * head_bytes(block_tokens, architecture.head_dim, dtype)


Places = Sequence[tuple[int, memoryview]]
"""Blocks, and where their bytes go."""


class Direct:
    """What a pool does with a store's memory. Here: nothing, its bytes come and go otherwise."""

    def pin(self, memory: Callable[[], Sequence[memoryview]]) -> None:
        """A store's arena, as this process has it mapped, is what blocks are copied from and to
        until ``unpin``."""

    def unpin(self) -> None: ...

    def reading(
        self,
        places: Places,  # noqa: ARG002
        layers: range | None = None,  # noqa: ARG002
    ) -> AbstractContextManager[None]:
        """Within, ``read_block`` of these (with ``layers``: ``read_layers``) waits for copies that
        began together. When it ends, however it does, none of them is under way."""
        return contextlib.nullcontext()

    def writing(self) -> AbstractContextManager[None]:
        """Within, ``write_block`` may return before the bytes are there: they must stay where they
        are. When it ends, however it does, they are there."""
        return contextlib.nullcontext()


class Pool(Protocol):
    """What steps and moves need of a pool: a ``KvPool``, or one that several processes share
    (``parallel.pool``)."""

    tensor: Tensor
    block_count: int
    block_tokens: int
    block_bytes: int
    layer_bytes: int  # of one layer in a block

    def read_block(self, block: int, out: memoryview) -> None: ...
    def await_layers(self, done: Any) -> None: ...
    def read_layers(self, block: int, first: int, end: int, out: memoryview) -> None: ...
    def write_block(self, block: int, data: memoryview) -> None: ...
    def copy_block(self, source: int, target: int) -> None: ...
    def pin(self, memory: Callable[[], Sequence[memoryview]]) -> None: ...
    def unpin(self) -> None: ...
    def reading(
        self, places: Places, layers: range | None = None
    ) -> AbstractContextManager[None]: ...
    def writing(self) -> AbstractContextManager[None]: ...


class KvPool(Direct):
    def __init__(
        self,
        architecture: Architecture,
        *,
        block_count: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        scratch: bool = False,
        copies: Copies | None = None,
        pinned: PinnedMemory | None = None,
    ) -> None:
        """With ``scratch`` there is one more block than ``block_count`` says: see
        ``scratch_block``. ``copies``, ``pinned``: of a GPU by default, of a CPU none."""
        if block_count < 1:
            raise ValueError(f"block_count is {block_count}, must be positive")
        self.block_count = block_count
        self.block_tokens = block_tokens
        self.block_bytes = block_bytes(architecture, block_tokens, dtype)
        self.layer_bytes = self.block_bytes // architecture.layer_count
        # Zeros: memory is taken page by page as blocks are first written, and a masked token that
        # was never written is 0, not a NaN that survives being multiplied by 0.
        rows = block_count + scratch
        self._bytes_PE = torch.zeros((rows, self.block_bytes), dtype=torch.uint8, device=device)
        sizes = (rows, architecture.layer_count, 2, architecture.kv_head_count)
        head_dim = architecture.head_dim
        # What else a head has are scales.
        codes_PL2GE = self._bytes_PE.view(dtype).view(*sizes, -1)[..., : block_tokens * head_dim]
        self.tensor = codes_PL2GE.view(*sizes, block_tokens, head_dim)
        on_gpu = device.type == "cuda"
        if copies is None and on_gpu:
            copies = CudaCopies(device)
        self.transfers: Transfers | None = None
        """None on a CPU: blocks are simply copied."""
        if copies is not None:
            pinned = pinned or PinnedMemory(CudaPages())
            self.transfers = Transfers(copies, pinned, self.block_bytes, on_gpu=on_gpu)

    @property
    def scratch_block(self) -> int:
        """Where rows that only pad a batch put their KV: nobody is given it, nobody reads it."""
        assert len(self.tensor) > self.block_count, "the pool was made without a scratch block"
        return self.block_count

    def read_block(self, block: int, out: memoryview) -> None:
        """Copy the bytes of ``block`` to ``out``, which must hold exactly ``block_bytes``.

        On a GPU the step that wrote them must be done: steps under way are not waited for.
        """
        self.check(block, out, self.block_bytes)
        self._read(self._bytes_PE[block], out)

    def await_layers(self, done: Any) -> None:
        """Copies from now on happen after ``done`` (``ops.LayersTold``)."""
        if done is not None:
            assert self.transfers is not None, "there are no steps under way on a CPU"
            self.transfers.copies.after(done)

    def read_layers(self, block: int, first: int, end: int, out: memoryview) -> None:
        """Copy the bytes of layers ``first:end`` of ``block``, one piece of it, to ``out``, which
        must hold exactly ``layer_bytes`` for each."""
        self._check(block)
        part = slice(first * self.layer_bytes, end * self.layer_bytes)
        if not 0 <= part.start <= part.stop <= self.block_bytes:
            raise ValueError(f"layers {first} to {end} of {self.block_bytes // self.layer_bytes}")
        self.check(block, out, part.stop - part.start)
        self._read(self._bytes_PE[block, part], out)

    def write_block(self, block: int, data: memoryview) -> None:
        """Make ``data``, exactly ``block_bytes`` long, the bytes of ``block``.

        On a GPU after all steps launched so far: one of them may still write, for a sequence that
        is gone, where this block was its own (``EngineLoop``, a step in flight).
        """
        self.check(block, data, self.block_bytes)
        if self.transfers is not None:
            self.transfers.write(data, self._bytes_PE[block])
        else:
            np.copyto(self._bytes_PE[block].numpy(), np.frombuffer(data, dtype=np.uint8))

    def copy_block(self, source: int, target: int) -> None:
        self._check(source)
        self._check(target)
        self._bytes_PE[target].copy_(self._bytes_PE[source])

    def pin(self, memory: Callable[[], Sequence[memoryview]]) -> None:
        if self.transfers is not None:
            self.transfers.pin(memory)

    def unpin(self) -> None:
        if self.transfers is not None:
            self.transfers.unpin()

    @contextlib.contextmanager
    def reading(self, places: Places, layers: range | None = None) -> Iterator[None]:
        if self.transfers is None:
            yield
            return
        part = slice(None)
        if layers is not None:
            part = slice(layers.start * self.layer_bytes, layers.stop * self.layer_bytes)
        with self.transfers.reading():
            for block, out in places:
                self._check(block)
                self.transfers.begin(self._bytes_PE[block, part], out)
            yield

    def writing(self) -> AbstractContextManager[None]:
        return super().writing() if self.transfers is None else self.transfers.writing()

    def _read(self, bytes_E: Tensor, out: memoryview) -> None:
        if self.transfers is None:
            np.copyto(np.frombuffer(out, dtype=np.uint8), bytes_E.numpy())
        elif not self.transfers.has_come(out):
            self.transfers.read(bytes_E, out)

    def check(self, block: int, buffer: memoryview, size: int) -> None:
        """Raises ValueError for a block that is not in the pool, or a buffer of another size."""
        self._check(block)
        if buffer.nbytes != size:
            raise ValueError(f"the buffer has {buffer.nbytes} bytes, not {size}")

    def _check(self, block: int) -> None:
        if not 0 <= block < self.block_count:
            raise ValueError(f"block {block} is not in a pool of {self.block_count}")
