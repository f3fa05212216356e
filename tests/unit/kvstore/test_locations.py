"""Prefixes of other hosts: what is believed for how long, and that nobody waits for a master."""

from collections.abc import Sequence
from typing import Any, cast

import pytest

from pdserve.clock import S
from pdserve.errors import PdserveError, StoreUnavailable
from pdserve.ids import BlockKey, HostId, StoreId
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.locations import FRESH_NS, KNOWN_MAX, RemotePrefixes
from pdserve.kvstore.masters.client import QUIET_NS
from pdserve.kvstore.masters.protocol import Location
from pdserve.messages import Address

KEYS = [BlockKey(bytes([index + 1]) * 16) for index in range(4)]
BLOCK_BYTES = 16


def at(name: str, count: int, *, epoch: int = 1) -> Location:
    address = Address(HostId(name), "", f"{name}:1")
    return Location(StoreId(name), address, epoch, count)


class FakeMasters:
    def __init__(self, *answers: Location | PdserveError) -> None:
        self.answers = answers
        self.asked: list[tuple[int, int]] = []

    def locate(self, keys: Sequence[BlockKey], *, reads: int = 1) -> tuple[Location, ...]:
        self.asked.append((len(keys), reads))
        for answer in self.answers:
            if isinstance(answer, PdserveError):
                raise answer
        return cast("tuple[Location, ...]", self.answers)

    def close(self) -> None: ...


class FakeStore:
    """Has the leading blocks of every chain; each block's bytes are its key."""

    def __init__(self, count: int, epoch: int = 1) -> None:
        self.count = count
        self.epoch = epoch
        self.store_id = "fake"

    def fetch(
        self, keys: Sequence[BlockKey], outs: Sequence[memoryview], *, first: int, **more: Any
    ) -> int:
        there = max(0, min(self.count, len(keys)) - first)
        for position in range(there):
            outs[position][:] = keys[first + position]
            more["done"](position)
        return there

    def close(self) -> None: ...


class Rig:
    def __init__(self, masters: FakeMasters, **stores: FakeStore) -> None:
        self.now_ns = 1000 * S
        self.connected: list[str] = []
        self.stores = stores
        self.prefixes = RemotePrefixes(
            masters, self._connect, own=lambda: StoreId("own"), clock=lambda: self.now_ns
        )

    def _connect(self, address: Address, _: float) -> StoreClient:
        self.connected.append(address.host)
        if address.host not in self.stores:
            raise StoreUnavailable("dead")
        return cast("StoreClient", self.stores[address.host])

    def fetch(self, first: int = 0, end: int = 4) -> list[bytes]:
        found: list[bytes] = []
        count = self.prefixes.fetch(
            KEYS, first, end, lambda _, data: found.append(bytes(data)),
            block_bytes=BLOCK_BYTES, deadline_s=9.0,
        )  # fmt: skip
        assert count == len(found)
        return found


def test_what_one_cannot_give_another_does() -> None:
    rig = Rig(FakeMasters(at("dead", 4), at("part", 2), at("whole", 4)),
              part=FakeStore(2), whole=FakeStore(4))  # fmt: skip
    assert rig.fetch() == KEYS
    assert rig.connected == ["dead", "part", "whole"]
    assert rig.prefixes.counters["blocks_elsewhere"] == 4
    assert rig.prefixes.counters["locations_failed"] == 2


def test_the_own_store_is_not_elsewhere_and_what_is_asked_is_what_comes() -> None:
    rig = Rig(FakeMasters(at("own", 4), at("b", 3)), b=FakeStore(4))
    assert rig.prefixes.count(KEYS) == 3
    assert rig.fetch(1, 3) == KEYS[1:3]
    assert rig.connected == ["b"]
    assert rig.fetch(3, 4) == [], "nobody is said to have it"


def test_an_answer_is_believed_for_a_while_and_reads_are_told_with_the_next_question() -> None:
    masters = FakeMasters(at("b", 4))
    rig = Rig(masters, b=FakeStore(4))
    for _ in range(3):
        assert rig.fetch() == KEYS
    assert masters.asked == [(4, 0)]
    rig.now_ns += FRESH_NS
    assert rig.prefixes.count(KEYS) == 4
    assert masters.asked == [(4, 0), (4, 3)]


def test_a_wrong_answer_is_forgotten() -> None:
    masters = FakeMasters(at("b", 4))
    rig = Rig(masters, b=FakeStore(1))
    assert rig.fetch() == KEYS[:1]
    rig.fetch()
    assert len(masters.asked) == 2


def test_a_node_of_an_older_epoch_is_not_read_from() -> None:
    rig = Rig(FakeMasters(at("b", 4, epoch=7)), b=FakeStore(4, epoch=6))
    assert rig.fetch() == []
    assert rig.prefixes.counters["locations_failed"] == 1


def test_without_a_master_nobody_asks_for_a_while() -> None:
    masters = FakeMasters(StoreUnavailable("no master"))
    rig = Rig(masters)
    assert rig.prefixes.count(KEYS) == 0
    assert rig.prefixes.count(KEYS[:2]) == 0
    assert len(masters.asked) == 1
    rig.now_ns += QUIET_NS + FRESH_NS
    assert rig.prefixes.count(KEYS) == 0
    assert len(masters.asked) == 2


def test_what_is_known_is_bounded() -> None:
    masters = FakeMasters(at("b", 1))
    rig = Rig(masters, b=FakeStore(1))
    for index in range(KNOWN_MAX + 1):
        rig.prefixes.count([BlockKey(index.to_bytes(16, "big"))])
    rig.prefixes.count([BlockKey((1).to_bytes(16, "big"))])
    assert len(masters.asked) == KNOWN_MAX + 1
    rig.prefixes.count([BlockKey((0).to_bytes(16, "big"))])
    assert len(masters.asked) == KNOWN_MAX + 2


@pytest.mark.parametrize("keys", [[], KEYS])
def test_no_chain_and_no_answer_are_no_blocks(keys: list[BlockKey]) -> None:
    assert Rig(FakeMasters()).prefixes.count(keys) == 0
