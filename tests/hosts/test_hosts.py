"""Hosts made of namespaces are hosts: they share nothing, and blocks cross the network.

No Ray here, so these are quick. What is served over such hosts: test_hosts_serving.py; what a bad
network does to it: test_hosts_faults.py.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.links import Link
from tests.hosts.namespaces import Host, Network, network
from tests.integration.certificates import make_certificates
from tests.integration.harness import wait_for
from tests.integration.store_nodes import BLOCK_BYTES

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}
BLOCKS = 12
ARENA_BYTES = 64 * (BLOCK_BYTES + 64)

Peer = Callable[[str], Any]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    with network(["one", "two"], seed=11) as made:
        yield made


@pytest.fixture(scope="module")
def secrets_of_hosts(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("secrets")
    make_certificates(directory)
    key_file = directory / "cluster.key"
    key_file.write_text("a key for tests of hosts only")
    key_file.chmod(0o600)
    return str(directory)


@contextlib.contextmanager
def node_on(
    host: Host, network: Network, name: str, *secrets: str, more: Sequence[str] = ()
) -> Iterator[str]:
    """A store node; its address as JSON. ``more``: of its command line."""
    files = {"authority": "authority.pem", "certificate": "member.pem", "key": "member.key"}
    arguments = [
        word
        for directory in secrets
        for option, file in files.items()
        for word in (f"--tls-{option}", f"{directory}/{file}")
    ] + [word for directory in secrets for word in ("--key-file", f"{directory}/cluster.key")]
    node = host.start(
        *(sys.executable, "-m", "pdserve.kvstore.node"),
        *("--directory", str(network.local / name), "--tcp-host", host.address),
        *("--arena-bytes", str(ARENA_BYTES), "--block-bytes", str(BLOCK_BYTES)),
        *arguments,
        *more,
        environment=ENVIRONMENT,
    )
    with _address_of(node) as address:
        yield address


@contextlib.contextmanager
def master_on(host: Host, network: Network) -> Iterator[str]:
    """A master of stores; where it listens, as host:port."""
    directory = network.local / "master"
    master = host.start(
        *(sys.executable, "-m", "pdserve.kvstore.masters.process"),
        *("--directory", str(directory), "--metadata", str(network.local / "members.sqlite")),
        *("--tcp-host", host.address),
        environment=ENVIRONMENT,
    )
    with _address_of(master) as address:
        yield json.loads(address)["tcp"]


@contextlib.contextmanager
def _address_of(process: subprocess.Popen[str]) -> Iterator[str]:
    """As JSON, which it says once it serves."""
    with _ends(process):
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"it ended with {process.wait(60)}"
        yield json.dumps(json.loads(line)["address"])


@contextlib.contextmanager
def peer_on(host: Host, address: str, *secrets: str) -> Iterator[Peer]:
    """A process there; called with a command, its answer."""
    process = host.start(
        sys.executable,
        *("-m", "tests.hosts.store_peer", address, *secrets),
        environment=ENVIRONMENT,
    )

    def ask(command: str) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(command + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    with _ends(process):
        yield ask


@contextlib.contextmanager
def _ends(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(60)
        finally:
            process.kill()
            process.stdout.close()


def test_hosts_see_neither_the_processes_nor_the_memory_of_each_other(hosts: Network) -> None:
    one, two = hosts.hosts["one"], hosts.hosts["two"]
    one.run("sh", "-c", "echo secret >/dev/shm/mine")
    assert one.run("ls", "/dev/shm") == "mine\n"
    assert two.run("ls", "/dev/shm") == ""
    assert not Path("/dev/shm/mine").exists()
    with _ends(one.start("cat")):
        wait_for("it to run", lambda: one.run("pgrep", "-xc", "cat") == "2\n")
        assert two.run("pgrep", "-xc", "cat") == "1\n", "its own first process"
    assert one.run("hostname") == "one\n"
    assert f"inet {two.address}/24" in two.run("ip", "-4", "addr")
    assert f"inet {one.address}" not in two.run("ip", "-4", "addr")


@pytest.mark.parametrize("tls", [False, True], ids=["TCP", "TLS"])
def test_blocks_cross_hosts_and_only_tls_hides_them(
    hosts: Network, secrets_of_hosts: str, tls: bool
) -> None:
    one, two = hosts.hosts["one"], hosts.hosts["two"]
    secrets = [secrets_of_hosts] if tls else []
    readable_before = hosts.readable_count("one", "two")
    with (
        node_on(one, hosts, "tls" if tls else "tcp", *secrets) as address,
        peer_on(one, address) as near,
        peer_on(two, address, *secrets) as far,
    ):
        assert near("put near 12") == far("put far 12") == BLOCKS
        assert far("read near 12") == near("read far 12") == far("read far 12") == BLOCKS
        assert near("host") != far("host")
        readable = hosts.readable_count("one", "two") > readable_before
        assert readable == (not tls)
        if tls:
            with peer_on(two, address) as stranger:
                assert stranger("read near 12")["error"] == "StoreUnavailable"


def test_a_host_that_is_drained_leaves_its_blocks_to_the_other_and_may_lose_its_power(
    hosts: Network,
) -> None:
    """By the command, a moment after the last blocks came, and with a put under way, which ends
    once the others are there."""
    one, two = hosts.hosts["one"], hosts.hosts["two"]
    with contextlib.ExitStack() as ending:
        begin = ending.enter_context
        master = begin(master_on(two, hosts))
        first, second = (
            begin(node_on(host, hosts, name, more=("--store-id", name, "--masters", master)))
            for host, name in ((one, "goes"), (two, "stays"))
        )
        writer, reader = begin(peer_on(one, first)), begin(peer_on(two, second))
        assert reader("put own 12") == BLOCKS
        wait_for("both to be members", lambda: "2 members" in _stat(two, second))
        assert writer("put hot 12") == BLOCKS
        assert reader("read hot 12") == 0
        late = begin(peer_on(one, first))
        assert late("hold late 3") == 0
        where = ("--timeout-s", "300", "--node", json.loads(first)["tcp"])
        with ThreadPoolExecutor(1) as threads:
            drain = threads.submit(_kv, two, "drain", "goes", *where)
            try:
                wait_for("the first copies", lambda: reader("read hot 12") == BLOCKS, timeout_s=180)
            finally:
                assert late("go on") == 3
            said = drain.result()
        assert "15 blocks of goes were copied" in said, said
        assert "goes" in said.splitlines()[-1], said
        assert writer("read hot 12") == 0, "it finds nothing while it drains"
        assert reader("read own 12") == BLOCKS
        one.power_off()
        assert (reader("read hot 12"), reader("read late 3")) == (BLOCKS, 3)
    one.boot()


def _kv(host: Host, *words: str) -> str:
    """What ``pdserve kv`` prints there."""
    command = (sys.executable, "-m", "pdserve.cluster.cli", "kv", *words)
    return host.run(*command, environment=ENVIRONMENT)


def _stat(host: Host, address: str) -> str:
    return _kv(host, "stat", "--node", json.loads(address)["tcp"])


def test_a_lossy_network_delays_blocks_and_changes_none(hosts: Network) -> None:
    one, two = hosts.hosts["one"], hosts.hosts["two"]
    with (
        node_on(one, hosts, "lossy") as address,
        peer_on(one, address) as near,
        peer_on(two, address) as far,
    ):
        assert near("put near 12") == BLOCKS
        hosts.both_ways("one", "two", Link(loss_ratio=0.02, delay_ms=2, duplicate_ratio=0.02))
        try:
            assert far("read near 12") == BLOCKS
        finally:
            hosts.heal()


HOLDS_A_HOST = """
import sys, time
from tests.hosts.namespaces import network
with network(["one"], seed=0) as made:
    host = made.hosts["one"]
    print(host.command()[2], made.switch_pid, made.client_device, made.local, flush=True)
    sys.stdin.read()
"""


def test_nothing_of_a_host_outlives_who_made_it_killed_or_not(hosts: Network) -> None:
    """The fixture is asked for, so that where no hosts can be had this is skipped too."""
    maker = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_HOST],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert maker.stdin is not None
    assert maker.stdout is not None
    with maker.stdin, maker.stdout:
        *_, init, switch, device, directory = (
            maker.stdout.readline() + maker.stdout.readline()
        ).split()
        assert Path(f"/sys/class/net/{device}").exists()
        maker.kill()
        maker.wait(60)
    wait_for("its first process to end", lambda: not Path(f"/proc/{init}").exists())
    wait_for("the switch to end", lambda: not Path(f"/proc/{switch}").exists())
    wait_for("its device to go", lambda: not Path(f"/sys/class/net/{device}").exists())
    shutil.rmtree(directory)


@pytest.mark.parametrize("seconds", ["100000", "0"], ids=["in time", "too late"])
def test_draining_waits_for_this_hosts_replicas_and_no_longer_than_allowed(
    hosts: Network, tmp_path: Path, seconds: str
) -> None:
    """Ray is a script here that notes what it is asked."""
    host, asked = hosts.hosts["two"], tmp_path / "asked"
    fake = tmp_path / "ray"
    fake.write_text(f'#!/bin/sh\necho "$@" >{asked}\n')
    fake.chmod(0o755)
    replica = host.start("bash", "-c", "exec -a ray::ServeReplica:pdserve:decode cat")
    with _ends(replica):
        count = ("sh", "-c", "pgrep -fc ^ray::ServeReplica || true")  # it fails where none is
        wait_for("the replica", lambda: host.run(*count) == "1\n")
        draining = host.start(
            *("sh", str(ROOT / "deploy" / "drain-host.sh"), seconds),
            environment={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )
        with _ends(draining):
            wait_for("Ray to be asked", asked.exists)
            if seconds != "0":
                assert draining.poll() is None
                assert replica.stdin is not None
                replica.stdin.close()
            assert draining.wait(60) == 0
    assert "drain-node" in asked.read_text()
    assert f"--deadline-remaining-seconds {seconds}\n" in asked.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("both", [True, False], ids=["both ways", "one way"])
def test_a_partition_ends_in_an_error_and_after_it_blocks_come(hosts: Network, both: bool) -> None:
    one, two = hosts.hosts["one"], hosts.hosts["two"]
    with (
        node_on(one, hosts, f"parted-{both}") as address,
        peer_on(one, address) as near,
        peer_on(two, address) as far,
    ):
        assert near("put near 12") == BLOCKS
        assert far("read near 4") == 4
        hosts.cut("one", "two", both=both)
        try:
            assert far("read near 12")["error"] in ("StoreUnavailable", "DeadlineExceeded")
            assert near("read near 12") == BLOCKS
        finally:
            hosts.heal()
        assert far("read near 12") == BLOCKS


@pytest.mark.slow
def test_a_host_that_was_off_is_the_same_address_with_nothing_in_memory(hosts: Network) -> None:
    two = hosts.hosts["two"]
    two.run("sh", "-c", "echo secret >/dev/shm/mine")
    two.power_off()
    assert not two.is_up
    two.boot()
    assert two.run("ls", "/dev/shm") == ""
    assert f"inet {two.address}/24" in two.run("ip", "-4", "addr")
