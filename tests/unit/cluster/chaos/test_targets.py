"""Whom chaos may touch: what descends from the raylet of the cluster's own workers, and no more."""

from pathlib import Path

import pytest

from pdserve.cluster.chaos.targets import Process, arena_of, by_role, processes
from pdserve.errors import ConfigError

REPLICA = "ray::ServeReplica:pdserve:"


def table(*rows: tuple[int, int, str]) -> dict[int, Process]:
    return {pid: Process(pid, parent, command) for pid, parent, command in rows}


TABLE = table(
    (1, 0, "init"),
    (10, 1, "raylet"),
    (11, 10, REPLICA + "prefill"),
    (12, 10, REPLICA + "decode"),
    (13, 10, REPLICA + "router"),
    (14, 10, REPLICA + "gateway"),
    (15, 10, "ray::StoreSupervisor"),
    (16, 15, "python -m pdserve.kvstore.node --directory /tmp/a"),
    (20, 1, "raylet"),  # somebody else's cluster
    (21, 20, REPLICA + "decode"),
    (22, 20, "python -m pdserve.kvstore.node --directory /tmp/b"),
    (30, 1, "python -m pdserve.kvstore.node --directory /tmp/c"),
)


def test_the_cluster_is_what_its_workers_raylet_started() -> None:
    workers = [{"pid": 11, "role": "prefill"}, {"pid": 12, "role": "decode"}]
    assert by_role(workers, TABLE) == {
        "prefill": [11],
        "decode": [12],
        "router": [13],
        "gateway": [14],
        "store": [16],
    }


def test_a_worker_of_another_host_is_left_alone_though_its_number_is_taken_here() -> None:
    with pytest.raises(ConfigError, match="no worker of this cluster runs on this host"):
        by_role([{"pid": 30, "role": "decode"}, {"pid": 99, "role": "prefill"}], TABLE)


def test_processes_and_arenas_are_read_from_proc(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text("7 (a (b) c) S 3 0 0")
    (tmp_path / "7" / "cmdline").write_text("python\0-m\0x")
    (tmp_path / "7" / "maps").write_text(
        "00-10 rw-p 00 00:00 0\n"
        "10-20 rw-s 00 00:01 5 /dev/shm/pdserve-0/store-1/pins\n"
        "20-90 rw-s 00 00:01 6 /dev/shm/pdserve-0/store-1/arena\n"
    )
    (tmp_path / "8").mkdir()  # it has just ended
    (tmp_path / "self").mkdir()
    assert processes(tmp_path) == {7: Process(7, 3, "python -m x")}
    assert arena_of(7, tmp_path) == Path("/dev/shm/pdserve-0/store-1/arena")
    assert arena_of(8, tmp_path) is None
