"""``pdserve kv``, metrics and pins: stores on other hosts, which want certificates and tokens.

A real node that takes nobody over TCP without both; this process pretends to be on another host.
"""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pdserve.cluster.commands.kv_cli import kv
from pdserve.cluster.gateway.pinning import Pinning
from pdserve.cluster.store_metrics import reports_of
from pdserve.errors import AccessDenied, StoreUnavailable
from pdserve.kvstore.admin_client import StoreAdmin
from pdserve.kvstore.security import CREDENTIALS, Credentials
from tests.integration.certificates import make_certificates
from tests.integration.store_nodes import (
    ELSEWHERE,
    PATIENCE_S,
    Node,
    filler,
    keys_of,
    running_node,
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    directory = tmp_path_factory.mktemp("ours")
    make_certificates(directory)
    key_file = directory / "cluster.key"
    key_file.touch(0o600)
    key_file.write_bytes(b"the cluster's own secret")
    return Credentials(
        tls_authority=directory / "authority.pem",
        tls_certificate=directory / "member.pem",
        tls_key=directory / "member.key",
        key_file=key_file,
    )


@pytest.fixture(scope="module")
def node(ours: Credentials, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    files = asdict(ours)
    options = [("--" + name.replace("_", "-"), str(files[name])) for name in CREDENTIALS]
    arguments = [each for option in options for each in option]
    with running_node(tmp_path_factory.mktemp("node"), *arguments) as node:
        client = node.client("worker")
        assert client.put(keys_of("a", 3), 0, filler("a")) == 3
        client.close()
        yield node


@pytest.fixture
def snapshot(node: Node) -> dict[str, Any]:
    """A router's, which says that the store is on another host."""
    store = replace(node.address, host=ELSEWHERE)
    return {"workers": [{"store_id": "s", "store": asdict(store), "worker": "w"}]}


def _config(directory: Path, files: Credentials) -> Path:
    path = directory / "cluster.yaml"
    lines = [f"  {name}: {value}" for name, value in asdict(files).items()]
    path.write_text("\n".join(["store:", *lines]) + "\n")
    return path


def test_commands_reach_a_store_on_another_host_with_the_clusters_credentials(
    node: Node, ours: Credentials, tmp_path: Path
) -> None:
    known = ["--node", node.address.tcp, "--config", str(_config(tmp_path, ours))]
    runner = CliRunner()
    shown = runner.invoke(kv, ["stat", *known])
    assert shown.exit_code == 0, shown.exception
    audited = runner.invoke(kv, ["audit", *known])
    assert "3 checksums: all as it should be" in audited.output
    with pytest.raises(StoreUnavailable):
        runner.invoke(kv, ["stat", *known[:2]], catch_exceptions=False)


def test_a_certificate_alone_is_not_enough(node: Node, ours: Credentials) -> None:
    with pytest.raises(AccessDenied):
        StoreAdmin(node.address, host=ELSEWHERE, credentials=replace(ours, key_file=None))


def test_a_gateway_knows_and_pins_what_other_hosts_have(
    node: Node, ours: Credentials, snapshot: dict[str, Any]
) -> None:
    async def scenario() -> None:
        assert await reports_of(snapshot) == {}, "nobody without credentials"
        pinning = Pinning(_given(snapshot), ours)
        running = asyncio.create_task(pinning.run())
        try:
            async with asyncio.timeout(PATIENCE_S):
                # A node that has to wait for a core is left out of a scrape, or gets no pin.
                while (await _soft_pins(snapshot, ours)) < 3:
                    pinning.keep(keys_of("a", 3), 600_000)
                    await asyncio.sleep(0.02)
        finally:
            running.cancel()

    asyncio.run(scenario())


def _given(snapshot: Mapping[str, Any]) -> Any:
    async def give() -> Mapping[str, Any]:
        return snapshot

    return give


async def _soft_pins(snapshot: Mapping[str, Any], credentials: Credentials) -> int:
    reports = await reports_of(snapshot, credentials)
    return sum(report.pins["soft"] for report in reports.values())
