"""What is copied where: how hot, how much per second, and never into a slot that is in use."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.clock import S
from pdserve.ids import BlockKey, HostId, StoreId
from pdserve.kvstore.masters.core import Host
from pdserve.kvstore.masters.metadata import Member
from pdserve.kvstore.masters.replication import (
    HALF_LIFE_NS,
    HEAT_MIN,
    RETRY_NS,
    Holders,
    Replication,
)
from pdserve.messages import Address

KEYS = [BlockKey(bytes([index + 1]) * 16) for index in range(8)]
BLOCK_BYTES = 100


def host(name: str, number: int, *, free: int = 100, draining: bool = False) -> Host:
    member = Member(StoreId(name), Address(HostId(name), "", f"{name}:1"), 1)
    return Host(member, number, 0, free, BLOCK_BYTES, 0, draining)


def holders(*having: tuple[Host, int]) -> Holders:
    return lambda keys: [(each, min(count, len(keys))) for each, count in having if count]


A, B, C = host("a", 0), host("b", 1), host("c", 2, free=50)
HOT = int(HEAT_MIN)


def test_a_prefix_is_copied_when_it_is_hot_and_one_node_has_it() -> None:
    replication = Replication()
    replication.read(KEYS, HOT - 1, 0)
    assert replication.next_copy(holders((A, 8)), (A, B), 0) is None
    replication.read(KEYS, 1, 0)
    assert replication.next_copy(holders((A, 8), (B, 8)), (A, B), 0) is None
    copy = replication.next_copy(holders((A, 8), (B, 3)), (A, B), 0)
    assert copy is not None
    assert (copy.source, copy.target, copy.blocks) == (A, B, 5)
    assert copy.keys == tuple(KEYS)


def test_heat_halves_with_time() -> None:
    replication = Replication()
    replication.read(KEYS, HOT, 0)
    assert replication.next_copy(holders((A, 8)), (A, B), HALF_LIFE_NS) is None


def test_the_node_with_most_room_gets_it_and_nobody_who_drains_differs_or_is_full() -> None:
    replication = Replication()
    replication.read(KEYS, HOT, 0)
    other = host("d", 3, free=1000)
    other.block_bytes += 1
    those = (A, host("full", 4, free=7), host("e", 5, free=900, draining=True), other)
    assert replication.next_copy(holders((A, 8)), those, 0) is None
    copy = replication.next_copy(holders((A, 8)), (*those, C, B), 0)
    assert copy is not None
    assert copy.target is B


def test_what_has_been_tried_is_left_alone_for_a_while() -> None:
    replication = Replication()
    replication.read(KEYS, 1000, 0)
    copy = replication.next_copy(holders((A, 8)), (A, B), 0)
    assert copy is not None
    replication.done(copy, 0, 0)
    assert replication.next_copy(holders((A, 8)), (A, B), RETRY_NS - 1) is None
    assert replication.next_copy(holders((A, 8)), (A, B), RETRY_NS) is not None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3 * S), st.integers(1, 8)), min_size=1, max_size=40))
def test_copies_keep_to_their_bytes_per_second(looks: list[tuple[int, int]]) -> None:
    bytes_per_s = 100
    replication = Replication(bytes_per_s=bytes_per_s, prefixes_max=4)
    now_ns, copied_bytes = 0, 0
    for index, (elapsed_ns, blocks) in enumerate(looks):
        now_ns += elapsed_ns
        keys = [BlockKey(bytes([index, block]) * 8) for block in range(blocks)]
        replication.read(keys, HOT, now_ns)
        copy = replication.next_copy(holders((A, 8)), (A, B), now_ns)
        if copy is not None:
            copied_bytes += copy.blocks * BLOCK_BYTES
            assert copy.blocks <= B.slots_free
            replication.done(copy, copy.blocks, now_ns)
        assert copied_bytes <= bytes_per_s * (10 + now_ns / S)


def test_the_books_are_bounded_and_the_coldest_goes() -> None:
    replication = Replication(prefixes_max=2)
    replication.read(KEYS[:1], HOT, 0)
    replication.read(KEYS[:2], HOT + 5, 0)
    replication.read(KEYS[:3], HOT + 9, 0)
    seen = set()
    while (copy := replication.next_copy(holders((A, 8)), (A, B), 0)) is not None:
        seen.add(len(copy.keys))
        replication.done(copy, copy.blocks, 0)
    assert seen == {2, 3}


def test_books_of_no_prefix_are_refused() -> None:
    with pytest.raises(AssertionError):
        Replication(prefixes_max=0)
