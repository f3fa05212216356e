"""What the campaign relies on: it sees a call that hangs, a leak, and whose bytes are whose."""

import dataclasses
import itertools
import time

from pdserve.clock import S
from pdserve.kvstore.answers import StoreStat
from pdserve.kvstore.core import StoreCore
from tests.campaign.audit import held, unbalanced
from tests.campaign.board import EVENTS_KEPT, Board, Number
from tests.campaign.world import ARENA_SHARE, BLOCK_BYTES, make_world


def stat() -> StoreStat:
    core = StoreCore(4)
    core.connect("auditor")
    return core.stat()


def test_a_call_beyond_its_limit_is_seen() -> None:
    board = Board(2)
    assert board.overdue_ms(1) == 0, "there is none"
    board.put(1, Number.CALL_LIMIT_NS, 5 * S)
    board.put(1, Number.CALL_BEGAN_NS, time.monotonic_ns() - 4 * S)
    assert board.overdue_ms(1) < 0
    board.put(1, Number.CALL_BEGAN_NS, time.monotonic_ns() - 7 * S)
    assert board.overdue_ms(1) > 1900
    assert board.overdue_ms(0) == 0, "another one's"


def test_the_last_events_stay_in_order() -> None:
    board = Board(2)
    for number in range(EVENTS_KEPT + 3):
        board.note(0, f"event {number}")
    board.note(1, "x" * 1000)
    said = [line.partition(" ")[2] for line in board.events(0)]
    assert said == [f"event {number}" for number in range(3, EVENTS_KEPT + 3)]


def test_totals_go_on_over_deaths_and_a_call_does_not() -> None:
    board = Board(2)
    board.add(0, Number.GETS, 3)
    board.add(1, Number.GETS, 4)
    board.put(0, Number.CALL_BEGAN_NS, 1)
    board.begin_incarnation(0)
    assert (board.total(Number.GETS), board.overdue_ms(0)) == (7, 0)


def test_an_audit_finds_what_is_held_and_what_is_missing() -> None:
    clean = stat()
    assert (held(clean, connections=1), unbalanced(clean)) == ("", "")
    assert held(clean, connections=2) == "connections 1"
    assert held(dataclasses.replace(clean, slots_pinned=2), 1) == "slots_pinned 2"
    assert held(dataclasses.replace(clean, tickets=1, writes=1), 1) == "writes 1, tickets 1"
    assert unbalanced(dataclasses.replace(clean, slots_free=3)).startswith("3 slots by state")


def test_no_block_has_bytes_of_another_one() -> None:
    world = make_world()
    assert len(set(world.contents.values())) == len(world.contents) == len(world.parents)
    words = [
        {content[at : at + 8] for at in range(0, BLOCK_BYTES, 8)}
        for content in itertools.islice(world.contents.values(), 50)
    ]
    assert len(set.union(*words)) == 50 * (BLOCK_BYTES // 8), "nor at any place of the block"
    assert world.slot_count <= ARENA_SHARE * len(world.contents)
