"""Which turn of its conversation a block belongs to, by the ways on which workers come."""

from pdserve.ids import BlockKey
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.eviction import Turns, _bucket
from tests.unit.kvstore.test_core import T1, T2, T3, chain, commit, open_ticket, push, put


def turns_of(core: StoreCore, keys: list[BlockKey]) -> list[int]:
    """Of the blocks that are there."""
    return [core._slots[slot].turn for slot in core._slots.lookup(keys)]


def test_each_prompt_that_claims_what_the_last_left_is_a_turn() -> None:
    core = StoreCore(16)
    worker = core.connect("w")
    keys = chain("a", 9)
    for turn in range(3):
        core.release(worker, core.claim(worker, keys[: 3 * turn + 2]).claim)
        put(core, worker, keys[: 3 * turn + 3])
        assert turns_of(core, keys) == [turn] * (3 * turn + 3)


def test_a_prompt_pushed_in_chunks_and_its_answer_are_one_turn() -> None:
    core = StoreCore(16)
    prefill, decode = core.connect("p"), core.connect("d")
    keys = chain("a", 12)
    for turn, ticket in enumerate((T1, T2, T3)):
        begin = 4 * turn
        assert open_ticket(core, prefill, ticket, begin + 3)
        push(core, prefill, ticket, keys[: begin + 2])
        push(core, prefill, ticket, keys[: begin + 3], first=begin + 2)
        core.seal(prefill, ticket)
        core.release(decode, core.adopt(decode, ticket).claim)
        put(core, decode, keys[: begin + 4])
        assert turns_of(core, keys) == [turn] * (begin + 4)


def test_a_conversation_is_known_when_its_blocks_are_gone() -> None:
    core = StoreCore(4)
    worker = core.connect("w")
    keys = chain("a", 4)
    put(core, worker, keys[:3])
    put(core, worker, chain("b", 4))
    assert turns_of(core, keys) == []
    assert core.claim(worker, keys).claim == 0
    put(core, worker, keys)
    assert turns_of(core, keys) == [1] * 4


def test_with_lru_nothing_is_told_apart() -> None:
    core = StoreCore(8, eviction="lru")
    worker = core.connect("w")
    keys = chain("a", 4)
    put(core, worker, keys[:2])
    core.release(worker, core.claim(worker, keys).claim)
    put(core, worker, keys)
    assert turns_of(core, keys) == [0] * 4


def test_a_prompt_is_known_again_without_its_answer() -> None:
    core = StoreCore(16)
    worker = core.connect("w")
    prompt = chain("a", 3)
    assert open_ticket(core, worker, T1, 3)
    push(core, worker, T1, prompt)
    core.seal(worker, T1)
    put(core, worker, prompt + chain("answer", 4))
    core.release(worker, core.claim(worker, prompt + chain("next", 2)).claim)
    assert turns_of(core, prompt) == [1] * 3


def test_a_way_between_tiers_is_no_turn_and_no_use() -> None:
    core = StoreCore(4)
    worker = core.connect("w")
    keys = chain("a", 3)
    put(core, worker, keys)
    put(core, worker, chain("b", 4))
    for _ in range(100):
        core.release(worker, core.hold(worker, chain("b", 4)).claim)
    commit(core, worker, core.reserve(worker, keys, 0, between_tiers=True))
    core.release(worker, core.hold(worker, keys).claim)
    assert turns_of(core, keys) == [0] * 3
    core.release(worker, core.claim(worker, keys).claim)
    assert turns_of(core, keys) == [1] * 3
    assert isinstance(core._slots._eviction, Turns)
    ages = [bucket for bucket, count in enumerate(core._slots._eviction._went_on[0]) if count]
    assert ages == [_bucket(103)]
