"""Frames over real sockets: Unix, TCP and TLS; calls, answers, listeners."""

import asyncio
import contextlib
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import pytest

from pdserve.errors import (
    CapacityError,
    ConfigError,
    DeadlineExceeded,
    Disconnected,
    ErrorInfo,
    FrameError,
    TicketGone,
)
from pdserve.messages import Address
from pdserve.wire import connection as connection_module
from pdserve.wire.blocking import connect_blocking
from pdserve.wire.codec import MESSAGES
from pdserve.wire.connection import Connection, connect
from pdserve.wire.frame import Buffer
from pdserve.wire.listener import Listener
from pdserve.wire.tls import member_context
from tests.integration.certificates import make_certificates
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

__all__ = ["each_event_loop"]  # a fixture, for every test of this file


@dataclass(frozen=True)
class Certificates:
    server: ssl.SSLContext
    client: ssl.SSLContext
    stranger: ssl.SSLContext  # trusts the server, but has a certificate of another authority


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    ours = tmp_path_factory.mktemp("ours")
    theirs = tmp_path_factory.mktemp("theirs")
    for directory in (ours, theirs):
        make_certificates(directory)

    def context(own: Path, *, server_side: bool) -> ssl.SSLContext:
        return member_context(
            certificate=own / "member.pem",
            key=own / "member.key",
            authority=ours / "authority.pem",
            server_side=server_side,
        )

    return Certificates(
        server=context(ours, server_side=True),
        client=context(ours, server_side=False),
        stranger=context(theirs, server_side=False),
    )


@pytest.mark.parametrize("transport", ["unix", "tcp", "tls"])
def test_messages_and_bodies_arrive_as_they_were_sent(
    transport: str, tmp_path: Path, certificates: Certificates
) -> None:
    async def scenario() -> None:
        tls = transport == "tls"
        async with listening(tmp_path, tls=certificates.server if tls else None) as listener:
            client = await connect(
                listener.address,
                host=HERE if transport == "unix" else THERE,
                ssl_context=certificates.client if tls else None,
            )
            assert client.peer.startswith("unix:" if transport == "unix" else "tcp:127.0.0.1:")
            large = os.urandom(5 * MiB + 7)
            bodies: list[list[Buffer]] = [
                [],
                [b"x"],
                [b"ab", bytearray(b"cd"), memoryview(large)],
                [large] * 2,
            ]
            for body in bodies:
                frame = await client.call(cancel("r"), body, timeout_s=10)
                assert frame.message == cancel("r")
                assert bytes(frame.body) == b"".join(bytes(part) for part in body)
            await client.close()

    within(scenario())


def test_what_is_sent_now_is_in_order_and_refused_behind_what_is_under_way(tmp_path: Path) -> None:
    heard: list[object] = []
    reading = asyncio.Event()

    async def serve(connection: Connection) -> None:
        for _ in range(2):
            heard.append((await connection.receive()).message)
        await reading.wait()

    async def scenario() -> None:
        async with listening(tmp_path, serve) as listener:
            client = await connect(listener.address, host=HERE)
            assert client.send_now(cancel("first"))
            await client.send(cancel("second"))
            await until(lambda: len(heard) == 2)
            assert heard == [cancel("first"), cancel("second")]
            large = asyncio.create_task(client.send(cancel("large"), [bytes(64 * MiB)]))
            await until(lambda: not client.send_now(cancel("small")))
            assert not large.done(), "nobody reads it"
            client.abort()
            reading.set()
            with contextlib.suppress(Disconnected):
                await large
            assert not client.send_now(cancel("late"))

    within(scenario())


@pytest.mark.parametrize("transport", ["unix", "tcp", "tls"])
def test_a_thread_gets_the_same_frames_without_an_event_loop(
    transport: str, tmp_path: Path, certificates: Certificates
) -> None:
    tls = transport == "tls"

    def client(address: Address) -> None:
        peer = connect_blocking(
            address,
            host=HERE if transport == "unix" else THERE,
            codec=MESSAGES,
            ssl_context=certificates.client if tls else None,
        )
        large = os.urandom(3 * MiB + 1)
        into = memoryview(bytearray(4 * MiB))
        frame = peer.call(cancel("r"), [b"head", large], timeout_s=10, into=into)
        assert bytes(frame.body) == b"head" + large
        assert bytes(into[:4]) == b"head"
        assert bytes(peer.call(cancel("r"), [b"tail"], timeout_s=10).body) == b"tail"
        peer.close()
        peer.close()
        with pytest.raises(Disconnected, match="is closed"):
            peer.call(cancel("r"), timeout_s=10)

    async def scenario() -> None:
        async with listening(tmp_path, tls=certificates.server if tls else None) as listener:
            await asyncio.to_thread(client, listener.address)

    within(scenario())


async def call_once(address: Address, context: ssl.SSLContext | None) -> None:
    client = await connect(address, host=THERE, ssl_context=context)
    await client.call(cancel("r"), timeout_s=5)


def test_tls_refuses_strangers_and_plain_text(tmp_path: Path, certificates: Certificates) -> None:
    async def scenario() -> None:
        async with listening(tmp_path, tls=certificates.server) as listener:
            for context in (certificates.stranger, None):
                with pytest.raises(Disconnected):
                    await call_once(listener.address, context)

    within(scenario())


def test_unusable_certificates_are_a_config_error(tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        member_context(certificate=missing, key=missing, authority=missing, server_side=True)


def test_answers_find_their_calls_in_any_order(tmp_path: Path) -> None:
    async def backwards(connection: Connection) -> None:
        frames = [await connection.receive() for _ in range(20)]
        for frame in reversed(frames):
            await connection.answer(frame, frame.message)

    async def scenario() -> None:
        async with listening(tmp_path, backwards) as listener:
            client = await connect(listener.address, host=HERE)
            messages = [cancel(f"r{index}") for index in range(20)]
            answers = await asyncio.gather(*(client.call(m, timeout_s=10) for m in messages))
            assert [answer.message for answer in answers] == messages
            await client.close()

    within(scenario())


def test_an_error_as_answer_is_raised_as_itself(tmp_path: Path) -> None:
    async def refuse(connection: Connection) -> None:
        while True:
            frame = await connection.receive()
            await connection.answer(frame, ErrorInfo.of(TicketGone("ticket t-1 is gone")))

    async def scenario() -> None:
        async with listening(tmp_path, refuse) as listener:
            client = await connect(listener.address, host=HERE)
            with pytest.raises(TicketGone, match="ticket t-1 is gone"):
                await client.call(cancel("r"), timeout_s=10)
            peer = await asyncio.to_thread(
                connect_blocking, listener.address, host=HERE, codec=MESSAGES
            )
            for _ in range(2):  # an error leaves the connection usable
                with pytest.raises(TicketGone, match="ticket t-1 is gone"):
                    await asyncio.to_thread(peer.call, cancel("r"), timeout_s=10)
            peer.close()
            await client.close()

    within(scenario())


def test_a_late_answer_is_dropped_and_the_connection_goes_on(tmp_path: Path) -> None:
    async def one_late(connection: Connection) -> None:
        late = await connection.receive()
        frame = await connection.receive()
        await connection.answer(late, late.message)
        await connection.answer(frame, frame.message)
        await connection.receive()

    async def scenario() -> None:
        async with listening(tmp_path, one_late) as listener:
            client = await connect(listener.address, host=HERE)
            with pytest.raises(DeadlineExceeded, match=r"Cancel within 0\.01 s"):
                await client.call(cancel("late"), timeout_s=0.01)
            answer = await client.call(cancel("next"), timeout_s=10)
            assert answer.message == cancel("next")
            await client.close()

    within(scenario())


def test_calls_beyond_the_table_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "CALLS_MAX", 2)

    async def silent(connection: Connection) -> None:
        while True:
            await connection.receive()

    async def scenario() -> None:
        async with listening(tmp_path, silent) as listener:
            client = await connect(listener.address, host=HERE)
            waiting = [
                asyncio.ensure_future(client.call(cancel("r"), timeout_s=20)) for _ in range(2)
            ]
            await asyncio.sleep(0)
            with pytest.raises(CapacityError, match="2 calls to unix:pid="):
                await client.call(cancel("r"), timeout_s=20)
            await client.close()
            for call in waiting:
                with pytest.raises(Disconnected):
                    await call
            with pytest.raises(Disconnected):
                await client.call(cancel("r"), timeout_s=20)

    within(scenario())


def test_a_blocking_call_that_times_out_closes_its_connection(tmp_path: Path) -> None:
    async def silent(connection: Connection) -> None:
        await connection.receive()
        await connection.receive()

    def client(address: Address) -> None:
        peer = connect_blocking(address, host=HERE, codec=MESSAGES)
        with pytest.raises(DeadlineExceeded, match=r"within 0\.01 s"):
            peer.call(cancel("r"), timeout_s=0.01)
        with pytest.raises(Disconnected, match="is closed"):
            peer.call(cancel("r"), timeout_s=10)

    async def scenario() -> None:
        async with listening(tmp_path, silent) as listener:
            await asyncio.to_thread(client, listener.address)

    within(scenario())


def test_an_answer_that_does_not_fit_closes_the_connection(tmp_path: Path) -> None:
    def client(address: Address) -> None:
        peer = connect_blocking(address, host=HERE, codec=MESSAGES)
        with pytest.raises(FrameError, match="answers with 5 bytes, there is room for 4"):
            peer.call(cancel("r"), [b"12345"], timeout_s=10, into=memoryview(bytearray(4)))
        with pytest.raises(Disconnected, match="is closed"):
            peer.call(cancel("r"), timeout_s=10)

    async def scenario() -> None:
        async with listening(tmp_path) as listener:
            await asyncio.to_thread(client, listener.address)

    within(scenario())


def test_closing_a_listener_ends_its_connections_and_removes_its_socket(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with listening(tmp_path) as listener:
            client = await connect(listener.address, host=HERE)
            await client.call(cancel("r"), timeout_s=10)
            await listener.close()
            with pytest.raises(Disconnected):
                await client.receive()
            assert not Path(listener.address.unix_path).exists()
            for host in (HERE, THERE):
                with pytest.raises(Disconnected):
                    await connect(listener.address, host=host)
            await client.close()
            await client.close()

    within(scenario())


def test_a_live_listener_is_not_replaced_and_a_dead_ones_socket_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with listening(tmp_path):
            with pytest.raises(ConfigError, match="another process listens at"):
                await Listener.open(tmp_path / "sockets", "s", host=HERE, serve=echo)
        left_behind = socket.socket(socket.AF_UNIX)
        left_behind.bind(str(tmp_path / "sockets" / "s"))
        left_behind.close()
        async with listening(tmp_path) as listener:
            client = await connect(listener.address, host=HERE)
            await client.call(cancel("r"), timeout_s=10)
            await client.close()

    within(scenario())


def test_a_tcp_address_that_is_not_ours_is_a_config_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigError, match=r"cannot listen at 192\.0\.2\.1:0"):
            await Listener.open(tmp_path / "d", "s", host=HERE, serve=echo, tcp_host="192.0.2.1")
        assert list((tmp_path / "d").iterdir()) == []

    within(scenario())


def test_a_failing_server_closes_its_connection_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(connection: Connection) -> None:
        frame = await connection.receive()
        if frame.message == cancel("bad"):
            raise ZeroDivisionError
        await connection.answer(frame, frame.message)
        await connection.receive()

    async def scenario() -> None:
        async with listening(tmp_path, serve) as listener:
            good = await connect(listener.address, host=HERE)
            bad = await connect(listener.address, host=HERE)
            with pytest.raises(Disconnected):
                await bad.call(cancel("bad"), timeout_s=10)
            await good.call(cancel("good"), timeout_s=10)
            await good.close()
            await bad.close()

    within(scenario())
    assert "ZeroDivisionError" in caplog.text
