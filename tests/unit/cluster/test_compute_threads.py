"""How a worker's threads wait is said before torch is imported."""

import os

import pytest

from pdserve.cluster.compute_threads import SPINS, cores_of_their_own, set_threads
from pdserve.config import PoolConfig
from pdserve.model import cpu_ops

NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_threads_sleep_where_workers_share_the_cores() -> None:
    assert set_threads(PoolConfig(threads=3), alone=False) == 3
    assert [os.environ.get(name) for name in NAMES] == ["3", "PASSIVE", None]


def test_threads_stay_awake_where_a_worker_is_alone() -> None:
    cores = len(os.sched_getaffinity(0))
    assert set_threads(PoolConfig(threads=0), alone=True) == cores
    assert [os.environ.get(name) for name in NAMES] == [str(cores), None, str(SPINS)]


def test_processes_of_one_worker_share_the_cores_out() -> None:
    cores = len(os.sched_getaffinity(0))
    assert set_threads(PoolConfig(tensor_parallel=cores), alone=False) == 1
    assert set_threads(PoolConfig(tensor_parallel=2 * cores), alone=False) == 1
    assert set_threads(PoolConfig(tensor_parallel=cores, threads=3), alone=False) == 3


def test_what_starts_after_bound_threads_may_run_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.sched_getaffinity(0)
    monkeypatch.setattr(cpu_ops, "bind_threads", lambda: os.sched_setaffinity(0, {min(cores)}))
    with cores_of_their_own(alone=False):
        assert os.sched_getaffinity(0) == cores
    with cores_of_their_own(alone=True):
        assert os.sched_getaffinity(0) == {min(cores)}
    assert os.sched_getaffinity(0) == cores
