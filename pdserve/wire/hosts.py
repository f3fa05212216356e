"""Which machine this is, as far as sharing goes.

Two processes have equal host ids exactly when they can use each other's shared memory and Unix
sockets: the same boot of the same kernel, the same ``/dev/shm``, the same view of the file system,
the same network. Containers on one machine that share none of these are different hosts, and talk
over TCP.
"""

import hashlib
import os
from pathlib import Path

from pdserve.ids import HostId

HOST_ID_VARIABLE = "PDSERVE_HOST_ID"
"""Overrides the host id: for tests of two hosts on one machine."""


def local_host_id() -> HostId:
    override = os.environ.get(HOST_ID_VARIABLE)
    if override:
        return HostId(override)
    parts = (
        Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        str(os.stat("/dev/shm").st_dev),
        os.readlink("/proc/self/ns/mnt"),
        os.readlink("/proc/self/ns/net"),
    )
    return HostId("host-" + hashlib.sha256("|".join(parts).encode()).hexdigest()[:16])
