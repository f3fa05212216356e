"""Memory that a GPU copies from and to by itself: pages that its driver has locked.

What is elsewhere goes through a small buffer of such pages, and once more through the CPU. A
store's arena is locked where a process has it mapped, once for each mapping, so that blocks go
between it and the pool in one copy.
"""

import logging
from bisect import bisect_right, insort
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

_PORTABLE = 1  # for all contexts of the process
_READ_ONLY = 8  # the mapping cannot be written, and will not be


class Pages(Protocol):
    """What locks them."""

    def lock(self, address: int, size: int, *, writable: bool) -> None:
        """Raises RuntimeError where the driver does not do it."""
        ...

    def unlock(self, address: int) -> None: ...


class CudaPages(Pages):
    """By ``cudaHostRegister``, which also brings in pages that nobody has touched yet: about a
    second for every few GB."""

    def lock(self, address: int, size: int, *, writable: bool) -> None:
        flags = _PORTABLE if writable else _PORTABLE | _READ_ONLY
        code = torch.cuda.cudart().cudaHostRegister(address, size, flags)  # type: ignore[no-untyped-call]
        if int(code):
            raise RuntimeError(f"cudaHostRegister of {size} bytes says {code}")

    def unlock(self, address: int) -> None:
        code = torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        if int(code):
            log.warning("cudaHostUnregister says %s", code)


class PinnedMemory:
    """Stretches that are locked; what is behind them is not unmapped before ``remove``."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._starts: list[int] = []
        self._bytes: dict[int, Tensor] = {}  # by where they begin

    def add(self, memory: memoryview) -> bool:
        """False where it cannot be locked: then it is used like any other memory."""
        start, size = address_of(memory), memory.nbytes
        try:
            self._pages.lock(start, size, writable=not memory.readonly)
        except RuntimeError as error:
            log.warning("blocks are copied twice on their way: %s", error)
            return False
        self._bytes[start] = _as_tensor(memory)
        insort(self._starts, start)
        return True

    def remove(self) -> None:
        """All of it. No copy may be under way."""
        for start in self._starts:
            self._pages.unlock(start)
        self._starts.clear()
        self._bytes.clear()

    def tensor_of(self, view: memoryview) -> Tensor | None:
        """The same bytes, where they lie in one locked stretch."""
        address = address_of(view)
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        start = self._starts[index]
        memory_E = self._bytes[start]
        offset = address - start
        if offset + view.nbytes > len(memory_E):
            return None
        return memory_E[offset : offset + view.nbytes]


def address_of(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _as_tensor(memory: memoryview) -> Tensor:
    array = np.frombuffer(memory, np.uint8)
    if not array.flags.writeable:
        # torch knows no tensor that cannot be written, and warns. Nothing writes this one.
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        array = np.asarray(_Behind(interface, memory))
    return torch.from_numpy(array)


class _Behind:
    """Somebody else's memory, as numpy takes it; keeps it."""

    def __init__(self, interface: dict[str, object], memory: memoryview) -> None:
        self.__array_interface__ = interface
        self._memory = memory
