"""Which way to a peer, and who may be at a socket."""

from pathlib import Path

import pytest

from pdserve.errors import ConfigError, Disconnected
from pdserve.ids import HostId
from pdserve.messages import Address
from pdserve.wire.endpoint import (
    UNIX_PATH_BYTES_MAX,
    TcpTarget,
    UnixTarget,
    bind_unix,
    format_tcp,
    may_talk,
    target_of,
)
from pdserve.wire.hosts import local_host_id

HERE = HostId("here")
THERE = HostId("there")


def test_the_same_host_uses_the_unix_socket_and_another_one_tcp() -> None:
    address = Address(HERE, "/run/w.sock", "10.0.0.1:4000")
    assert target_of(address, HERE) == UnixTarget("/run/w.sock")
    assert target_of(address, THERE) == TcpTarget("10.0.0.1", 4000)


def test_without_a_unix_socket_the_same_host_uses_tcp() -> None:
    assert target_of(Address(HERE, "", "[::1]:4000"), HERE) == TcpTarget("::1", 4000)


@pytest.mark.parametrize("host", ["10.0.0.1", "::1", "node-7"])
def test_a_tcp_address_comes_back_as_it_was(host: str) -> None:
    address = Address(THERE, "", format_tcp(host, 80))
    assert target_of(address, HERE) == TcpTarget(host, 80)


@pytest.mark.parametrize(
    ("tcp", "problem"),
    [("", "listens there only"), ("node:port", "host:port"), (":80", "host:port"), ("n", "host")],
)
def test_an_address_that_leads_nowhere_says_why(tcp: str, problem: str) -> None:
    with pytest.raises(Disconnected, match=problem):
        target_of(Address(THERE, "/run/w.sock", tcp), HERE)


def test_only_this_user_and_root_may_talk() -> None:
    assert may_talk(1000, 1000)
    assert may_talk(0, 1000)
    assert not may_talk(1001, 1000)
    assert not may_talk(1000, 0)


def test_too_long_a_socket_path_says_both_lengths(tmp_path: Path) -> None:
    name = "n" * UNIX_PATH_BYTES_MAX
    with pytest.raises(ConfigError, match=f"bytes, the system allows {UNIX_PATH_BYTES_MAX}"):
        bind_unix(tmp_path, name)


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o755)
    with pytest.raises(ConfigError, match=r"mode 755 .* with mode 700"):
        bind_unix(directory, "s")


def test_a_fresh_directory_and_socket_belong_to_this_user_alone(tmp_path: Path) -> None:
    with bind_unix(tmp_path / "fresh", "s"):
        assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "fresh" / "s").stat().st_mode & 0o777 == 0o600


def test_the_host_id_is_stable_and_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PDSERVE_HOST_ID", raising=False)
    own = local_host_id()
    assert own == local_host_id()
    assert own.startswith("host-")
    monkeypatch.setenv("PDSERVE_HOST_ID", "host-b")
    assert local_host_id() == "host-b"
