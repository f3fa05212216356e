"""The postbox: once and in order, across broken connections; bounded; and honest when it fails."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.errors import (
    CapacityError,
    FrameError,
)
from pdserve.ids import RequestId, WorkerId
from pdserve.lifecycle import Phase
from pdserve.messages import Address, Goodbye, Preempt
from pdserve.wire import connection as connection_module
from pdserve.wire.connection import Connection
from pdserve.wire.postbox import Postbox
from tests.integration.wire_peers import (
    HERE,
    THERE,
    cancel,
    each_event_loop,
    listening,
    until,
    within,
)

__all__ = ["each_event_loop"]  # a fixture, for every test of this file


class Mailbox:
    """Receives; may hang up after so many messages on one connection."""

    def __init__(self, hang_up_after: int | None = None) -> None:
        self.messages: list[object] = []
        self.connection_count = 0
        self._hang_up_after = hang_up_after

    async def serve(self, connection: Connection) -> None:
        self.connection_count += 1
        here = 0
        while here != self._hang_up_after:
            self.messages.append((await connection.receive()).message)
            here += 1
        connection.abort()


LETTERS = [cancel(f"r{index}") for index in range(3000)]


def test_posts_arrive_in_order_over_one_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        mailbox = Mailbox()
        async with listening(tmp_path, mailbox.serve) as listener:
            postbox = Postbox(host=HERE)
            for letter in LETTERS:
                postbox.post(listener.address, letter)
            await postbox.flush()
            await until(lambda: len(mailbox.messages) == len(LETTERS))
            assert mailbox.messages == LETTERS
            assert mailbox.connection_count == 1
            await postbox.close()

    within(scenario())


def test_messages_of_several_kinds_go_one_way(tmp_path: Path) -> None:
    async def scenario() -> None:
        mailbox = Mailbox()
        letters = [
            cancel("r"),
            Preempt(RequestId("r"), 1, Phase.PREFILLING),
            Goodbye(WorkerId("w")),
        ]
        async with listening(tmp_path, mailbox.serve) as listener:
            postbox = Postbox(host=THERE)
            for letter in letters:
                postbox.post(listener.address, letter)
            await until(lambda: len(mailbox.messages) == 3)
            assert mailbox.messages == letters
            await postbox.close()

    within(scenario())


def test_a_broken_connection_loses_repeats_and_reorders_nothing_that_was_received(
    tmp_path: Path,
) -> None:
    """What a connection had taken in but nobody had received dies with it on the receiver's side;
    so this reader takes everything before it hangs up."""

    async def scenario() -> None:
        received: list[object] = []
        connections: list[Connection] = []

        async def serve(connection: Connection) -> None:
            connections.append(connection)
            while True:
                received.append((await connection.receive()).message)

        async with listening(tmp_path, serve) as listener:
            postbox = Postbox(host=HERE)
            for start in range(0, len(LETTERS), 500):
                for letter in LETTERS[start : start + 500]:
                    postbox.post(listener.address, letter)
                target = start + 250
                await until(lambda target=target: len(received) >= target)
                connections[-1].abort()
            await postbox.flush()
            await until(lambda: len(received) == len(LETTERS))
            assert received == LETTERS
            assert len(connections) > 3
            await postbox.close()

    within(scenario())


def test_posts_wait_for_a_peer_that_comes_within_the_grace(tmp_path: Path) -> None:
    async def scenario() -> None:
        mailbox = Mailbox()
        postbox = Postbox(host=HERE)
        address = Address(HERE, str(tmp_path / "sockets" / "s"), "")
        postbox.post(address, cancel("early"))
        await asyncio.sleep(0.03)
        async with listening(tmp_path, mailbox.serve):
            await postbox.flush()
            await until(lambda: mailbox.messages)
            assert mailbox.messages == [cancel("early")]
            await postbox.close()

    within(scenario())


def test_a_peer_that_stays_away_gets_its_posts_returned(tmp_path: Path) -> None:
    async def scenario() -> None:
        returned: list[tuple[Address, list[object]]] = []
        postbox = Postbox(
            host=HERE,
            grace_s=0.05,
            on_undelivered=lambda address, messages: returned.append((address, messages)),
        )
        address = Address(HERE, str(tmp_path / "nobody"), "")
        for name in "abc":
            postbox.post(address, cancel(name))
        await postbox.flush()
        assert returned == [(address, [cancel("a"), cancel("b"), cancel("c")])]
        postbox.post(address, cancel("d"))
        await postbox.flush()
        assert returned[1:] == [(address, [cancel("d")])]
        await postbox.close()

    within(scenario())


def fill(postbox: Postbox, address: Address) -> None:
    while True:
        postbox.post(address, cancel("r"))


def test_a_full_outbox_refuses_and_delays_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "INBOUND_FRAMES_MAX", 4)

    async def never(connection: Connection) -> None:
        await asyncio.Event().wait()

    async def scenario() -> None:
        mailbox = Mailbox()
        async with (
            listening(tmp_path / "slow", never) as slow,
            listening(tmp_path / "quick", mailbox.serve) as quick,
        ):
            postbox = Postbox(host=HERE, outbox_max=10)
            with pytest.raises(CapacityError, match=r"10 messages of \d+ bytes wait for"):
                fill(postbox, slow.address)
            postbox.post(quick.address, cancel("quick"))
            await until(lambda: mailbox.messages)
            await postbox.close()

    within(scenario())


def test_an_outbox_is_full_by_bytes_too_and_has_room_again_when_they_have_arrived(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        mailbox = Mailbox()
        postbox = Postbox(host=HERE, outbox_bytes_max=10_000)
        large = [cancel(f"{index}" + "r" * 4_000) for index in range(3)]
        async with listening(tmp_path, mailbox.serve) as listener:
            for message in large[:2]:  # in one turn of the event loop: none has arrived
                postbox.post(listener.address, message)
            with pytest.raises(CapacityError, match=r"at most \d+ of 10000 may"):
                postbox.post(listener.address, large[2])
            await until(lambda: not postbox._outboxes[listener.address].letters)
            assert postbox._outboxes[listener.address].byte_count == 0
            alone = cancel("r" * 20_000)  # more than may wait, but nothing waits
            postbox.post(listener.address, alone)
            await until(lambda: alone in mailbox.messages)
            assert mailbox.messages == [*large[:2], alone]
            await postbox.close()

    within(scenario())


READER = """
import asyncio, sys
from pathlib import Path
from pdserve.wire.listener import Listener

names = []

async def serve(connection):
    while True:
        names.append((await connection.receive()).message.request)
        if names[-1] == "last":
            print(*names, flush=True)

async def main():
    listener = await Listener.open(Path(sys.argv[1]), "s", host="here", serve=serve, tcp_host=None)
    print("listens", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
"""Another process that reads, and in the end says what it has read."""


def test_a_peer_that_is_stopped_fills_its_outbox_and_misses_nothing_of_it(tmp_path: Path) -> None:
    """As a gateway that hangs under load: what waits is bounded, and comes when it goes on."""
    address = Address(HERE, str(tmp_path / "d" / "s"), "")

    async def scenario(process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "listens\n"
        postbox = Postbox(host=HERE, outbox_max=500)
        postbox.post(address, cancel("first"))
        await until(lambda: not postbox._outboxes[address].letters)
        os.kill(process.pid, signal.SIGSTOP)
        taken = ["first"]
        with contextlib.suppress(CapacityError):
            for index in range(10_000):
                postbox.post(address, cancel(f"r{index}"))
                taken.append(f"r{index}")
                await asyncio.sleep(0)
        assert len(taken) <= 1 + 500  # since then nobody has read
        os.kill(process.pid, signal.SIGCONT)
        await until(lambda: not postbox._outboxes[address].letters)
        postbox.post(address, cancel("last"))
        read = await asyncio.to_thread(process.stdout.readline)
        assert read.split() == [*taken, "last"]
        await postbox.close()

    with subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path / "d")], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            within(scenario(process), 120.0)
        finally:
            process.kill()


def test_an_idle_outbox_whose_peer_went_is_forgotten_and_opened_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        mailbox = Mailbox(hang_up_after=1)
        async with listening(tmp_path, mailbox.serve) as listener:
            postbox = Postbox(host=HERE)
            for name in "ab":
                postbox.post(listener.address, cancel(name))
                await until(lambda name=name: cancel(name) in mailbox.messages)
                await until(lambda: not postbox._outboxes)
            assert mailbox.messages == [cancel("a"), cancel("b")]
            assert mailbox.connection_count == 2
            await postbox.close()

    within(scenario())


def test_a_message_too_large_or_unknown_is_the_posters_problem(tmp_path: Path) -> None:
    async def scenario() -> None:
        postbox = Postbox(host=HERE)
        address = Address(HERE, str(tmp_path / "nobody"), "")
        with pytest.raises(FrameError, match="the limit is"):
            postbox.post(address, cancel("r" * (9 << 20)))
        with pytest.raises(TypeError, match="not a message type"):
            postbox.post(address, "text")
        await postbox.flush()
        await postbox.close()

    within(scenario())
