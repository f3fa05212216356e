"""The postbox: once and in order, across broken connections; bounded; and honest when it fails."""

import asyncio
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
            with pytest.raises(CapacityError, match="10 messages wait for"):
                fill(postbox, slow.address)
            postbox.post(quick.address, cancel("quick"))
            await until(lambda: mailbox.messages)
            await postbox.close()

    within(scenario())


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
