"""Bytes of a GPU, to the host's memory and back, for what holds blocks there (``pool``,
``packed_pool``).

What goes to or comes from memory that the driver has locked (``pinned``) goes there at once, many
pieces at a time if they are begun together; what lies elsewhere goes one by one, through a buffer
of locked memory in between.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdserve.model.copies import Copies
from pdserve.model.pinned import PinnedMemory, address_of


class Transfers:
    def __init__(self, copies: Copies, pinned: PinnedMemory, largest: int, *, on_gpu: bool) -> None:
        """``largest``: bytes of one piece, at most."""
        self.copies = copies
        self._pinned = pinned
        self._lock = threading.Lock()
        self._staging_E = torch.empty(largest, dtype=torch.uint8, pin_memory=on_gpu)
        self._begun: dict[int, Any] = {}  # marks of copies to the host, by where they go
        self.writes_late = False

    def pin(self, memory: Callable[[], Sequence[memoryview]]) -> None:
        for stretch in memory():
            self._pinned.add(stretch)

    def unpin(self) -> None:
        self.copies.finish()
        self._pinned.remove()

    def is_direct(self, memory: memoryview) -> bool:
        return self._pinned.tensor_of(memory) is not None

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around ``begin`` and the reads that wait for it. When it ends, however it does, nothing
        is written to the host any more."""
        try:
            yield
        finally:
            self.copies.finish()  # whoever has the memory next must find nobody writing there
            self._begun.clear()

    def begin(self, bytes_E: Tensor, out: memoryview) -> None:
        """Nothing happens where ``out`` is not direct: it is copied when it is read."""
        direct_E = self._pinned.tensor_of(out)
        if direct_E is not None:
            self.copies.start(direct_E, bytes_E)
            self._begun[address_of(out)] = self.copies.mark()

    def has_come(self, out: memoryview) -> bool:
        """Waits, where something was begun that goes there; False where nothing was."""
        begun = self._begun.pop(address_of(out), None)
        if begun is not None:
            self.copies.wait(begun)
        return begun is not None

    def read(self, bytes_E: Tensor, out: memoryview) -> None:
        direct_E = self._pinned.tensor_of(out)
        if direct_E is not None:
            self.copies.start(direct_E, bytes_E)
            self.copies.finish()
            return
        with self._lock:
            staging_E = self._staging_E[: len(bytes_E)]
            self.copies.start(staging_E, bytes_E)
            self.copies.finish()
            np.copyto(np.frombuffer(out, np.uint8), staging_E.numpy())

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Within, ``write`` may return before the bytes are there; they are when it ends."""
        self.writes_late = True
        try:
            yield
        finally:
            self.writes_late = False
            self.copies.finish()

    def write(self, data: memoryview, bytes_E: Tensor) -> None:
        """After all steps launched so far."""
        self.copies.after_steps()
        direct_E = self._pinned.tensor_of(data)
        if direct_E is not None:
            self.copies.start(bytes_E, direct_E)
            if not self.writes_late:
                self.copies.finish()
            return
        with self._lock:
            staging_E = self._staging_E[: len(bytes_E)]
            np.copyto(staging_E.numpy(), np.frombuffer(data, np.uint8))
            self.copies.start(bytes_E, staging_E)
            self.copies.finish()
