"""Mooncake's store behind ``kv_agent``'s loop: master, the owner of the memory, and this client are
three processes.

kv_mooncake.py tcp     the client reads the owner's memory over TCP
kv_mooncake.py shm     the owner serves a client of its host through shared memory
"""

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kv_agent import check, free_port, serve
from mooncake.store import MooncakeDistributedStore

SEGMENT_BYTES = 1 << 30
BUFFER_BYTES = 256 << 20
STAGING_BYTES = 16 << 20
START_S_MAX = 20
LEASE_MS = 500
"""How long what was read may not be removed; nothing is read while it is removed here. A get that
takes longer fails (-707), as many do in 100 ms on a machine that is busy with other things."""

HOST = "127.0.0.1"


class MooncakeStore:
    def __init__(self, store: Any, staging: int) -> None:
        self._store = store
        self._staging = staging  # address of STAGING_BYTES that the store knows

    def put(self, name: str, size: int) -> None:
        check(self._store.put_from(name, self._staging, size), 0)

    def get(self, name: str, size: int) -> None:
        check(self._store.get_into(name, self._staging, size), size)

    def get_many(self, names: list[str], size: int) -> None:
        places = [self._staging + index * size for index in range(len(names))]
        got = self._store.batch_get_into(names, places, [size] * len(names))
        check(sum(got), size * len(names))

    def present(self, names: list[str]) -> int:
        return sum(self._store.batch_is_exist(names))

    def forget(self, name: str) -> None:
        deadline = time.monotonic() + START_S_MAX
        while self._store.remove(name) != 0:  # until its lease is over
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} cannot be removed")
            time.sleep(LEASE_MS / 1000)


def connected(metadata: str) -> MooncakeStore:
    """A client without memory of its own: all of it is the owner's."""
    store = MooncakeDistributedStore()
    address = f"{HOST}:{free_port()}"
    check(store.setup(address, "P2PHANDSHAKE", 0, BUFFER_BYTES, "tcp", "", metadata), 0)
    staging = (ctypes.c_char * STAGING_BYTES).from_buffer(bytearray(os.urandom(STAGING_BYTES)))
    check(store.register_buffer(ctypes.addressof(staging), STAGING_BYTES), 0)
    _kept.append(staging)
    return MooncakeStore(store, ctypes.addressof(staging))


_kept: list[Any] = []


def beside(port: int) -> MooncakeStore:
    """A client of the host's owner, in whose shared memory it reads and writes."""
    store = MooncakeDistributedStore()
    check(store.setup_dummy(BUFFER_BYTES, STAGING_BYTES, f"{HOST}:{port}"), 0)
    staging = store.alloc_from_mem_pool(STAGING_BYTES)
    check(store.register_buffer(staging, STAGING_BYTES), 0)
    return MooncakeStore(store, staging)


def own(metadata: str) -> None:
    store = MooncakeDistributedStore()
    address = f"{HOST}:{free_port()}"
    check(store.setup(address, "P2PHANDSHAKE", SEGMENT_BYTES, 64 << 20, "tcp", "", metadata), 0)
    print("ready", flush=True)
    sys.stdin.read()


def until_up(start: Any) -> Any:
    """``start()``, again while what it needs is on its way up."""
    deadline = time.monotonic() + START_S_MAX
    while True:
        try:
            return start()
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def main(how: str) -> None:
    programs = Path(sys.executable).parent
    master_port, client_port = free_port(), free_port()
    metadata = f"{HOST}:{master_port}"
    master = [
        str(programs / "mooncake_master"),
        *(f"-rpc_port={master_port}", f"-metrics_port={free_port()}"),
        f"-default_kv_lease_ttl={LEASE_MS}",
    ]
    client = [
        str(programs / "mooncake_client"),
        *(f"-host={HOST}", f"-port={client_port}", "-protocol=tcp"),
        *("-metadata_server=P2PHANDSHAKE", f"-master_server_address={metadata}"),
        f"-global_segment_size={SEGMENT_BYTES >> 20} MB",
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(master))
        if how == "tcp":
            store = until_up(lambda: connected(metadata))
            owner = stack.enter_context(
                running([sys.executable, __file__, "own", metadata], heard=True)
            )
            assert owner.stdout is not None
            check(owner.stdout.read(5) == b"ready", True)
        else:
            stack.enter_context(running(client))
            store = until_up(lambda: beside(client_port))
        serve(store)


@contextlib.contextmanager
def running(command: list[str], *, heard: bool = False) -> Iterator["subprocess.Popen[bytes]"]:
    """``heard``: somebody reads what it prints."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if heard else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    if sys.argv[1] == "own":
        own(sys.argv[2])
    else:
        main(sys.argv[1])
