"""What is copied where: how hot, how much per second, and never into a slot that is in use."""

from collections.abc import Sequence
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.clock import S
from pdserve.ids import BlockKey, HostId, StoreId
from pdserve.kvstore.master_core import Host
from pdserve.kvstore.metadata import Member
from pdserve.kvstore.replication import HALF_LIFE_NS, HEAT_MIN, RETRY_NS, Holders, Replication
from pdserve.kvstore.vacating import NO_PARENT, Chains, copies_of, ends_of
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


# ── emptying a node ──────────────────────────────────────────────────────────────────────────────

TREE = Chains(
    {
        KEYS[0]: NO_PARENT,
        KEYS[1]: KEYS[0],
        KEYS[2]: KEYS[1],
        KEYS[3]: KEYS[1],  # a branch
        KEYS[4]: NO_PARENT,
        KEYS[6]: KEYS[5],  # its parent is gone
    }
)


def test_chains_to_what_is_there_alone() -> None:
    alone = [KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[6]]
    assert ends_of(TREE, alone) == [
        (KEYS[0], KEYS[1], KEYS[2]),
        (KEYS[0], KEYS[1], KEYS[3]),
        (KEYS[4],),
    ]
    assert ends_of(TREE, []) == []
    assert ends_of(Chains({KEYS[0]: KEYS[1], KEYS[1]: KEYS[0]}), [KEYS[0]]) == []


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.integers(1, 7), st.integers(0, 6), max_size=7),
    st.lists(st.integers(0, 8), min_size=1, max_size=3),
)
def test_after_all_copies_nothing_is_alone_that_had_room(
    parents: dict[int, int], free: list[int]
) -> None:
    tree = {KEYS[0]: NO_PARENT}
    for child in sorted(parents):
        if parents[child] < child and KEYS[parents[child]] in tree:
            tree[KEYS[child]] = KEYS[parents[child]]
    targets = [host(f"t{index}", index + 1, free=count) for index, count in enumerate(free)]
    source = host("s", 0, free=0, draining=True)
    has: dict[int, set[BlockKey]] = {source.number: set(tree)}
    has |= {each.number: set() for each in targets}

    def holding(keys: Sequence[BlockKey]) -> list[tuple[Host, int]]:
        counts = [
            (each, len(list(takewhile(has[each.number].__contains__, keys))))
            for each in (source, *targets)
        ]
        return [(each, count) for each, count in counts if count]

    ends = ends_of(Chains(tree), list(tree))
    assert set().union(*ends) == set(tree)
    for copy in copies_of(source, ends, holding, (source, *targets)):
        new = set(copy.keys) - has[copy.target.number]
        assert len(new) == copy.blocks <= copy.target.slots_free
        has[copy.target.number] |= new
        copy.target.slots_free -= len(new)
    left = set(tree) - set().union(*(has[each.number] for each in targets))
    if max(free) >= len(tree):
        assert not left
    for each in targets:
        for key in has[each.number]:
            parent = tree[key]
            assert parent == NO_PARENT or parent in has[each.number], "parents before children"


def test_nothing_goes_where_nothing_is_taken() -> None:
    assert not list(copies_of(A, [tuple(KEYS)], holders((A, 8)), (A, host("f", 1, free=0))))
    with pytest.raises(AssertionError):
        Replication(prefixes_max=0)
