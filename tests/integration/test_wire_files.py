"""What only a Unix socket can do: files that come with an answer, messages that nobody answers."""

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pdserve.errors import DeadlineExceeded, Disconnected, FrameError
from pdserve.messages import Address
from pdserve.wire import blocking
from pdserve.wire.blocking import BlockingConnection, connect_blocking
from pdserve.wire.codec import MESSAGES
from pdserve.wire.connection import Connection
from tests.integration.wire_peers import (
    HERE,
    cancel,
    each_event_loop,
    echo,
    listening,
    within,
)

__all__ = ["each_event_loop"]  # a fixture, for every test of this file


def talk(directory: Path, serve: object, client: Callable[[BlockingConnection], None]) -> None:
    def connected(address: Address) -> None:
        peer = connect_blocking(address, host=HERE, codec=MESSAGES)
        try:
            client(peer)
        finally:
            peer.close()

    async def scenario() -> None:
        async with listening(directory, serve) as listener:
            await asyncio.to_thread(connected, listener.address)

    within(scenario())


@pytest.mark.parametrize("count", [1, 3])
def test_files_come_with_an_answer(tmp_path: Path, count: int) -> None:
    paths = [tmp_path / str(number) for number in range(count)]
    for path in paths:
        path.write_text(path.name)

    async def lend(connection: Connection) -> None:
        frame = await connection.receive()
        descriptors = [os.open(path, os.O_RDONLY) for path in paths]
        await connection.answer_with_files(frame, frame.message, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        await echo(connection)

    def client(peer: BlockingConnection) -> None:
        files: list[int] = []
        assert peer.call(cancel("r"), timeout_s=10, files=files).message == cancel("r")
        assert [os.pread(each, 10, 0).decode() for each in files] == [path.name for path in paths]
        for descriptor in files:
            assert not os.get_inheritable(descriptor)
            os.close(descriptor)
        assert bytes(peer.call(cancel("r"), [b"next"], timeout_s=10).body) == b"next"

    talk(tmp_path, lend, client)


def test_more_files_than_anybody_sends_end_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "FILES_MAX", 2)

    async def lend(connection: Connection) -> None:
        frame = await connection.receive()
        await connection.answer_with_files(frame, frame.message, [1] * 20)

    def client(peer: BlockingConnection) -> None:
        files: list[int] = []
        with pytest.raises(FrameError, match="more than 2 files"):
            peer.call(cancel("r"), timeout_s=10, files=files)
        assert not peer.is_open()
        for descriptor in files:
            os.close(descriptor)

    talk(tmp_path, lend, client)


def test_who_expects_no_files_gets_the_answer(tmp_path: Path) -> None:
    async def lend(connection: Connection) -> None:
        frame = await connection.receive()
        await connection.answer_with_files(frame, frame.message, [1])
        await echo(connection)

    def client(peer: BlockingConnection) -> None:
        for _ in range(2):
            assert peer.call(cancel("r"), timeout_s=10).message == cancel("r")

    talk(tmp_path, lend, client)


def test_a_post_is_received_before_the_call_behind_it(tmp_path: Path) -> None:
    async def count(connection: Connection) -> None:
        posted = 0
        while True:
            frame = await connection.receive()
            if frame.call:
                await connection.answer(frame, cancel(str(posted)))
            else:
                posted += 1

    def client(peer: BlockingConnection) -> None:
        for _ in range(3):
            assert peer.post(cancel("r"))
        assert peer.call(cancel("r"), timeout_s=10).message == cancel("3")

    talk(tmp_path, count, client)


def test_posts_to_who_does_not_read_are_dropped_and_nothing_is_torn(tmp_path: Path) -> None:
    reads = threading.Event()
    large = cancel("r" * 50_000)

    async def late(connection: Connection) -> None:
        connection._transport.pause_reading()
        await asyncio.to_thread(reads.wait)
        connection._transport.resume_reading()
        posted = 0
        while (frame := await connection.receive()).call == 0:
            assert frame.message == large
            posted += 1
        await connection.answer(frame, cancel(str(posted)))

    def client(peer: BlockingConnection) -> None:
        sent = 0
        while peer.post(large):
            sent += 1
        assert not peer.post(large)
        reads.set()
        assert peer.call(cancel("r"), timeout_s=10).message in (
            cancel(str(sent)),
            cancel(str(sent + 1)),
        )

    talk(tmp_path, late, client)


def test_a_peer_that_left_is_seen_without_a_call(tmp_path: Path) -> None:
    async def leave(connection: Connection) -> None:
        await connection.answer(await connection.receive(), cancel("r"))

    def client(peer: BlockingConnection) -> None:
        assert peer.is_open()
        peer.call(cancel("r"), timeout_s=10)
        with pytest.raises((Disconnected, DeadlineExceeded)):
            peer.call(cancel("r"), timeout_s=10)  # ends when the peer has left
        assert not peer.is_open()
        assert not peer.post(cancel("r"))

    talk(tmp_path, leave, client)
