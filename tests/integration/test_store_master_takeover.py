"""What a master does while the inventories of its hosts come in: it leads, and answers."""

import asyncio
import contextlib
import threading
import time
from pathlib import Path

import pytest

from pdserve.errors import StoreError
from pdserve.ids import BLOCK_KEY_BYTES
from pdserve.kvstore import protocol
from pdserve.kvstore.masters.block_index import Build, Columns
from pdserve.kvstore.masters.election import BEAT_NS, LEASE_NS
from pdserve.kvstore.masters.metadata import EmbeddedMetadata
from pdserve.kvstore.masters.process import MasterService, MasterSettings
from pdserve.kvstore.masters.protocol import (
    MASTER_PROTOCOL,
    AskMaster,
    Locate,
    Located,
    MasterReport,
)
from pdserve.messages import Address
from pdserve.wire.connection import Connection, connect
from pdserve.wire.hosts import local_host_id
from pdserve.wire.listener import Listener
from tests.integration.synthetic_node import SyntheticNode

KEYS = 100_000
NODES = 4
BEATS = LEASE_NS // BEAT_NS + 1
"""More of them than a lease has, so a build that kept the lease waiting would lose it."""

DEADLINE_S = 60.0


class HeldBuilds:
    """The first build of inventories begins when the lease has been renewed ``BEATS`` times since
    it was to, and a question has been answered. On the loop that does both it never would."""

    def __init__(self, metadata: EmbeddedMetadata, monkeypatch: pytest.MonkeyPatch) -> None:
        self._metadata = metadata
        self.waits = threading.Event()
        self.answered = threading.Event()
        self.waited_in_vain = False
        self.keys = 0
        plain, held = Build.run, self

        def run(build: Build) -> Columns:
            if not held.waits.is_set():
                held.waits.set()
                held.waited_in_vain = not held.wait()
            held.keys += sum(len(each) // BLOCK_KEY_BYTES for each in build.inventories.values())
            return plain(build)

        monkeypatch.setattr(Build, "run", run)

    def wait(self) -> bool:
        """In a thread. False: in vain."""
        until_s = time.monotonic() + DEADLINE_S
        first = self._beat()
        while (beat := self._beat()) is None or beat < (first or 0) + BEATS:
            if time.monotonic() > until_s:
                return False
            self.answered.wait(0.02)
        return self.answered.wait(until_s - time.monotonic())

    def _beat(self) -> int | None:
        """None while the table is busy."""
        with contextlib.suppress(StoreError):
            seat = self._metadata.seat()
            return None if seat is None else seat.beat
        return None


async def _ask(connection: Connection, message: object) -> object:
    return (await connection.call(message, timeout_s=DEADLINE_S)).message


async def _connected(address: Address) -> Connection:
    connection = await connect(
        address, host=local_host_id(), codec=MASTER_PROTOCOL, timeout_s=DEADLINE_S
    )
    await connection.call(protocol.Greet("test"), timeout_s=DEADLINE_S)
    return connection


def test_the_lease_is_renewed_and_questions_are_answered_while_inventories_come_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = EmbeddedMetadata(tmp_path / "members.sqlite")
    held = HeldBuilds(metadata, monkeypatch)
    nodes = [SyntheticNode(f"synthetic-{index}", KEYS // NODES) for index in range(NODES)]

    async def play() -> None:
        for node in nodes:
            await node.open(tmp_path / "nodes", metadata)
        service = MasterService(MasterSettings(directory=tmp_path, master="m"), metadata)
        listener = await Listener.open(
            tmp_path / "masters",
            "m.sock",
            host=local_host_id(),
            serve=service.serve,
            codec=MASTER_PROTOCOL,
        )
        running = asyncio.create_task(service.run(listener.address))
        try:
            async with asyncio.timeout(2 * DEADLINE_S):
                await asyncio.to_thread(held.waits.wait, DEADLINE_S)
                asking = await _connected(listener.address)
                early = await _ask(asking, AskMaster())
                assert isinstance(early, MasterReport)
                assert (early.is_whole, early.locations) == (False, 0)
                held.answered.set()
                while not (early.is_whole and early.locations == KEYS):
                    early = await _ask(asking, AskMaster())
                    assert isinstance(early, MasterReport)
                    await asyncio.sleep(0.01)  # between two questions
                for node in nodes:
                    for key in node.keys:
                        found = await _ask(asking, Locate(key))
                        assert isinstance(found, Located)
                        assert [each.store_id for each in found.locations] == [node.store_id]
                asking.abort()
        finally:
            running.cancel()
            await asyncio.wait((running,))
            await listener.close()
            for node in nodes:
                await node.close()

    asyncio.run(play())
    assert not held.waited_in_vain, f"the lease was not renewed within {DEADLINE_S:g} s"
    assert held.keys >= KEYS, "all inventories came in by builds"
