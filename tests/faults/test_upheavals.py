"""What no single process is: a whole raylet (F7), Ray's control service and its Redis (F8), the
store's Redis (F9), a flipped bit (F12), a store without room (F13), every role
replaced (F19), pools that grow and shrink (F20), two layouts side by side (F21). Each on a cluster
of its own, under load of every kind.
"""

import contextlib
import dataclasses
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster.kv_stores import stores_of
from pdserve.cluster.worker_parts import FLIP_ENV
from pdserve.config import ClusterConfig
from tests.faults import grpc_load, load, rows
from tests.integration.deployed import deployed
from tests.integration.harness import (
    TestCluster,
    end_ray,
    free_port,
    held,
    processes,
    running,
    settings,
    wait_for,
    wait_until_equal,
)
from tests.redis_server import RedisServer, running_redis

CLIENTS = 4
REQUESTS = CLIENTS * int(os.environ.get("FAULTS_REQUESTS_PER_CLIENT", "100")) // 4
GRPC_CLIENTS = 3
GRPC_ASKS = 4  # of those that gRPC's plain parameters can say
SEED = 7
BACK_S = 120.0
REDIS_DOWN_S = 30.0
ROOMLESS = 56  # requests
ARENA_BYTES = 2 << 20  # about half of what they store
DISK_FULL_BYTES = 64 << 10  # of any file of the store
POOL = {"threads": 1, "pool_blocks": 512}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def config_of(model: Path, **parts: object) -> ClusterConfig:
    given: dict[str, object] = {"model": {"dtype": "float32"}, "router": {"replicas": 2}}
    return settings(model, **(given | parts))


def calm_of(cluster: TestCluster, asks: list[load.Ask]) -> list[load.Answer]:
    answers = load.run(cluster.url, asks, clients=CLIENTS)
    assert [answer.error for answer in answers if answer.error] == []
    return answers


def check(
    cluster: TestCluster,
    answers: list[load.Answer],
    calm: list[load.Answer],
    asks: list[load.Ask],
    *,
    fault: str,
    what: str,
    beside: str = "",
) -> None:
    """Every answer is the calm run's, and nothing is held; a row says so.

    Args:
        beside: what else was asked, and was right.
    """
    rounds = len(answers) // len(asks)
    assert rounds >= 1
    assert load.differences(asks * rounds, answers, calm * rounds) == []
    wait_until_equal("held at rest", lambda: held(cluster), 0, timeout_s=BACK_S)
    rows.add(
        rows.Row(
            fault=fault,
            what=what,
            load=", ".join(filter(None, [f"{CLIENTS} clients, {len(answers)} requests", beside])),
            identical=len(answers),
            asked=len(answers),
            note=load.told_of(answers),
            seed=SEED,
        )
    )


# ── raylets ──────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def raylets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head and two nodes that take each other for different hosts."""
    import ray
    from ray.cluster_utils import Cluster

    from pdserve.cluster.local import OBJECT_STORE_BYTES

    end_ray()
    hosts = Cluster()
    try:
        for index in range(3):
            monkeypatch.setenv("PDSERVE_HOST_ID", f"test-host-{index}")
            hosts.add_node(
                num_cpus=2,
                resources={"prefill": 1, "decode": 1} if index else {},
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
            )
        monkeypatch.delenv("PDSERVE_HOST_ID")
        yield hosts
    finally:
        ray.shutdown()
        hosts.shutdown()


def test_a_raylet_is_killed_with_all_its_workers(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, cluster_port: int
) -> None:
    """Half of either pool is on it. What else is there comes back elsewhere."""
    asks = load.mixed(REQUESTS, seed=SEED)
    pool = POOL | {"replicas": 2, "replicas_max": 2}
    config = config_of(
        small_model,
        prefill=pool | {"resources": {"prefill": 1.0}},
        decode=pool | {"resources": {"decode": 1.0}},
        gateway={"replicas": 2, "http_port": cluster_port},
        tcp=True,
    )
    with raylets(monkeypatch) as hosts, running(config, ray_address=hosts.address) as cluster:
        calm = calm_of(cluster, asks)
        workers = cluster.status()["workers"]
        assert {worker["role"] for worker in workers} == {"prefill", "decode"}
        victim = min(hosts.worker_nodes, key=lambda node: node.node_id)
        with load.Endless(cluster.url, asks, clients=CLIENTS) as endless:
            wait_for("a round", lambda: bool(endless.answers), timeout_s=BACK_S)
            hosts.remove_node(victim, allow_graceful=False)
            already = len(endless.answers)
            wait_for(
                "two more", lambda: len(endless.answers) >= already + 2 * REQUESTS, timeout_s=BACK_S
            )
        check(
            cluster,
            endless.answers,
            calm,
            asks,
            fault="F7",
            what="a raylet of two killed, with its workers and its store",
        )


# ── Redis ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


def test_rays_control_service_is_killed_and_comes_back(
    small_model: Path, redis: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its state is in Redis. Nothing that serves asks it; once it is back workers are replaced."""
    import ray
    from ray.cluster_utils import Cluster

    from pdserve.cluster.local import OBJECT_STORE_BYTES

    end_ray()
    monkeypatch.setenv("RAY_REDIS_ADDRESS", f"127.0.0.1:{redis.port}")
    hosts = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        },
    )
    try:
        asks = load.mixed(REQUESTS, seed=SEED)
        config = config_of(small_model)
        with running(config, ray_address=hosts.address) as cluster:
            calm = calm_of(cluster, asks)
            with load.Endless(cluster.url, asks, clients=CLIENTS) as endless:
                wait_for("a round", lambda: bool(endless.answers), timeout_s=BACK_S)
                hosts.head_node.kill_gcs_server()
                time.sleep(REDIS_DOWN_S)  # how long it is down is the fault, not a wait
                hosts.head_node.start_gcs_server()
                already = len(endless.answers)
                wait_for("one more", lambda: len(endless.answers) > already, timeout_s=BACK_S)
            check(
                cluster,
                endless.answers,
                calm,
                asks,
                fault="F8",
                what=f"Ray's GCS killed, back after {REDIS_DOWN_S:g} s",
            )
            (pid,) = cluster.pids("prefill")
            os.kill(pid, signal.SIGKILL)
            wait_for(
                "a new worker, by Serve",
                lambda: cluster.pids("prefill") not in ([], [pid]),
                timeout_s=BACK_S,
            )
    finally:
        ray.shutdown()
        hosts.shutdown()


def test_the_stores_redis_hangs(small_model: Path, redis: RedisServer) -> None:
    asks = load.mixed(REQUESTS, seed=SEED)
    config = config_of(small_model, store={"redis_url": redis.url, "arena_bytes": 128 << 20})
    with running(config) as cluster:
        calm = calm_of(cluster, asks)
        waking = threading.Timer(REDIS_DOWN_S, lambda: redis.process.send_signal(signal.SIGCONT))
        redis.process.send_signal(signal.SIGSTOP)
        waking.start()
        with load.Endless(cluster.url, asks, clients=CLIENTS) as endless:
            waking.join()
        check(
            cluster,
            endless.answers,
            calm,
            asks,
            fault="F9",
            what=f"the store's Redis stopped for {REDIS_DOWN_S:g} s",
        )


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────


def test_flipped_bits_are_found(small_model: Path) -> None:
    """The first run is the one with the faults, the second one says what is right."""
    asks = load.mixed(REQUESTS, seed=SEED)
    with running(config_of(small_model), environment={FLIP_ENV: "2,3,5,40,41"}) as cluster:
        struck = load.run(cluster.url, asks, clients=CLIENTS)
        wait_for("failures", lambda: cluster.counter("decode", "checksum_failures") > 0)
        calm = calm_of(cluster, asks)
        found = cluster.counter("decode", "checksum_failures")
        check(
            cluster,
            struck,
            calm,
            asks,
            fault="F12",
            what=f"one bit flipped in 5 blocks on their way, {found} found by who read them",
        )


def test_neither_memory_nor_disk_has_room(small_model: Path, tmp_path: Path) -> None:
    """An arena that is always full, and a disk that lets no file grow. The first run is the one
    with the fault: a second one would find what the first has stored, and write nothing."""
    asks = load.mixed(ROOMLESS, seed=SEED)
    store = {
        "arena_bytes": ARENA_BYTES,
        "ssd_directory": str(tmp_path / "ssd"),
        "ssd_write": "write_through",
    }
    with running(config_of(small_model, store=store)) as cluster:
        (node,) = processes("pdserve.kvstore.node")
        before = resource.prlimit(node, resource.RLIMIT_FSIZE)
        resource.prlimit(node, resource.RLIMIT_FSIZE, (DISK_FULL_BYTES, before[1]))
        struck = load.run(cluster.url, asks, clients=CLIENTS)
        with stores_of(cluster.url, ()) as stores:
            (store_node,) = stores
            stat = store_node.admin.report().stat
        assert stat.ssd["pauses"] > 0, "the disk was full"
        assert stat.evicted_count > 0, "and so was memory"
        resource.prlimit(node, resource.RLIMIT_FSIZE, before)
        calm = calm_of(cluster, asks)
        assert processes("pdserve.kvstore.node") == [node]
        check(
            cluster,
            struck,
            calm,
            asks,
            fault="F13",
            what="the store's disk is full, and its memory is",
        )


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("F19", {"router": {"queue_age_max_ms": 59_000.0}}),
        ("F21", {"store": {"key_salt": "b"}}),
        ("F21", {"model": {"block_tokens": 32}}),
    ],
    ids=["same layout", "salt", "block size"],
)
def test_another_version_takes_over_under_load(
    small_model: Path, cluster_port: int, fault: str, change: dict[str, dict[str, Any]]
) -> None:
    """`serve deploy`: every role is replaced, and two layouts never read each other's blocks. Where
    only the salt differs, blocks of both have the same size and lie in the same store, and nothing
    but their names keeps them apart."""
    asks = load.mixed(REQUESTS, seed=SEED)
    config = config_of(
        small_model,
        gateway={"replicas": 2, "http_port": cluster_port, "grpc_port": free_port()},
        drain_timeout_s=BACK_S,  # longer than a worker takes to start beside all this
    )
    (part, fields) = next(iter(change.items()))
    other = dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **fields)}
    )
    with deployed(config) as cluster:
        calm = calm_of(cluster, asks)
        before = {worker["pid"] for worker in cluster.status()["workers"]}
        said = grpc_load.speakable(asks)[:GRPC_ASKS]
        grpc_port = config.gateway.grpc_port
        with grpc_load.GrpcEndless(grpc_port, said, clients=1) as calmly:
            pass
        with (
            load.Endless(cluster.url, asks, clients=CLIENTS) as endless,
            grpc_load.GrpcEndless(grpc_port, said, clients=GRPC_CLIENTS) as streams,
        ):
            wait_for("a round", lambda: bool(endless.answers), timeout_s=BACK_S)
            wait_for("streams", lambda: all(streams.answers), timeout_s=BACK_S)
            cluster.deploy_other(other)
            wait_for(
                "the new version alone",
                lambda: (
                    before.isdisjoint(w["pid"] for w in cluster.status()["workers"])
                    and len(cluster.status()["workers"]) == 2
                ),
                timeout_s=BACK_S,
            )
        for answers in streams.answers:
            rounds = len(answers) // len(said)
            assert load.differences(said * rounds, answers, calmly.answers[0] * rounds) == []
        check(
            cluster,
            endless.answers,
            calm,
            asks,
            fault=fault,
            what=f"every role replaced: another {part}.{next(iter(fields))} deployed",
            beside=f"{sum(map(len, streams.answers))} gRPC streams on {GRPC_CLIENTS} connections",
        )


# ── pools ────────────────────────────────────────────────────────────────────────────────────────


def test_a_pool_grows_from_one_to_three_and_back(small_model: Path) -> None:
    asks = load.mixed(REQUESTS, seed=SEED)
    config = config_of(small_model, decode=POOL | {"replicas": 1, "replicas_max": 1})
    with deployed(config) as cluster:
        calm = calm_of(cluster, asks)
        with load.Endless(cluster.url, asks, clients=CLIENTS) as endless:
            for count in (3, 1):
                cluster.deploy(decode_replicas=count)
                wait_for(
                    f"{count} decode workers",
                    lambda count=count: len(cluster.pids("decode")) == count,  # type: ignore[misc]
                    timeout_s=BACK_S,
                )
        check(
            cluster,
            endless.answers,
            calm,
            asks,
            fault="F20",
            what="decode from 1 worker to 3 and back to 1",
        )
