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
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pdserve.model.architecture import Architecture
from pdserve.model.copies import Copies, CudaCopies
from pdserve.model.kv_codec import head_bytes
from pdserve.model.pinned import CudaPages, PinnedMemory, address_of

ByteArray = np.ndarray[Any, np.dtype[np.uint8]]

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
        self._staging_lock = threading.Lock()
        self._copies = copies
        self._pinned = pinned or PinnedMemory(CudaPages())
        if device.type == "cuda" and copies is None:
            self._copies = CudaCopies(device)
        self._staging_E = torch.empty(0, dtype=torch.uint8)
        if self._copies is not None:
            on_gpu = device.type == "cuda"
            self._staging_E = torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._begun: dict[int, Any] = {}  # marks of copies to the host, by where they go
        self._writes_late = False

    @property
    def scratch_block(self) -> int:
        """Where rows that only pad a batch put their KV: nobody is given it, nobody reads it."""
        assert len(self.tensor) > self.block_count, "the pool was made without a scratch block"
        return self.block_count

    def read_block(self, block: int, out: memoryview) -> None:
        """Copy the bytes of ``block`` to ``out``, which must hold exactly ``block_bytes``.

        On a GPU the step that wrote them must be done: steps under way are not waited for.
        """
        target = self._as_array(block, out)
        self._read(self._bytes_PE[block], target)

    def await_layers(self, done: Any) -> None:
        """Copies from now on happen after ``done`` (``ops.LayersTold``)."""
        if done is not None:
            assert self._copies is not None, "there are no steps under way on a CPU"
            self._copies.after(done)

    def read_layers(self, block: int, first: int, end: int, out: memoryview) -> None:
        """Copy the bytes of layers ``first:end`` of ``block``, one piece of it, to ``out``, which
        must hold exactly ``layer_bytes`` for each."""
        self._check(block)
        part = slice(first * self.layer_bytes, end * self.layer_bytes)
        if not 0 <= part.start <= part.stop <= self.block_bytes:
            raise ValueError(f"layers {first} to {end} of {self.block_bytes // self.layer_bytes}")
        if out.nbytes != part.stop - part.start:
            raise ValueError(f"the buffer has {out.nbytes} bytes, not {part.stop - part.start}")
        self._read(self._bytes_PE[block, part], np.frombuffer(out, dtype=np.uint8))

    def write_block(self, block: int, data: memoryview) -> None:
        """Make ``data``, exactly ``block_bytes`` long, the bytes of ``block``.

        On a GPU after all steps launched so far: one of them may still write, for a sequence that
        is gone, where this block was its own (``EngineLoop``, a step in flight).
        """
        source = self._as_array(block, data)
        if self._copies is None:
            np.copyto(self._bytes_PE[block].numpy(), source)
            return
        direct_E = self._pinned.tensor_of(data)
        if direct_E is not None:
            self._copies.after_steps()
            self._copies.start(self._bytes_PE[block], direct_E)
            if not self._writes_late:
                self._copies.finish()
            return
        with self._staging_lock:
            np.copyto(self._staging_E.numpy(), source)
            self._copies.after_steps()
            self._copies.start(self._bytes_PE[block], self._staging_E)
            self._copies.finish()

    def copy_block(self, source: int, target: int) -> None:
        self._check(source)
        self._check(target)
        self._bytes_PE[target].copy_(self._bytes_PE[source])

    def pin(self, memory: Callable[[], Sequence[memoryview]]) -> None:
        if self._copies is not None:
            for stretch in memory():
                self._pinned.add(stretch)

    def unpin(self) -> None:
        if self._copies is not None:
            self._copies.finish()
            self._pinned.remove()

    @contextlib.contextmanager
    def reading(self, places: Places, layers: range | None = None) -> Iterator[None]:
        copies = self._copies
        if copies is None:
            yield
            return
        part = slice(None)
        if layers is not None:
            part = slice(layers.start * self.layer_bytes, layers.stop * self.layer_bytes)
        try:
            for block, out in places:
                direct_E = self._pinned.tensor_of(out)
                if direct_E is None:
                    continue  # it is copied when it is read
                self._check(block)
                copies.start(direct_E, self._bytes_PE[block, part])
                self._begun[address_of(out)] = copies.mark()
            yield
        finally:
            copies.finish()  # whoever has the memory next must find nobody writing there
            self._begun.clear()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        if self._copies is None:
            yield
            return
        self._writes_late = True
        try:
            yield
        finally:
            self._writes_late = False
            self._copies.finish()

    def _read(self, bytes_E: Tensor, target: ByteArray) -> None:
        copies = self._copies
        if copies is None:
            np.copyto(target, bytes_E.numpy())
            return
        begun = self._begun.pop(int(target.ctypes.data), None)
        if begun is not None:
            copies.wait(begun)
            return
        direct_E = self._pinned.tensor_of(target.data)
        if direct_E is not None:
            copies.start(direct_E, bytes_E)
            copies.finish()
            return
        with self._staging_lock:
            staging_E = self._staging_E[: len(bytes_E)]
            copies.start(staging_E, bytes_E)
            copies.finish()
            np.copyto(target, staging_E.numpy())

    def _as_array(self, block: int, buffer: memoryview) -> ByteArray:
        self._check(block)
        if buffer.nbytes != self.block_bytes:
            raise ValueError(f"the buffer has {buffer.nbytes} bytes, a block {self.block_bytes}")
        return np.frombuffer(buffer, dtype=np.uint8)

    def _check(self, block: int) -> None:
        if not 0 <= block < self.block_count:
            raise ValueError(f"block {block} is not in a pool of {self.block_count}")
