"""Who gets at a store over TCP: certificates, tokens, tenants; real nodes, real sockets."""

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.errors import AccessDenied, ConfigError, FrameError, PdserveError, StoreUnavailable
from pdserve.ids import StoreId
from pdserve.kvstore.admin import AskReport
from pdserve.kvstore.answers import ClaimGrant
from pdserve.kvstore.arena import Geometry, create_arena
from pdserve.kvstore.capability import ALL_OPERATIONS, Operation, mint
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.lending import Lending
from pdserve.kvstore.masters.client import MasterClient
from pdserve.kvstore.protocol import PROTOCOL, Done, Greet, Welcome
from pdserve.kvstore.security import Credentials
from pdserve.kvstore.server import StoreServer
from pdserve.wire.connection import connect
from pdserve.wire.hosts import local_host_id
from pdserve.wire.listener import Listener
from tests.integration.certificates import make_certificates
from tests.integration.store_masters import running_master, until
from tests.integration.store_nodes import (
    BLOCK_BYTES,
    Node,
    content,
    filler,
    keys_of,
    read,
    running_node,
)

KEY = b"the cluster's own secret"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ours")
    make_certificates(directory)
    (directory / "cluster.key").touch(0o600)
    (directory / "cluster.key").write_bytes(KEY)
    return directory


@pytest.fixture(scope="module")
def node(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Wants both, a certificate and a token."""
    arguments = (
        *("--tls-authority", str(ours / "authority.pem")),
        *("--tls-certificate", str(ours / "member.pem")),
        *("--tls-key", str(ours / "member.key")),
        *("--key-file", str(ours / "cluster.key")),
    )
    with running_node(tmp_path_factory.mktemp("node"), *arguments) as node:
        yield node


def credentials(
    directory: Path, name: str = "member", authority: Path | None = None
) -> Credentials:
    return Credentials(
        tls_authority=(authority or directory) / "authority.pem",
        tls_certificate=directory / f"{name}.pem",
        tls_key=directory / f"{name}.key",
        key_file=directory / "cluster.key",
    )


def token(*operations: Operation, tenant: str = "", valid_s: float = 60.0) -> str:
    return mint(KEY, operations=operations, tenant=tenant, valid_s=valid_s, now_s=time.time())


def test_a_worker_of_the_cluster_reads_and_writes(node: Node, ours: Path) -> None:
    own = credentials(ours)
    client = node.client(
        "w",
        remote=True,
        ssl_context=own.ssl_context(server_side=False),
        token=own.worker_token(),
    )
    assert client.put(keys_of("worker", 3), 0, filler("worker")) == 3
    assert read(client, keys_of("worker", 3)) == [content("worker", index) for index in range(3)]
    assert client.changes(0).sequence > 0
    client.close()


def test_peers_on_the_host_need_neither(node: Node) -> None:
    client = node.client("local")
    assert client.claim(keys_of("nothing", 1)).count == 0
    client.close()


def test_without_a_certificate_of_our_authority_nobody_gets_in(
    node: Node, ours: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    make_certificates(theirs)
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.load_verify_locations(ours / "authority.pem")
    refused = {
        "signed by somebody else": credentials(theirs, authority=ours),
        "a node of somebody else": credentials(ours, authority=theirs),
        "expired": credentials(ours, "expired"),
    }
    contexts = {name: each.ssl_context(server_side=False) for name, each in refused.items()}
    for name, context in (contexts | {"no certificate": bare, "plain text": None}).items():
        with pytest.raises(StoreUnavailable):
            node.client(name, remote=True, ssl_context=context, token=token(*ALL_OPERATIONS))


def test_a_token_is_needed_and_allows_what_it_says(node: Node, ours: Path) -> None:
    context = credentials(ours).ssl_context(server_side=False)
    wrong = mint(b"x" * 32, operations=ALL_OPERATIONS, tenant="", valid_s=60, now_s=time.time())
    for bad in ("", wrong, token(Operation.READ, valid_s=-1)):
        with pytest.raises(AccessDenied):
            node.client("w", remote=True, ssl_context=context, token=bad)
    reader = node.client("r", remote=True, ssl_context=context, token=token(Operation.READ))
    assert reader.claim(keys_of("nothing", 1)).count == 0
    with pytest.raises(AccessDenied, match="Reserve needs a token for write"):
        reader.put(keys_of("refused", 2), 0, filler("refused"))
    with pytest.raises(AccessDenied, match="needs a token for list"):
        reader.changes(0)
    assert reader.fetch(keys_of("refused", 1), [memoryview(bytearray(BLOCK_BYTES))]) == 0
    reader.close()


def test_a_foreign_tenants_block_is_a_miss_like_any_other(node: Node, ours: Path) -> None:
    context = credentials(ours).ssl_context(server_side=False)
    operations = (Operation.READ, Operation.WRITE)
    one, two = (
        node.client(name, remote=True, ssl_context=context, token=token(*operations, tenant=name))
        for name in ("one", "two")
    )
    keys = keys_of("shared prompt", 3)
    assert one.put(keys, 0, filler("of one")) == 3
    assert read(one, keys) == [content("of one", index) for index in range(3)]
    local = node.client("l")
    stored = list(local.changes(0).added)[-3:]
    nothing = ClaimGrant(0, (), (), has_tail=False)
    honest = two._key_prefix
    for prefix in (honest, b""):  # a client need not say what it is told to say
        two._key_prefix = prefix
        for probe in (keys, stored, keys_of("never stored", 3)):
            assert two.claim(probe).grant == nothing
    two._key_prefix = honest
    assert local.claim(stored).count == 3, "it is there, under its tenant's keys"
    assert two.put(keys, 0, filler("of two")) == 3
    assert read(two, keys) == [content("of two", index) for index in range(3)]
    assert read(one, keys) == [content("of one", index) for index in range(3)]
    for client in (one, two, local):
        client.close()


def test_an_operation_for_administrators_leaves_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    geometry = Geometry(2, 64)
    arena = create_arena(tmp_path / "arena", geometry, StoreId("s"))
    welcome = Welcome(StoreId("s"), 64, "")

    async def ask(everything: str) -> PdserveError:
        lending = Lending(tmp_path / "arena", 2)
        server = StoreServer(StoreCore(2), arena, welcome, lending, cluster_key=KEY)
        here = local_host_id()
        listener = await Listener.open(
            tmp_path / "sockets", "s", host=here, serve=server.serve, codec=PROTOCOL,
            tcp_host="127.0.0.1",
        )  # fmt: skip
        try:
            peer = await connect(listener.address, host=type(here)("elsewhere"), codec=PROTOCOL)
            await peer.call(Greet("somebody", token=everything), timeout_s=10)
            with contextlib.suppress(AccessDenied):
                await peer.call(AskReport(), timeout_s=10)  # as a scrape does
            with pytest.raises(PdserveError) as caught:
                await peer.call(Done(), timeout_s=10)  # no request of any client
            await peer.close()
            return caught.value
        finally:
            await listener.close()
            lending.close()

    caplog.set_level(logging.INFO, "pdserve.kvstore.audit")
    assert isinstance(asyncio.run(ask(token(Operation.READ))), AccessDenied)
    assert caplog.messages == []
    assert isinstance(asyncio.run(ask(token(*ALL_OPERATIONS))), FrameError)
    (line,) = [record.message for record in caplog.records if "audit" in record.name]
    assert line.startswith("Done by somebody at tcp:127.0.0.1:")


def test_a_node_refuses_a_key_that_others_can_read(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(KEY)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="nobody else may read it"):
        Credentials(key_file=path).cluster_key()


def test_a_master_asks_and_is_asked_with_certificate_and_token(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "tls_authority": ours / "authority.pem",
        "tls_certificate": ours / "member.pem",
        "tls_key": ours / "member.key",
        "key_file": ours / "cluster.key",
    }
    arguments = [
        *("--metadata", str(tmp_path / "members.sqlite")),
        *(
            part
            for name, path in files.items()
            for part in (f"--{name.replace('_', '-')}", str(path))
        ),
    ]
    with running_node(tmp_path, *arguments) as node:
        local = node.client("w")
        assert local.put(keys_of("m", 3), 0, filler("m")) == 3
        local.close()
        monkeypatch.setenv("PDSERVE_HOST_ID", "elsewhere")  # so that it goes over TCP
        with running_master(tmp_path, "m1", *arguments) as master:
            ours_client = MasterClient([master.tcp], Credentials(**files), name="t")

            def counts() -> list[int] | None:
                try:
                    found = ours_client.locate(keys_of("m", 4))
                except StoreUnavailable:
                    return None
                return [each.count for each in found] or None

            assert until(counts, "the node's blocks") == [3]
            ours_client.close()
            with pytest.raises(StoreUnavailable):
                MasterClient([master.tcp], name="t").report()
            uncertified = Credentials(**{**files, "key_file": None})
            with pytest.raises(AccessDenied, match="needs a token"):
                MasterClient([master.tcp], uncertified, name="t").report()
