"""Mooncake's Transfer Engine: one-sided reads of another process's registered memory.

Only *reads* are used, both ways: whoever's memory is written runs the transfer, and so knows when
it has ended. Nobody ever writes into memory whose owner may have moved on.

The engine has neither certificates nor permissions: who reaches its port reads and writes what is
registered. It is for networks in which every process is trusted, as one of RDMA fabrics is.

``pip install pdserve[mooncake]``; the wheel wants ``libibverbs1``, ``libnuma1`` and ``libcurl4`` of
the system, with TCP too.
"""

import contextlib
import functools
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pdserve.errors import ConfigError, StoreUnavailable

_SPIN_S = 0.0005
_NAP_S = 0.0002  # between two looks at a transfer that takes longer

_BUSY, _DONE, _FAILED = 0, 1, -1  # what the engine says; anything else leaves its end unknown


class OneSidedEngine:
    """One per process and address. Thread-safe, as the engine below it is."""

    def __init__(self, host: str) -> None:
        """``host``: an address under which the others reach this process.

        Raises:
            ConfigError: the engine is not installed, or does not start.
        """
        os.environ.setdefault("GLOG_minloglevel", "2")  # before it is loaded: it logs each call
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise ConfigError(
                f"store.mooncake: the Transfer Engine cannot be loaded ({error}); "
                "pip install pdserve[mooncake], or leave the setting out"
            ) from error
        self._engine: Any = TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", "tcp", ""):
            raise ConfigError(f"store.mooncake: the Transfer Engine does not start at {host}")
        self.segment = f"{host}:{self._engine.get_rpc_port()}"
        """What others call this process."""

    def register(self, address: int, size: int) -> None:
        if self._engine.register_memory(address, size):
            raise StoreUnavailable(f"the Transfer Engine does not take {size} bytes of memory")

    def unregister(self, address: int) -> None:
        self._engine.unregister_memory(address)

    def begin(self, segment: str, local: int, remote: int, size: int) -> int:
        """Start reading ``remote`` of another process into ``local``; its number.

        Raises:
            StoreUnavailable: that process cannot be reached; nothing has begun.
        """
        transfer: int = self._engine.batch_transfer_async_read(segment, [local], [remote], [size])
        if transfer == 0:
            raise StoreUnavailable(f"the Transfer Engine cannot reach {segment}")
        return transfer

    def has_ended(self, transfer: int) -> bool | None:
        """Whether all bytes came, once it has ended; None as long as bytes may come. To be asked
        no more when it has ended.

        A peer that died ends it at once, one that stalls after 30 s, when the engine drops the
        connection. An answer that leaves the end open counts as none: the memory stays taken.
        """
        status: int = self._engine.transfer_check_status(transfer)
        return {_DONE: True, _FAILED: False}.get(status)


@functools.cache
def engine_at(host: str) -> OneSidedEngine:
    return OneSidedEngine(host)


def wait_ended(
    engine: OneSidedEngine, transfers: Sequence[int], check: Callable[[], None]
) -> dict[int, bool]:
    """How each transfer ended. ``check`` is called while one has not, and may raise."""
    ended: dict[int, bool] = {}
    began_s = time.monotonic()
    for transfer in transfers:
        while (outcome := engine.has_ended(transfer)) is None:
            check()
            time.sleep(0 if time.monotonic() - began_s < _SPIN_S else _NAP_S)
        ended[transfer] = outcome
    return ended


_kept: list["Staging"] = []
"""Closed while bytes could still come or go: a transfer that found no memory would end us."""


class Staging:
    """Registered memory of a client, free to use while no transfer may touch it."""

    def __init__(self, engine: OneSidedEngine, size: int) -> None:
        self._map = mmap.mmap(-1, size)
        self._engine = engine
        self.view = memoryview(self._map)
        self.address = int(np.frombuffer(self._map, np.uint8).ctypes.data)
        self._open: set[int] = set()
        self._is_lent = False
        engine.register(self.address, size)

    def read(
        self, segment: str, pieces: Sequence[tuple[int, int, int]], check: Callable[[], None]
    ) -> None:
        """Each (offset here, address there, size). When ``check`` raises, bytes may still come.

        Raises:
            StoreUnavailable: some bytes did not come; all transfers have ended.
        """
        for offset, remote, size in pieces:
            self._open.add(self._engine.begin(segment, self.address + offset, remote, size))
        failed = 0
        for transfer in list(self._open):
            outcome = wait_ended(self._engine, [transfer], check)[transfer]
            self._open.discard(transfer)
            failed += not outcome
        if failed:
            raise StoreUnavailable(f"{failed} of {len(pieces)} transfers from {segment} broke off")

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """While another process may read it. It stays lent if that ends with StoreUnavailable: who
        did not answer may still be reading."""
        self._is_lent = True
        try:
            yield
        except StoreUnavailable:
            raise
        except BaseException:
            self._is_lent = False
            raise
        self._is_lent = False

    def is_free(self) -> bool:
        """Whether no transfer of before may still touch it."""
        if self._is_lent:
            return False
        for transfer in list(self._open):
            if self._engine.has_ended(transfer) is not None:
                self._open.discard(transfer)
        return not self._open

    def close(self) -> None:
        """Give the memory back, unless a transfer may touch it: then it stays for ever."""
        if self.is_free():
            self._engine.unregister(self.address)
        else:
            _kept.append(self)
