"""How the compute threads of a worker wait for one another, and where they run."""

import contextlib
import os
from collections.abc import Iterator

from pdserve.config import PoolConfig

SPINS = 10_000  # of an OpenMP thread until it sleeps, well above what lies between two operations


def set_threads(pool: PoolConfig, *, alone: bool) -> int:
    """Before torch is imported: OpenMP reads its settings from the environment when it loads.

    Passive waiting where several workers with a thread per core share the cores: spinning threads
    of one would eat the others' time. ``alone`` there are none, and threads that are awake when the
    next operation comes make a decode step of a small model a third shorter.

    Returns:
        how many there are, in each process of the worker.
    """
    threads = pool.threads or max(1, len(os.sched_getaffinity(0)) // pool.tensor_parallel)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if alone:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    else:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return threads


@contextlib.contextmanager
def cores_of_their_own(*, alone: bool) -> Iterator[None]:
    """The calling thread computes as that of a worker that is ``alone``: each thread on its core.
    What is started afterwards may run anywhere again."""
    if not alone:
        yield
        return
    from pdserve.model.cpu_ops import bind_threads

    cores = os.sched_getaffinity(0)
    bind_threads()
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
