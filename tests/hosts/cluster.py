"""Ray and pdserve on hosts: gateway and router on ``head``, prefill and decode on a host each.

The same questions can be asked as of any cluster of the tests (``TestCluster``), from a client that
has an address of its own on the hosts' network. Ray runs with a token, as it should between hosts.
"""

import contextlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from pdserve.cluster.local import OBJECT_STORE_BYTES, LocalCluster
from pdserve.config import ClusterConfig
from pdserve.settings import to_tree
from tests.hosts.namespaces import Host, Network
from tests.integration.harness import TestCluster, settings

ROOT = Path(__file__).parents[2]
HEAD, PREFILL, DECODE = "head", "prefill", "decode"
RAY = str(Path(sys.executable).with_name("ray"))
RAY_PORT = 6379
START_S_MAX = 180.0
STOP_S_MAX = 90.0

DETECTION = {
    # A dead host is one that has missed so many of these; Ray's defaults take over half a minute.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}


@dataclass
class HostedCluster:
    """pdserve on three hosts."""

    network: Network
    served: TestCluster
    environment: Mapping[str, str]
    log: IO[str]

    @property
    def url(self) -> str:
        return self.served.url

    def host(self, name: str) -> Host:
        return self.network.hosts[name]

    def start_ray(self, name: str) -> None:
        start_ray(self.host(name), self.network, self.environment, name=name)

    def serves(self) -> bool:
        """Whether a new request is answered with tokens, asked with a short deadline."""
        body = {"prompt": [50, 51, 52], "max_tokens": 2, "temperature": 0.0, "ignore_eos": True}
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.post(
                f"{self.url}/v1/completions",
                json=body,
                headers={"x-request-timeout-ms": "5000"},
                timeout=15,
            )
            return answer.status_code == 200
        return False

    def wait_until_it_serves(self, *, within_s: float) -> float:
        """Seconds it took."""
        begun_s = time.monotonic()
        while not self.serves():
            waited_s = time.monotonic() - begun_s
            assert waited_s < within_s, f"no tokens for {waited_s:.0f} s"
            time.sleep(0.2)
        return time.monotonic() - begun_s


def hosted_settings(model: Path, network: Network, **parts: Any) -> ClusterConfig:
    """One worker on each of two hosts, found by their Ray labels; the gateway on the head."""
    tree: dict[str, Any] = {
        "model": {"dtype": "float32"},
        "prefill": {"threads": 1, "pool_blocks": 512, "labels": {"part": PREFILL}},
        "decode": {"threads": 1, "pool_blocks": 512, "labels": {"part": DECODE}},
        "gateway": {
            "http_port": 0,
            "grpc_port": -1,
            "host": network.hosts[HEAD].address,
            "labels": {"part": HEAD},
        },
        "directory": str(network.local / "s"),
        "tcp": True,
    }
    for name, fields in parts.items():
        tree[name] = {**tree.get(name, {}), **fields} if isinstance(fields, dict) else fields
    return settings(model, **tree)


@contextlib.contextmanager
def hosted(network: Network, config: ClusterConfig) -> Iterator[HostedCluster]:
    """``config`` served on the network's hosts, which have no Ray yet."""
    environment = {
        **DETECTION,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(network.local),
        "HOME": str(network.local),
    }
    for name in network.hosts:
        start_ray(network.hosts[name], network, environment, name=name)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((network.local / "driver.log").open("w+"))
        driver = network.hosts[HEAD].start(
            sys.executable,
            *("-m", "tests.hosts.driver", f"{network.hosts[HEAD].address}:{RAY_PORT}"),
            environment=environment,
            stderr=log.fileno(),
        )
        stack.callback(driver.kill)
        assert driver.stdin is not None
        assert driver.stdout is not None
        driver.stdin.write(json.dumps(to_tree(config)) + "\n")
        driver.stdin.flush()
        line = driver.stdout.readline()
        assert line, f"the driver ended: {_end_of(log)}"
        ready = json.loads(line)
        assert "http" in ready, ready
        served = TestCluster(LocalCluster(ready["http"], "", network.local), config)
        try:
            yield HostedCluster(network, served, environment, log)
        finally:
            _keep_logs(network)
            driver.stdin.close()  # it need not end well: its hosts end with it
            with contextlib.suppress(Exception):
                driver.wait(STOP_S_MAX)


def start_ray(host: Host, network: Network, environment: Mapping[str, str], *, name: str) -> None:
    """The head is to be started first."""
    head = network.hosts[HEAD].address
    where = ["--head", f"--port={RAY_PORT}"] if name == HEAD else [f"--address={head}:{RAY_PORT}"]
    host.run(
        RAY,
        "start",
        *where,
        f"--node-ip-address={host.address}",
        "--num-cpus=2",
        f"--labels=part={name},rack=r-{name}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        *(["--include-dashboard=false", f"--temp-dir={network.local}/r"] if name == HEAD else []),
        "--disable-usage-stats",
        environment={**environment, "RAY_TMPDIR": str(network.local)},
    )


def _keep_logs(network: Network) -> None:
    """Where PDSERVE_HOSTS_LOGS names a directory, the logs of every host go there."""
    target = os.environ.get("PDSERVE_HOSTS_LOGS")
    if not target:
        return
    for host in network.hosts.values():
        if host.is_up:
            path = Path(target) / host.name
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            with contextlib.suppress(AssertionError):
                host.run("sh", "-c", f"cp -rL {network.local}/r/session_latest/logs {path}")


def _end_of(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-3000:]
