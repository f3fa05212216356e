"""What a node does for a reader once its answer is on its way."""

from types import SimpleNamespace
from typing import cast

import pytest

from pdserve.ids import BlockKey
from pdserve.kvstore.answers import ClaimGrant
from pdserve.kvstore.arena import Arena
from pdserve.kvstore.attending import fetch_blocks, note_asked
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.protocol import FetchBlocks

BLOCK = bytes(64)
KEYS = tuple(BlockKey(number.to_bytes(16, "big")) for number in range(1, 4))
ARENA = cast(
    Arena,
    SimpleNamespace(
        geometry=SimpleNamespace(block_bytes=len(BLOCK)),
        codec=0,
        payload=lambda _: memoryview(BLOCK),
    ),
)


@pytest.fixture
def core() -> StoreCore:
    """With the blocks of a conversation that has just begun."""
    made = StoreCore(8)
    owner = made.connect("writer")
    grant = made.reserve(owner, KEYS, 0)
    for position in range(len(KEYS)):
        made.filled(owner, grant.write, position, 7)
    assert made.commit(owner, grant.write) == len(KEYS)
    return made


def turns(core: StoreCore) -> set[int]:
    """Of the conversation's blocks."""
    return {core.slots[slot].turn for slot in core.slots.lookup(KEYS)}


def test_a_fetch_holds_its_blocks_and_counts_as_a_prompt_once_it_is_sent(core: StoreCore) -> None:
    owner = core.connect("reader")
    _, _, sent = fetch_blocks(core, ARENA, owner, FetchBlocks(KEYS, 0, len(KEYS)))
    assert (core.stat().slots_pinned, turns(core)) == (len(KEYS), {0})
    sent()
    assert (core.stat().slots_pinned, turns(core)) == (0, {1}), "its conversation went on"
    core.check()


def test_who_is_gone_when_his_answer_was_sent_has_asked_for_nothing(core: StoreCore) -> None:
    owner = core.connect("reader")
    _, _, sent = fetch_blocks(core, ARENA, owner, FetchBlocks(KEYS, 0, len(KEYS)))
    held = core.hold(owner, KEYS)
    core.disconnect(owner)
    sent()
    note_asked(core, owner, KEYS, held)
    assert (core.stat().slots_pinned, turns(core)) == (0, {0})
    core.check()


def test_a_prompt_that_found_nothing_is_known_to_have_asked(core: StoreCore) -> None:
    """What was evicted too early is known once it is asked for."""
    owner = core.connect("reader")
    for slot in reversed(core.slots.lookup(KEYS)):
        assert core.slots.evict_if_idle(slot)
    core.slots.reap()
    held = core.hold(owner, KEYS)
    assert held == ClaimGrant(0, (), (), has_tail=False)
    note_asked(core, owner, KEYS, held)
    grant = core.reserve(owner, KEYS, 0)
    for position in range(len(KEYS)):
        core.filled(owner, grant.write, position, 7)
    core.commit(owner, grant.write)
    assert turns(core) == {1}
