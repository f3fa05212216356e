"""Closing a listener without losing whom it has.

To close a listening socket resets every connection that waits to be accepted, and every handshake
that is half done, although other sockets listen on the same port (``SO_REUSEPORT``): the kernel
chose the listener with the first packet (``net.ipv4.tcp_migrate_req`` would let it choose again).
So the listener is made deaf first: a filter drops packets that ask for a new connection, whose
senders repeat them a second later and reach another listener; who was there before completes its
handshake and is accepted. Then nothing is left that closing could break.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

HANDSHAKE_S = 0.25
"""For handshakes that had begun; a round trip around the world."""

ACCEPT_S_MAX = 2.0
"""For the owner to accept who waits. Its loop may be busy."""

_LOOK_S = 0.01

_SO_ATTACH_FILTER = 26
_ACCEPT_WHOLE_PACKET = 0xFFFFFFFF
_DEAF = (  # classic BPF; a packet begins with its TCP header, whose byte 13 has the flags
    (0x30, 0, 0, 13),  # load that byte
    (0x54, 0, 0, 0x12),  # of it SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone?
    (0x06, 0, 0, 0),  # drop it
    (0x06, 0, 0, _ACCEPT_WHOLE_PACKET),
)
_TCP_INFO_UNACKED = struct.Struct("24xI")
"""Of a listener: how many connections wait to be accepted."""


def listeners_at(port: int) -> list[socket.socket]:
    """This process's listening TCP sockets at ``port``, whoever opened them: duplicates, which the
    caller closes. Empty where the system does not tell."""
    return _sockets(lambda candidate: _is_at(candidate, port) and _listens(candidate))


def accepted_at(port: int) -> list[socket.socket]:
    """This process's connections that clients made to ``port``: duplicates, which the caller
    closes. Empty where the system does not tell."""
    return _sockets(
        lambda candidate: (
            _is_at(candidate, port) and not _listens(candidate) and bool(candidate.getpeername())
        )
    )


def _sockets(is_wanted: Callable[[socket.socket], bool]) -> list[socket.socket]:
    """An OSError says no."""
    found: list[socket.socket] = []
    with contextlib.suppress(OSError):
        for entry in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):
                if not str(entry.readlink()).startswith("socket:"):
                    continue
                candidate = socket.fromfd(int(entry.name), socket.AF_INET, socket.SOCK_STREAM)
                with contextlib.ExitStack() as unless_wanted:
                    unless_wanted.enter_context(candidate)
                    if is_wanted(candidate):
                        unless_wanted.pop_all()
                        found.append(candidate)
    return found


def _is_at(candidate: socket.socket, port: int) -> bool:
    family = candidate.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
    is_tcp = family in (socket.AF_INET, socket.AF_INET6)
    return is_tcp and bool(candidate.getsockname()[1] == port)


def _listens(candidate: socket.socket) -> bool:
    return bool(candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def shut_listeners_at(port: int) -> None:
    """Nobody new gets in, although their owner still has them open."""
    for each in listeners_at(port):
        with each, contextlib.suppress(OSError):  # of two duplicates the second is shut already
            each.shutdown(socket.SHUT_RD)


def hang_up_at(port: int) -> None:
    """Ends what is said to the clients of ``port``: whatever their owner writes from now on does
    not reach them, and they learn that nothing follows. What was written before still arrives."""
    for each in accepted_at(port):
        with each, contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_WR)


async def retire(listening: Iterable[socket.socket]) -> None:
    """New connections go elsewhere; returns when whoever was there is accepted, or after
    ``HANDSHAKE_S`` and ``ACCEPT_S_MAX``. The owner goes on accepting meanwhile, and closes after.
    """
    deaf = [each for each in listening if _make_deaf(each)]
    if not deaf:
        return
    await asyncio.sleep(HANDSHAKE_S)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ACCEPT_S_MAX):
            while any(map(waiting_count, deaf)):
                await asyncio.sleep(_LOOK_S)


def waiting_count(listening: socket.socket) -> int:
    """How many connections wait to be accepted; 0 where the system does not tell."""
    try:
        info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_UNACKED.size)
        (count,) = _TCP_INFO_UNACKED.unpack(info)
    except (OSError, AttributeError, struct.error):
        return 0
    return int(count)


def _make_deaf(listening: socket.socket) -> bool:
    """Whether it is; systems that cannot close at once, as ever."""
    import ctypes

    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _DEAF))
    program = struct.pack("HL", len(_DEAF), ctypes.addressof(code))
    try:
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError:
        return False
    return True
