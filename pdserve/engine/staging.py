"""Memory that a process shares with the children that it starts, and with nobody else."""

import mmap
import os


def new_memory(size: int) -> int:
    """A descriptor of so many bytes, all 0, for children to inherit. It is nowhere in a file
    system, and ends with the last process that has it."""
    descriptor = os.memfd_create("pdserve-staging", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor


def mapped_memory(descriptor: int) -> memoryview:
    """What is behind a descriptor, which is closed: the memory stays as long as it is used."""
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        return memoryview(mmap.mmap(file.fileno(), 0))
