"""Peers that die, peers that dawdle, peers that talk nonsense."""

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from pdserve.errors import (
    Disconnected,
    FrameError,
)
from pdserve.ids import HostId
from pdserve.messages import Address
from pdserve.wire import connection as connection_module
from pdserve.wire.blocking import BlockingConnection, connect_blocking
from pdserve.wire.codec import MESSAGES
from pdserve.wire.connection import INBOUND_BYTES_MAX, Connection, connect
from pdserve.wire.endpoint import may_talk
from pdserve.wire.frame import BODY_BYTES_MAX, VERSION, Header, Kind, pack_header
from tests.integration.wire_peers import (
    HERE,
    THERE,
    MiB,
    cancel,
    each_event_loop,
    echo,
    listening,
    until,
    within,
)

SILENT_PEER = """
import asyncio, sys
from pathlib import Path
from pdserve.wire.listener import Listener

async def serve(connection):
    print("connected", flush=True)
    await connection.receive()
    print("received", flush=True)
    await connection.receive()

async def main():
    listener = await Listener.open(Path(sys.argv[1]), "s", host="here", serve=serve,
                                   tcp_host="127.0.0.1")
    print(listener.address.tcp, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

__all__ = ["each_event_loop"]  # a fixture, for every test of this file


@contextlib.contextmanager
def silent_peer(directory: Path) -> Any:
    """Another process that takes one message and never answers; and its address."""
    with subprocess.Popen(
        [sys.executable, "-c", SILENT_PEER, str(directory)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        tcp = process.stdout.readline().strip()
        try:
            yield process, Address(HERE, str(directory / "s"), tcp)
        finally:
            process.kill()


@pytest.mark.parametrize("host", [HERE, THERE])
def test_a_killed_peer_ends_every_waiting_call(host: HostId, tmp_path: Path) -> None:
    async def scenario() -> None:
        with silent_peer(tmp_path / "d") as (process, address):
            client = await connect(address, host=host)
            calls = [asyncio.ensure_future(client.call(cancel("r"), timeout_s=20)) for _ in "abc"]
            receiving = asyncio.ensure_future(client.receive())
            for line in ("connected", "received"):
                assert await asyncio.to_thread(process.stdout.readline) == line + "\n"
            process.kill()
            for waiting in (*calls, receiving):
                with pytest.raises(Disconnected, match="is gone"):
                    await waiting
            with pytest.raises(Disconnected):
                await client.send(cancel("r"))
            await client.close()

    within(scenario())


@pytest.mark.parametrize("host", [HERE, THERE])
def test_a_killed_peer_ends_a_blocking_call(host: HostId, tmp_path: Path) -> None:
    async def scenario() -> None:
        with silent_peer(tmp_path / "d") as (process, address):
            peer = await asyncio.to_thread(connect_blocking, address, host=host, codec=MESSAGES)
            call = asyncio.ensure_future(asyncio.to_thread(peer.call, cancel("r"), timeout_s=20))
            for line in ("connected", "received"):
                assert await asyncio.to_thread(process.stdout.readline) == line + "\n"
            process.kill()
            with pytest.raises(Disconnected, match="is gone"):
                await call

    within(scenario())


def test_what_arrived_before_the_end_is_still_received(tmp_path: Path) -> None:
    received: list[object] = []
    may_begin = asyncio.Event()
    done = asyncio.Event()

    async def late_reader(connection: Connection) -> None:
        await may_begin.wait()
        with contextlib.suppress(Disconnected):
            while True:
                received.append((await connection.receive()).message)
        done.set()

    async def scenario() -> None:
        async with listening(tmp_path, late_reader) as listener:
            client = await connect(listener.address, host=HERE)
            for index in range(100):
                await client.send(cancel(f"r{index}"))
            await client.close()
            may_begin.set()
            await done.wait()
            assert received == [cancel(f"r{index}") for index in range(100)]

    within(scenario())


def test_nobody_at_the_address_says_so(tmp_path: Path) -> None:
    address = Address(HERE, str(tmp_path / "nobody"), "127.0.0.1:1")

    async def scenario() -> None:
        for host, problem in ((HERE, "unix:.*No such file"), (THERE, "tcp:127.0.0.1:1: ")):
            with pytest.raises(Disconnected, match=f"cannot connect to {problem}"):
                await connect(address, host=host)
            with pytest.raises(Disconnected, match=f"cannot connect to {problem}"):
                await asyncio.to_thread(connect_blocking, address, host=host, codec=MESSAGES)

    within(scenario())


def test_a_peer_that_does_not_receive_stops_the_sender_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    may_begin = asyncio.Event()
    received: list[object] = []
    count = 3 * INBOUND_BYTES_MAX // MiB
    sent = 0

    async def late_reader(connection: Connection) -> None:
        await may_begin.wait()
        while True:
            frame = await connection.receive()
            assert len(frame.body) == MiB
            received.append(frame.message)

    async def send_all(client: Connection) -> None:
        nonlocal sent
        body = bytes(MiB)
        for index in range(count):
            await client.send(cancel(f"r{index}"), [body])
            sent += 1

    async def scenario() -> None:
        async with listening(tmp_path, late_reader) as listener:
            client = await connect(listener.address, host=HERE)
            sender = asyncio.ensure_future(send_all(client))
            await asyncio.wait({sender}, timeout=1.0)
            assert not sender.done()
            assert sent <= INBOUND_BYTES_MAX // MiB + 1
            may_begin.set()
            await sender
            await until(lambda: len(received) == count)
            assert received == [cancel(f"r{index}") for index in range(count)]
            await client.close()

    within(scenario())


def test_small_frames_that_nobody_receives_are_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "INBOUND_FRAMES_MAX", 8)
    may_begin = asyncio.Event()
    received: list[object] = []
    connections: list[Connection] = []

    async def send_thousand(client: Connection) -> None:
        for index in range(1000):
            await client.send(cancel(f"r{index}"))

    async def late_reader(connection: Connection) -> None:
        connections.append(connection)
        await may_begin.wait()
        while True:
            received.append((await connection.receive()).message)

    async def scenario() -> None:
        async with listening(tmp_path, late_reader) as listener:
            client = await connect(listener.address, host=HERE)
            sender = asyncio.ensure_future(send_thousand(client))
            await until(lambda: connections and len(connections[0]._inbound) == 8)
            may_begin.set()
            await sender
            await until(lambda: len(received) == 1000)
            assert received == [cancel(f"r{index}") for index in range(1000)]
            await client.close()

    within(scenario())


def test_a_send_cancelled_within_a_body_ends_the_connection(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def reader(connection: Connection) -> None:
        await asyncio.sleep(0.05)
        with contextlib.suppress(Disconnected):
            while True:
                await connection.receive()
        ended.set()

    async def scenario() -> None:
        async with listening(tmp_path, reader) as listener:
            client = await connect(listener.address, host=HERE)
            sending = asyncio.ensure_future(client.send(cancel("r"), [bytes(BODY_BYTES_MAX)]))
            await asyncio.wait({sending}, timeout=0.01)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            with pytest.raises(Disconnected):
                await client.send(cancel("next"))
            await ended.wait()

    within(scenario())


def raw_header(message_bytes: int, body_bytes: int, message: bytes = b"") -> bytes:
    lengths = message_bytes, body_bytes, zlib.crc32(message)
    data = struct.pack("<4sBBHQIQI", b"pdsv", VERSION, 1, 0, 0, *lengths)
    return data + struct.pack("<I", zlib.crc32(data))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n", "not a pdserve peer"),
        (raw_header(0, 1 << 60), "a body of 1152921504606846976 bytes"),
        (raw_header(0xFFFFFFFF, 0), "a message of 4294967295 bytes"),
        (raw_header(3, 0, b"abc") + b"abc", "not msgpack"),
        (raw_header(3, 0, b"abc") + b"abd", "a message fails its checksum"),
        (pack_header(Header(Kind.POST, 1, 0, 0)), "without a poster"),
        (pack_header(Header(Kind.RECEIPT, 1, 0, 9)) + bytes(9), "must be bare"),
    ],
)
def test_nonsense_closes_its_own_connection_and_no_other(
    data: bytes, problem: str, tmp_path: Path
) -> None:
    problems: list[str] = []

    async def serve(connection: Connection) -> None:
        try:
            await echo(connection)
        except FrameError as error:
            problems.append(str(error))
            raise

    async def scenario() -> None:
        async with listening(tmp_path, serve) as listener:
            good = await connect(listener.address, host=HERE)
            reader, writer = await asyncio.open_unix_connection(listener.address.unix_path)
            writer.write(data)
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
            await until(lambda: problems)
            assert problem in problems[0]
            assert (await good.call(cancel("r"), timeout_s=10)).message == cancel("r")
            await good.close()

    within(scenario())


def test_a_thread_is_told_when_its_peer_talks_nonsense() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        peer = BlockingConnection(ours, MESSAGES)
        theirs.sendall(raw_header(1, 0, b"\x01") + b"\x01")
        with pytest.raises(FrameError, match="not the answer to call 1"):
            peer.call(cancel("r"), timeout_s=10)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_another_user_is_refused(tmp_path: Path) -> None:
    opened: list[Connection] = []

    async def serve(connection: Connection) -> None:
        opened.append(connection)

    stranger = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "s.connect(sys.argv[1])\n"
        "print(len(s.recv(1)))\n"
    )

    async def scenario(directory: Path) -> None:
        async with listening(directory, serve) as listener:
            path = Path(listener.address.unix_path)
            for part in (*directory.parents, directory, path.parent, path):
                if part.is_relative_to(tmp_path.parents[1]):
                    part.chmod(0o777)
            said = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-c", stranger, str(path)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert said.stdout == "0\n" or "reset" in said.stderr, said.stderr
            assert opened == []

    assert not may_talk(65534, 0)
    within(scenario(tmp_path))
