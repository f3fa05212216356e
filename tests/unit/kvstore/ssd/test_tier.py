"""The tier over a real core, arena and log: what goes down and when, and a disk that fails."""

import asyncio
import errno
import os
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pdserve.config import SsdWrite
from pdserve.ids import BlockKey, StoreId
from pdserve.kvstore.arena import Geometry, block_checksum, create_arena
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.ssd.log import SsdLog, open_log
from pdserve.kvstore.ssd.tier import (
    READ_FAILURES_MAX,
    WRITES_WAITING_MAX,
    SsdTier,
    parts_of,
)

BLOCK_BYTES = 8000
SLOT_COUNT = 8
CHAIN = 4


def chain(name: int, count: int = CHAIN) -> list[BlockKey]:
    return [BlockKey(bytes([name, index]) * 8) for index in range(count)]


def content(key: BlockKey) -> bytes:
    return (key * BLOCK_BYTES)[:BLOCK_BYTES]


class Rig:
    """What a node has, but for its connections. ``settle`` is the server's part."""

    def __init__(self, directory: Path, policy: SsdWrite = "second_touch") -> None:
        directory.mkdir(exist_ok=True)
        geometry = Geometry(SLOT_COUNT, BLOCK_BYTES)
        self.arena = create_arena(directory / f"arena{policy}", geometry, StoreId("s"))
        self.log: SsdLog = open_log(directory / "ssd", BLOCK_BYTES, 4 << 20, segment_bytes=1 << 20)
        self.core = StoreCore(SLOT_COUNT, eviction="lru", lower=self.log)
        self.owner = self.core.connect("w")
        self.loop = asyncio.new_event_loop()
        self.tier = SsdTier(self.core, self.arena, self.log, policy=policy)
        self.tier.settle = self.settle

    def settle(self) -> None:
        self.core.check()
        self.tier.evicted(self.core.take_evicted())

    def put(self, keys: Sequence[BlockKey]) -> None:
        async def event() -> None:  # as the server has it: in a loop
            grant = self.core.reserve(self.owner, keys, 0)
            self.settle()  # before the answer that lets somebody write
            for position, slot in enumerate(grant.slots):
                key = keys[grant.first_index + position]
                self.arena.write(slot, memoryview(content(key)))
                checksum = block_checksum(key, self.arena.payload(slot))
                self.core.filled(self.owner, grant.write, position, checksum)
            if grant.write:
                self.core.commit(self.owner, grant.write)
                self.tier.stored(keys)

        self.run(event())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def drain(self) -> None:
        """Write what waits."""

        async def drain() -> None:
            writing = asyncio.create_task(self.tier.run())
            await self.tier.finish()
            assert not writing.done()
            writing.cancel()

        self.run(drain())
        self.settle()

    def down(self, keys: Sequence[BlockKey]) -> None:
        self.put(keys)
        self.tier.found(keys)
        self.drain()

    def fetch(self, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks are in the arena afterwards; they are what was put."""
        self.run(self.tier.fetch(keys))
        claim = self.core.hold(self.owner, keys)
        for slot, key in zip(claim.slots, keys, strict=False):
            assert bytes(self.arena.payload(slot)) == content(key)
        self.core.release(self.owner, claim.claim)
        return len(claim.slots)

    def is_usable(self, what: str) -> bool:
        async def usable() -> bool:
            health = self.tier._writing if what == "writing" else self.tier._reading
            return health.is_usable(asyncio.get_running_loop().time())

        return bool(self.run(usable()))

    def later(self) -> None:
        """The pause is over."""
        for health in (self.tier._writing, self.tier._reading):
            health._until_s = 0.0

    def close(self) -> None:
        self.tier.close()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def refusing(number: int) -> Any:
    def refuses(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuses


def test_what_is_found_goes_down_and_comes_up(rig: Rig) -> None:
    rig.put(chain(1))
    rig.drain()
    assert len(rig.log) == 0, "used once"
    rig.tier.found(chain(1))
    rig.drain()
    assert list(rig.log) == chain(1)
    rig.put(chain(2))
    rig.put(chain(3))
    assert rig.core.prefix_count(chain(1)) == 0
    assert rig.fetch(chain(1)) == CHAIN
    assert rig.tier.stat()["read"] == CHAIN


def test_write_through_takes_what_is_stored(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "write_through")
    rig.put(chain(1))
    rig.tier.found(chain(1))
    rig.drain()
    assert list(rig.log) == chain(1)
    rig.close()


def test_on_evict_takes_what_leaves_with_the_bytes_that_it_had(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "on_evict")
    rig.put(chain(1))
    rig.tier.found(chain(1))
    rig.put(chain(2))
    rig.drain()
    assert len(rig.log) == 0
    sequence = rig.core.changes(0).sequence
    rig.put(chain(3))  # over the first
    rig.drain()
    assert sorted(rig.log) == chain(1)
    changes = rig.core.changes(sequence)
    assert changes.added == (*chain(3), *chain(1)), "they left, and are stored again"
    assert changes.removed == ()
    assert rig.fetch(chain(1)) == CHAIN  # over the second, which goes down
    rig.drain()
    assert sorted(rig.log) == sorted(chain(1) + chain(2))
    rig.put(chain(3))
    rig.drain()
    assert rig.tier.stat()["written"] == 2 * CHAIN, "what is there already is not written again"
    rig.close()


def test_a_prefix_waits_once_however_often_it_is_found(rig: Rig) -> None:
    rig.put(chain(1))
    for _ in range(2 * WRITES_WAITING_MAX):
        rig.tier.found(chain(1))
        rig.tier.found(chain(1)[:2])
    assert rig.tier.stat()["dropped"] == 0
    rig.drain()
    assert rig.tier.stat()["written"] == CHAIN
    assert not rig.tier._queued
    rig.tier.found(chain(1, CHAIN + 1))  # goes on: the longer one is worth its place
    assert rig.tier._to_write.qsize() == 1


def test_a_full_disk_is_left_alone_for_a_while_and_can_be_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.down(chain(1))
    for name in ("pwrite", "pwritev"):
        monkeypatch.setattr(os, name, refusing(errno.ENOSPC))
    rig.down(chain(2))
    assert not rig.is_usable("writing")
    rig.tier.found(chain(2))
    rig.drain()
    assert (rig.tier.stat()["pauses"], rig.tier.stat()["dropped"]) == (1, 1)
    rig.put(chain(3))
    assert rig.fetch(chain(1)) == CHAIN
    monkeypatch.undo()
    rig.later()
    rig.down(chain(2))
    assert set(rig.log) == {*chain(1), *chain(2)}


def test_a_disk_that_does_not_read_is_left_alone_and_the_arena_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = [chain(number) for number in range(1, READ_FAILURES_MAX + 2)]
    for keys in chains:
        rig.down(keys)
    rig.put(chain(100))
    rig.put(chain(101))
    monkeypatch.setattr(os, "preadv", refusing(errno.EIO))
    for keys in chains[:-1]:
        assert rig.fetch(keys) == 0
    assert rig.tier.stat()["failed"] >= READ_FAILURES_MAX
    assert not rig.is_usable("reading")

    async def asked() -> None:
        assert not rig.tier.has_more(chains[-1])
        quote = rig.tier.quote(chains[-1])
        assert (quote.in_arena, quote.stored) == (0, 0)

    rig.run(asked())
    rig.put(chain(102))
    rig.tier.found(chain(102))
    rig.drain()
    assert set(chain(102)) < set(rig.log), "it is written to all the same"
    monkeypatch.undo()
    rig.later()
    assert rig.fetch(chains[-1]) == CHAIN
    assert rig.tier._reading._failures == 0


def test_the_books_learn_of_every_block_that_was_lost(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.down(chain(1))
    rig.put(chain(2))
    rig.put(chain(3))
    sequence = rig.core.changes(0).sequence
    monkeypatch.setattr(os, "preadv", refusing(errno.EIO))
    rig.fetch(chain(1))
    removed = set(rig.core.changes(sequence).removed) - set(chain(2))  # evicted for it
    assert removed == set(chain(1)) - set(rig.log)
    assert removed


def test_an_error_nobody_expected_is_counted_and_the_writer_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(rig.log, "append", breaks)
    rig.down(chain(1))
    assert "met what it does not know" in caplog.text
    stat = rig.tier.stat()
    assert (stat["faults"], stat["pauses"], stat["blocks"]) == (1, 1, 0)
    monkeypatch.undo()
    rig.later()
    rig.down(chain(1))
    assert rig.tier.stat()["blocks"] == CHAIN
    rig.core.check()


def test_a_quote_says_what_is_where_and_learns(rig: Rig) -> None:
    rig.down(chain(1))
    rig.down(chain(2))
    rig.put(chain(3))  # the first is on the disk alone

    async def quote() -> Any:
        return rig.tier.quote([*chain(1), BlockKey(b"x" * 16)])

    before = rig.run(quote())
    assert (before.in_arena, before.stored) == (0, CHAIN)
    rig.fetch(chain(1))
    after = rig.run(quote())
    assert (after.in_arena, after.stored) == (CHAIN, CHAIN)
    assert after.fetch_bytes_per_s != before.fetch_bytes_per_s


def test_who_is_cancelled_waits_for_the_reads_that_fill_its_slots(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is told: slots must not be given away while a thread writes into them."""
    rig.down(chain(1))
    rig.put(chain(2))
    rig.put(chain(3))
    real, states = os.preadv, []

    async def cancelled() -> None:
        loop, reading, goes_on = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

        def slow(*arguments: Any) -> int:
            asyncio.run_coroutine_threadsafe(goes_on.wait(), loop).result(10)
            return real(*arguments)

        def begun(*arguments: Any) -> int:
            loop.call_soon_threadsafe(reading.set)
            return slow(*arguments)

        monkeypatch.setattr(os, "preadv", begun)
        fetching = asyncio.create_task(rig.tier.fetch(chain(1)))
        await reading.wait()
        for _ in range(3):
            fetching.cancel()
            await asyncio.wait((fetching,), timeout=0)
            states.append(rig.core.stat().slots_reserved)
        goes_on.set()
        await asyncio.wait((fetching,))
        assert fetching.cancelled()

    rig.run(cancelled())
    assert states == [CHAIN] * 3
    assert rig.core.stat().slots_reserved == 0
    rig.core.check()


@pytest.mark.parametrize(
    ("runs", "parts"),
    [
        ([], []),
        ([7], [7]),
        ([4, 4], [4, 4]),
        ([2, 2, 2, 2], [4, 4]),
        ([1, 1, 1, 1, 1], [3, 2]),
        ([1, 8], [1, 8]),
        ([8, 1, 1], [8, 2]),
    ],
)
def test_runs_become_parts_of_about_one_size(runs: list[int], parts: list[int]) -> None:
    assert parts_of(runs, 2) == parts
