"""Tokens: what they allow, to whom, for how long; and that they cannot be made without the key."""

import base64
import json
from pathlib import Path

import pytest

from pdserve.clock import S
from pdserve.errors import AccessDenied, ConfigError
from pdserve.ids import BlockKey
from pdserve.kvstore import protocol
from pdserve.kvstore.admin import AskAudit, AskReport, EvictAll, SetDraining
from pdserve.kvstore.capability import (
    ALL_OPERATIONS,
    TENANT_BYTES,
    Capability,
    Gate,
    Operation,
    is_audited,
    key_prefix,
    main,
    mint,
    operation_of,
    read_key,
    verified,
)
from pdserve.wire.frame import Frame

KEY = b"k" * 32
KEYS = (BlockKey(b"a" * 16), BlockKey(b"b" * 16))


def token(
    *operations: Operation, tenant: str = "", valid_s: float = 60.0, now_s: float = 1e9
) -> str:
    return mint(KEY, operations=operations, tenant=tenant, valid_s=valid_s, now_s=now_s)


def opened(text: str, *, wall_s: float = 1e9) -> Capability:
    return verified(KEY, text, "w", wall_s=wall_s, now_ns=0)


def admitted(capability: Capability, message: object, now_ns: int = 0) -> object:
    return capability.admit(Frame(message, memoryview(b""), 1), now_ns).message


def test_a_token_allows_what_it_names_and_nothing_else() -> None:
    capability = opened(token(Operation.READ))
    claim = protocol.ClaimPrefix(KEYS)
    assert admitted(capability, claim) is claim
    with pytest.raises(AccessDenied, match="Reserve needs a token for write, this one allows read"):
        admitted(capability, protocol.Reserve(KEYS, 0))
    with pytest.raises(AccessDenied, match="needs a token for list"):
        admitted(capability, protocol.ListChanges(0))
    with pytest.raises(AccessDenied, match="needs a token for admin"):
        admitted(capability, protocol.Done())


def test_what_nobody_thought_of_is_for_administrators() -> None:
    assert operation_of(object()) is Operation.ADMIN


def test_what_changes_a_store_or_reads_others_data_is_audited_and_a_scrape_is_not() -> None:
    assert all(map(is_audited, (EvictAll(None, pinned=False), SetDraining(True), AskAudit(1))))
    assert is_audited(object()), "whatever is new"
    assert not is_audited(AskReport())
    assert not is_audited(protocol.AskStat())


@pytest.mark.parametrize(
    ("elapsed_s", "remaining_s"), [(0, 60), (59, 1), (-3600, 60)], ids=["now", "late", "clock back"]
)
def test_a_token_is_good_for_the_time_that_remains_and_never_longer(
    elapsed_s: int, remaining_s: int
) -> None:
    capability = opened(token(Operation.READ), wall_s=1e9 + elapsed_s)
    admitted(capability, protocol.AskStat(), remaining_s * S - 1)
    with pytest.raises(AccessDenied, match="has expired"):
        admitted(capability, protocol.AskStat(), remaining_s * S)


def test_an_expired_token_opens_nothing() -> None:
    with pytest.raises(AccessDenied, match="expired 5 s ago"):
        opened(token(Operation.READ), wall_s=1e9 + 65)


def test_a_token_cannot_be_made_or_changed_without_the_key() -> None:
    good = token(Operation.READ)
    version, payload, signature = good.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload)) | {"operations": ["admin"]}
    forged = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode()
    other = mint(b"x" * 32, operations=ALL_OPERATIONS, tenant="", valid_s=60, now_s=1e9)
    for bad in (
        f"{version}.{forged}.{signature}",
        f"pdkv0.{payload}.{signature}",
        other,
        good[:-2],
        "pdkv1..",
        "nonsense",
        "é.é.é",
    ):
        with pytest.raises(AccessDenied, match="not signed with this cluster's key"):
            opened(bad)
    with pytest.raises(AccessDenied, match="5000 characters"):
        opened("x" * 5000)


def test_a_tenants_keys_stay_its_own_and_all_others_become_nobodys() -> None:
    mine, theirs = opened(token(*Operation, tenant="a")), opened(token(*Operation, tenant="b"))
    prefix = key_prefix(KEY, "a")
    assert len(prefix) == TENANT_BYTES
    assert mine.key_prefix == prefix != theirs.key_prefix
    own = BlockKey(prefix + b"x" * 11)
    assert admitted(mine, protocol.ClaimPrefix((own,))) == protocol.ClaimPrefix((own,))
    assert admitted(theirs, protocol.FetchBlocks((own,), 0, 1)) != protocol.FetchBlocks(
        (own,), 0, 1
    )
    everybody = opened(token(*Operation))
    assert admitted(everybody, protocol.Reserve((own,), 0)) == protocol.Reserve((own,), 0)


def test_only_tcp_peers_of_a_node_with_a_key_need_a_token() -> None:
    greeting = protocol.Greet("w")
    for gate, peer in (
        (Gate(None, lambda: 0), "tcp:10.0.0.1:5"),
        (Gate(KEY, lambda: 0), "unix:pid=1"),
    ):
        assert gate.open(peer, greeting) == Capability("w")
    with pytest.raises(AccessDenied, match="needs a token"):
        Gate(KEY, lambda: 0).open("tcp:10.0.0.1:5", greeting)


def test_a_key_file_must_be_ones_own_and_long_enough(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="No such file"):
        read_key(path)
    path.write_bytes(KEY + b"\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"mode 644.*chmod 600"):
        read_key(path)
    path.chmod(0o600)
    assert read_key(path) == KEY
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="holds 5 bytes, at least 16"):
        read_key(path)


def test_the_command_prints_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "key"
    assert main(["--key-file", str(path)]) == 2
    path.touch(0o600)
    path.write_bytes(KEY)
    assert main(["--key-file", str(path), "--operations", "read", "list", "--tenant", "t"]) == 0
    capability = Gate(KEY, lambda: 0).open(
        "tcp:x:1", protocol.Greet("w", token=capsys.readouterr().out.strip())
    )
    assert capability.operations == {Operation.READ, Operation.LIST}
    assert capability.key_prefix == key_prefix(KEY, "t")
