"""What goes first: worths against their definition, and what the store learns of conversations."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore import eviction
from pdserve.kvstore.eviction import (
    BUCKETS,
    KNOWN_MIN,
    NAMES_MAX,
    REFRESH_ASKS,
    TURNS,
    Lru,
    Turns,
    worths,
)
from pdserve.kvstore.idle_leaves import IdleLeaves

counts = st.lists(st.integers(0, 20), min_size=12, max_size=12).map(
    lambda some: [float(count) for count in some] + [0.0] * (BUCKETS - len(some))
)


def keys(name: str, count: int) -> tuple[BlockKey, ...]:
    return tuple(BlockKey(f"{name}{index}".encode().ljust(16, b".")) for index in range(count))


def worths_by_definition(went_on: list[float], ended: list[float]) -> list[float]:
    """For every age the best ratio of hits to room, over all ages at which one could give up."""
    best = []
    for first in range(BUCKETS):
        left, hit, room, ratio = 1.0, 0.0, 0.0, 0.0
        for bucket in range(first, BUCKETS):
            room += left * eviction._WIDTHS[bucket]
            reached = sum(went_on[bucket:]) + sum(ended[bucket:])
            if reached > 0:
                hit += left * went_on[bucket] / reached
                left *= 1 - went_on[bucket] / reached
            ratio = max(ratio, hit / room if room > 0 else 0.0)
        best.append(ratio)
    return best


@given(counts, counts)
def test_a_worth_is_the_best_of_hits_to_room(went_on: list[float], ended: list[float]) -> None:
    # Where all have gone on there is nobody of that age, and no ratio: one more waits for ever.
    ended[-1] = 1.0
    expected = worths_by_definition(went_on, ended)
    assert worths(went_on, ended) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_where_nobody_has_gone_on_nothing_is_worth_anything() -> None:
    assert worths([0.0] * BUCKETS, [3.0] * BUCKETS) == [0.0] * BUCKETS


# ── conversations ────────────────────────────────────────────────────────────────────────────────


def test_a_conversation_is_known_by_what_it_wrote_last() -> None:
    turns = Turns(100)
    first = keys("a", 6)
    assert turns.asked(first, 1) == 0
    assert turns.wrote(first, 2) == 0
    assert turns.asked((*first, *keys("b", 3)), 10) == 1
    assert turns.asked((*first, *keys("b", 3)), 11) == 1, "the same prompt again"
    assert turns.wrote((*first, *keys("b", 3)), 12) == 1
    assert turns.asked((*first, *keys("b", 3), *keys("c", 1)), 20) == 2
    assert turns.asked((*first[:3], *keys("d", 3)), 21) == 0, "only a beginning in common"


def test_an_answer_that_is_not_repeated_whole_is_known_by_its_prompt() -> None:
    """Chat templates leave the thoughts of earlier turns out."""
    turns = Turns(100)
    prompt = keys("prompt", 5)
    turns.asked(prompt, 1)
    turns.wrote(prompt, 2)
    turns.wrote((*prompt, *keys("answer", 9)), 3)
    assert turns.asked((*prompt, *keys("other", 4)), 9) == 1


def test_a_prompt_in_chunks_is_one_turn() -> None:
    turns = Turns(100)
    prompt = keys("p", 12)
    turns.asked(prompt, 1)
    assert [turns.wrote(prompt[:end], end) for end in (4, 8, 12)] == [0, 0, 0]
    (known,) = turns._known
    assert set(known.names) == set(prompt[-NAMES_MAX // 2 :]) | set(prompt[6:8])
    assert set(turns._by_name) == set(known.names)


def test_turns_end_somewhere() -> None:
    turns = Turns(100)
    history: tuple[BlockKey, ...] = ()
    for turn in range(TURNS + 3):
        history += keys(f"t{turn}-", 3)
        assert turns.asked(history, 10 * turn) == min(turn, TURNS - 1)
        turns.wrote(history, 10 * turn + 1)


def test_what_is_remembered_is_bounded_and_the_oldest_is_forgotten() -> None:
    turns = Turns(1)
    for index in range(KNOWN_MIN + 50):
        turns.wrote(keys(f"{index}-", 2), index)
    assert len(turns._known) == KNOWN_MIN
    assert len(turns._by_name) == 2 * KNOWN_MIN
    assert sum(map(sum, turns._forgotten)) == 50
    assert turns.asked((*keys("0-", 2), *keys("x", 1)), 5000) == 0
    assert turns.asked((*keys("60-", 2), *keys("x", 1)), 5000) == 1


def test_those_that_go_on_come_to_be_worth_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of ten conversations has a second turn, of those nine of ten a third, and so on."""
    chance = random.Random(3)
    turns = Turns(100)
    now = 0
    for conversation in range(20 * REFRESH_ASKS):
        history: tuple[BlockKey, ...] = ()
        for turn in range(TURNS):
            history += keys(f"{conversation}-{turn}-", 2)
            turns.asked(history, now)
            turns.wrote(history, now + 1)
            now += 2
            if chance.random() > (0.1 if turn == 0 else 0.9):
                break
    assert turns.worth(1, 1) > 2 * turns.worth(0, 1) > 0
    assert turns.worth(2, 1) > 2 * turns.worth(0, 1)
    assert turns.worth(1, 1) > 10 * turns.worth(1, 10_000), "who was silent so long is not back"


def test_old_habits_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "HISTORY", 100)
    turns = Turns(100)
    for index in range(1000):
        turns.wrote(keys(f"{index}-", 1), 2 * index)
        turns.asked((*keys(f"{index}-", 1), *keys("x", 1)), 2 * index + 1)
    assert sum(map(sum, turns._went_on)) < 100 + max(REFRESH_ASKS, KNOWN_MIN // 16) + 100


# ── candidates ───────────────────────────────────────────────────────────────────────────────────


class _Worths(Lru):
    def __init__(self, *worth_by_turn: float) -> None:
        self._worth_by_turn = worth_by_turn

    def worth(self, turn: int, age: int) -> float:
        return self._worth_by_turn[turn]


def taken(leaves: IdleLeaves, gone: tuple[int, ...] = ()) -> int | None:
    return leaves.take(100, lambda slot, turn, last_use: slot not in gone)


def test_the_least_worth_goes_first_and_of_equals_the_oldest_and_deepest() -> None:
    leaves = IdleLeaves(_Worths(0.5, 0.1, 0.5))
    for slot, (turn, last_use, depth) in enumerate(
        [(0, 1, 0), (1, 9, 0), (1, 5, 2), (1, 5, 7), (2, 3, 0), (2, 0, 0)]
    ):
        leaves.add(SlotId(slot), turn, last_use, depth)
    assert [taken(leaves) for _ in range(6)] == [3, 2, 1, 5, 0, 4]


def test_what_is_out_of_date_is_skipped() -> None:
    leaves = IdleLeaves(Lru())
    for slot in range(4):
        leaves.add(SlotId(slot), 0, slot, 0)
    assert taken(leaves, gone=(0, 1)) == 2
    assert (SlotId(3), 0, 3) in leaves
    assert (SlotId(2), 0, 2) not in leaves
    assert taken(leaves, gone=(3,)) is None
