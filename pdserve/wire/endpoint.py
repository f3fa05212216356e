"""Where a peer is reached, who may be there, and how a socket is set up for it.

A Unix socket belongs to one user: its directory is 0700, the socket 0600, and both sides ask the
kernel who is at the other end. Over TCP, TLS with certificates on both sides does the same; plain
TCP trusts its network, as Ray's own ports do.
"""

import asyncio
import os
import socket
import ssl
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pdserve.errors import ConfigError, Disconnected, FrameError
from pdserve.ids import HostId
from pdserve.messages import Address

UNIX_PATH_BYTES_MAX = 107
"""``sun_path`` holds 108 bytes, the last one zero."""

KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_PROBES = 3
UNACKNOWLEDGED_MS_MAX = 11_000
"""A host that died without a word is noticed as late as 5 + 3 * 2 seconds after."""


@dataclass(frozen=True, slots=True)
class UnixTarget:
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpTarget:
    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:{format_tcp(self.host, self.port)}"


Target = UnixTarget | TcpTarget


def target_of(address: Address, host: HostId) -> Target:
    """How a process on ``host`` reaches ``address``."""
    if address.host == host and address.unix_path:
        return UnixTarget(address.unix_path)
    if not address.tcp:
        raise Disconnected(
            f"{address.unix_path} is on host {address.host} and listens there only; this is "
            f"{host}: let it listen on TCP as well"
        )
    name, _, port = address.tcp.rpartition(":")
    if not name or not port.isdecimal():
        raise Disconnected(f"{address.tcp!r} is no address of the form host:port")
    return TcpTarget(name.removeprefix("[").removesuffix("]"), int(port))


def format_tcp(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def refused(target: Target, error: OSError) -> Disconnected:
    return Disconnected(f"cannot connect to {target}: {error.strerror or error}")


async def dial(
    make_protocol: Callable[[], asyncio.BaseProtocol],
    address: Address,
    *,
    host: HostId,
    timeout_s: float,
    ssl_context: ssl.SSLContext | None,
) -> None:
    """Connect what ``make_protocol`` gives to ``address``, from ``host``.

    Raises:
        Disconnected: nobody answers there within ``timeout_s``.
    """
    target = target_of(address, host)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            if isinstance(target, UnixTarget):
                await loop.create_unix_connection(make_protocol, target.path)
            else:
                await loop.create_connection(
                    make_protocol, target.host, target.port, ssl=ssl_context
                )
    except TimeoutError as error:
        raise Disconnected(f"{target} did not answer within {timeout_s} s") from error
    except OSError as error:
        raise refused(target, error) from error


def bind_unix(directory: Path, name: str) -> socket.socket:
    """A bound, not yet listening Unix socket that only this user can reach.

    Raises:
        ConfigError: the path is too long, somebody else's, open to others, or served already.
    """
    path = directory / name
    size = len(os.fsencode(path))
    if size > UNIX_PATH_BYTES_MAX:
        raise ConfigError(
            f"the socket path {path} has {size} bytes, the system allows {UNIX_PATH_BYTES_MAX}; "
            "choose a shorter directory"
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(
            f"the socket directory {directory} has mode {stat.S_IMODE(status.st_mode):o} and owner "
            f"{status.st_uid}; it must be this user's ({os.getuid()}) with mode 700"
        )
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        path.chmod(0o600)
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot listen at {path}: {error.strerror}") from error
    return listening


def set_up(connected: socket.socket) -> str:
    """Make a fresh connection ready for frames; what to call its other end in messages.

    Raises:
        FrameError: the process at the other end of a Unix socket runs as another user.
    """
    if connected.family == socket.AF_UNIX:
        credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _ = struct.unpack("3i", credentials)
        if not may_talk(uid, os.getuid()):
            raise FrameError(f"process {pid} runs as user {uid}, this one as {os.getuid()}")
        return f"unix:pid={pid}"
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
        (socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S),
        (socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
        (socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS_MAX),
    ):
        connected.setsockopt(socket.IPPROTO_TCP, option, value)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    host, port, *_ = connected.getpeername()
    return f"tcp:{format_tcp(host, port)}"


def is_local(peer: str) -> bool:
    """Whether ``set_up`` found a process of this host, and of this user."""
    return peer.startswith("unix:")


def may_talk(peer_uid: int, own_uid: int) -> bool:
    return peer_uid in (own_uid, 0)


def _remove_stale(path: Path) -> None:
    """Remove what a dead process left at ``path``; ConfigError when a live one listens there."""
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except OSError as error:
            raise ConfigError(f"{path} is in the way: {error.strerror}; remove it") from error
        else:
            raise ConfigError(f"another process listens at {path} already")
