"""The sorted columns beside a plain heap per turn, which is what they must agree with."""

import heapq
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.ids import SlotId
from pdserve.kvstore import idle_leaves
from pdserve.kvstore.eviction import Lru
from pdserve.kvstore.idle_leaves import IdleLeaves, rank_of


class Worths(Lru):
    """Of turn t: falls with age, in another way for each."""

    def worth(self, turn: int, age: int) -> float:
        return (turn + 1) / (age + 1 + 3 * turn)


class Heaps:
    """The obvious way: a heap of tuples for each turn."""

    def __init__(self) -> None:
        self.heaps: dict[int, list[tuple[int, int, int]]] = {}

    def add(self, slot: int, turn: int, last_use: int, depth: int) -> None:
        heapq.heappush(self.heaps.setdefault(turn, []), (last_use, -depth, slot))

    def take(self, now: int, current: dict[int, tuple[int, int]]) -> int | None:
        best = None
        for turn, heap in self.heaps.items():
            while heap and current.get(heap[0][2]) != (turn, heap[0][0]):
                heapq.heappop(heap)
            if heap:
                rank = Worths().worth(turn, now - heap[0][0]), heap[0][0], turn
                best = rank if best is None else min(best, rank)
        return None if best is None else heapq.heappop(self.heaps[best[2]])[2]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 200),
    st.floats(0, 1),
    st.integers(0, 8),
    st.randoms(use_true_random=False),
)
def test_the_same_goes_first_as_by_heaps(
    slot_count: int, steps: int, late_ratio: float, late_max: int, chance: random.Random
) -> None:
    before, idle_leaves.LATE_MAX = idle_leaves.LATE_MAX, late_max  # runs are made and merged
    try:
        columns, heaps = IdleLeaves(Worths()), Heaps()
        current: dict[int, tuple[int, int]] = {}  # slot to (turn, last use)
        for now in range(1, steps + 1):
            if current and chance.random() < 0.35:
                slot = columns.take(
                    now, lambda slot, turn, last_use: current.get(slot) == (turn, last_use)
                )
                assert slot == heaps.take(now, current)
                assert slot is not None
                del current[slot]
                continue
            slot = SlotId(chance.randrange(slot_count))
            last_use = chance.randrange(now) if chance.random() < late_ratio else now
            turn, depth = chance.randrange(3), chance.choice((0, 0, 1, 5, (1 << 32) - 1))
            if slot in current and current[slot] == (turn, last_use):
                continue  # a block that was not used again is as deep as it was
            current[slot] = turn, last_use
            columns.add(slot, turn, last_use, depth)
            heaps.add(slot, turn, last_use, depth)
            assert len(columns) >= len(current)
            assert (slot, turn, last_use) in columns
        while current:
            slot = columns.take(steps, lambda s, turn, last_use: current.get(s) == (turn, last_use))
            assert slot == heaps.take(steps, current)
            assert slot is not None
            del current[slot]
        assert columns.take(steps, lambda *_: False) is None
        assert len(columns) == 0
    finally:
        idle_leaves.LATE_MAX = before


def test_many_at_once_go_as_if_added_one_by_one() -> None:
    chance = random.Random(1)
    entries = [(slot, chance.randrange(50), chance.randrange(4)) for slot in range(500)]
    one_by_one, at_once = IdleLeaves(Lru()), IdleLeaves(Lru())
    for slot, last_use, depth in entries:
        one_by_one.add(SlotId(slot), 0, last_use, depth)
    uses = np.array([last_use for _, last_use, _ in entries], np.uint64)
    ranks = np.array([rank_of(slot, depth) for slot, _, depth in entries], np.uint64)
    at_once.fill(0, uses, ranks)
    expected = sorted((last_use, -depth, slot) for slot, last_use, depth in entries)
    for leaves in (one_by_one, at_once):
        assert [leaves.take(100, lambda *_: True) for _ in entries] == [e[2] for e in expected]


def test_what_has_left_is_given_back() -> None:
    leaves = IdleLeaves(Lru())
    for round_ in range(20 * idle_leaves.FORGOTTEN_MIN):
        leaves.add(SlotId(round_ % 5), 0, round_, 0)
        if round_ >= 5:
            leaves.take(round_, lambda *_: True)
    (turn,) = leaves._turns.values()
    (run,) = turn._runs.values()
    assert len(run.uses) <= 2 * idle_leaves.FORGOTTEN_MIN
