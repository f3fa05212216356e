"""Which location is tried when, with pretended clients."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from pdserve.errors import BlockMissing, StoreError, StoreUnavailable
from pdserve.ids import BlockKey, HostId
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.failover import (
    DEAD_NS,
    LOCATIONS_MAX,
    DeadLocations,
    FailoverReader,
    attempt_s,
)
from pdserve.messages import Address

KEYS = [BlockKey(bytes([index]) * 16) for index in range(4)]


def at(name: str) -> Address:
    return Address(HostId(name), "", f"{name}:1")


class FakeClient:
    """Delivers ``count`` blocks of the chain, then raises ``error`` if there is one."""

    def __init__(self, count: int, error: StoreError | None = None) -> None:
        self.count = count
        self.error = error
        self.asked: list[tuple[int, int]] = []
        self.closed = False

    def fetch(
        self,
        keys: Sequence[BlockKey],
        outs: Sequence[memoryview],
        *,
        first: int,
        done: Callable[[int], None],
        **_: Any,
    ) -> int:
        self.asked.append((first, len(outs)))
        there = max(0, min(self.count, len(keys)) - first)
        for position in range(there):
            outs[position][:] = keys[first + position]
            done(position)
        if self.error is not None:
            raise self.error
        return there

    def close(self) -> None:
        self.closed = True


class Rig:
    def __init__(self, **clients: FakeClient | StoreError) -> None:
        self.clients = clients
        self.connected: list[str] = []
        self.now_ns = 0
        self.reader = FailoverReader(self.connect, clock=lambda: self.now_ns)
        self.outs = [memoryview(bytearray(16)) for _ in KEYS]

    def connect(self, address: Address, timeout_s: float) -> StoreClient:
        assert 0 < timeout_s <= 10
        self.connected.append(address.host)
        client = self.clients[address.host]
        if isinstance(client, StoreError):
            raise client
        return cast(StoreClient, client)

    def fetch(self, *names: str, first: int = 0) -> tuple[int, list[str]]:
        locations = [at(name) for name in names]
        result = self.reader.fetch(KEYS, self.outs[first:], locations, deadline_s=10, first=first)
        return result.count, [location.host for location, _ in result.misses]


def test_what_one_delivered_stays_and_the_next_goes_on_behind_it() -> None:
    first, second = FakeClient(2, StoreUnavailable("reset")), FakeClient(4)
    rig = Rig(a=first, b=second)
    assert rig.fetch("a", "b") == (4, ["a"])
    assert first.closed
    assert second.asked == [(2, 2)]
    assert [bytes(out) for out in rig.outs] == KEYS


def test_a_dead_location_is_not_tried_again_for_a_second() -> None:
    rig = Rig(a=StoreUnavailable("refused"), b=FakeClient(4))
    assert rig.fetch("a", "b") == (4, ["a"])
    assert rig.fetch("a", "b") == (4, ["a"])
    assert rig.connected == ["a", "b"]
    rig.now_ns = DEAD_NS
    rig.fetch("a", "b")
    assert rig.connected == ["a", "b", "a"]


def test_a_location_that_lost_a_block_is_not_dead() -> None:
    rig = Rig(a=FakeClient(1, BlockMissing("gone")), b=FakeClient(4))
    assert rig.fetch("a", "b") == (4, ["a"])
    assert rig.fetch("a", "b") == (4, ["a"])
    assert isinstance(rig.clients["a"], FakeClient)
    assert rig.clients["a"].asked == [(0, 4), (0, 4)]


def test_when_nobody_is_left_the_rest_is_a_miss_with_reasons() -> None:
    rig = Rig(a=FakeClient(1), b=StoreUnavailable("refused"))
    assert rig.fetch("a", "b") == (1, ["a", "b"])
    assert rig.fetch() == (0, [])
    assert rig.fetch("a", first=1) == (0, ["a"])


def test_each_attempt_has_its_share_of_the_time() -> None:
    assert attempt_s(3.0, 3) == 1.0
    assert attempt_s(2.5, 1) == 2.5


def test_the_dead_that_are_remembered_are_bounded() -> None:
    dead = DeadLocations()
    for index in range(LOCATIONS_MAX + 1):
        dead.note(at(f"h{index}"), 0)
    assert not dead.is_dead(at("h0"), 0)
    assert dead.is_dead(at("h1"), DEAD_NS - 1)
    assert not dead.is_dead(at("h1"), DEAD_NS)
