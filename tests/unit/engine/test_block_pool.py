"""BlockPool: its refusals, its order of eviction, and a machine that tries everything."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.engine import blocks as blocks_module
from pdserve.engine.blocks import CHANGES_AT_ONCE, BlockPool, BlockTable, blocks_for
from pdserve.errors import OutOfBlocks
from pdserve.ids import BlockId, BlockKey


def key(index: int) -> BlockKey:
    return BlockKey(index.to_bytes(16, "big"))


def test_take_is_all_or_nothing() -> None:
    pool = BlockPool(3)
    pool.take(1)
    with pytest.raises(OutOfBlocks, match="3 blocks wanted, 2 free"):
        pool.take(3)
    assert pool.free_count == 2
    assert len(pool.take(2)) == 2


def test_a_released_published_block_is_found_again() -> None:
    pool = BlockPool(3)
    blocks = pool.take(2)
    for index, block in enumerate(blocks):
        pool.publish(key(index), block)
    pool.release(blocks)
    assert pool.free_count == 3
    assert pool.hold_published([key(0), key(1), key(2)]) == blocks
    assert pool.free_count == 1


def test_a_gap_ends_the_prefix() -> None:
    pool = BlockPool(3)
    for index, block in enumerate(pool.take(3)):
        if index != 1:
            pool.publish(key(index), block)
    assert pool.published([key(0), key(1), key(2)]) == 1


def test_idle_blocks_are_given_away_leaf_first_and_oldest_first() -> None:
    pool = BlockPool(4)
    old, new = pool.take(2), pool.take(2)
    for index, block in enumerate(old + new):
        pool.publish(key(index), block)
    pool.release(old)
    pool.release(new)
    assert pool.take(1) == [old[1]]
    assert pool.take(1) == [old[0]]
    assert pool.take(1) == [new[1]]


def test_free_blocks_are_given_before_idle_ones() -> None:
    pool = BlockPool(2)
    cached, plain = pool.take(2)
    pool.publish(key(0), cached)
    pool.release([cached])
    pool.release([plain])
    assert pool.take(1) == [plain]
    assert pool.published([key(0)]) == 1


def test_the_first_to_publish_a_key_keeps_it() -> None:
    pool = BlockPool(2)
    first, second = pool.take(2)
    pool.publish(key(0), first)
    pool.publish(key(0), second)
    assert pool.hold_published([key(0)]) == [first]
    pool.release([second])
    pool.check()


def test_changes_are_told_once_and_what_came_and_went_is_not() -> None:
    pool = BlockPool(2)
    first, second = pool.take(2)
    pool.publish(key(0), first)
    assert pool.take_changes() == ((key(0),), ())
    assert pool.take_changes() == ((), ())
    pool.publish(key(1), second)
    pool.release([second])
    pool.release([first])
    pool.take(2)
    assert pool.take_changes() == ((), (key(0),))


def test_a_key_that_left_and_came_back_is_no_change() -> None:
    pool = BlockPool(1)
    (block,) = pool.take(1)
    pool.publish(key(0), block)
    pool.take_changes()
    pool.release([block])
    (block,) = pool.take(1)
    pool.publish(key(0), block)
    assert pool.take_changes() == ((), ())


def test_misuse_is_caught() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)
    pool.release([block])
    with pytest.raises(AssertionError, match="released more often"):
        pool.release([block])
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share([block])
    with pytest.raises(AssertionError, match="cannot be published"):
        pool.publish(key(0), block)


def test_a_shared_block_becomes_free_with_its_last_holder() -> None:
    pool = BlockPool(1)
    blocks = pool.take(1)
    pool.share(blocks)
    assert pool.private_count(blocks) == 0
    pool.release(blocks)
    assert pool.free_count == 0
    assert pool.private_count(blocks) == 1
    pool.release(blocks)
    assert pool.free_count == 1


def test_a_large_pool_is_told_piece_by_piece_and_again_to_who_has_forgotten() -> None:
    count = 2 * CHANGES_AT_ONCE + 1
    pool = BlockPool(count)
    for index, block in enumerate(pool.take(count)):
        pool.publish(key(index), block)
    for _ in range(2):
        told = [pool.take_changes() for _ in range(4)]
        assert [len(added) for added, _ in told] == [CHANGES_AT_ONCE, CHANGES_AT_ONCE, 1, 0]
        assert [each for added, _ in told for each in added] == [key(i) for i in range(count)]
        assert not pool.has_changes
        pool.tell_anew()


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 4) == blocks
    assert BlockTable(4).blocks_needed(tokens) == blocks


PIECE = 2
"""Keys that a follower of the machine's pool is told at once."""


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, publish, share by prefix and go; a plain dict says who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(blocks_module, "CHANGES_AT_ONCE", PIECE)
        self.pool = BlockPool(6)
        self.chains: list[list[BlockId]] = []
        self.known: dict[BlockKey, BlockId] = {}  # what a follower of the deltas believes

    @rule(count=st.integers(1, 7))
    def take(self, count: int) -> None:
        free = self.pool.free_count
        try:
            blocks = self.pool.take(count)
        except OutOfBlocks:
            assert count > free
            assert self.pool.free_count == free
        else:
            held = {block for chain in self.chains for block in chain}
            assert not held & set(blocks), "a held block was given away"
            self.chains.append(blocks)

    @precondition(lambda self: self.chains)
    @rule(data=st.data(), first=st.integers(0, 5))
    def publish(self, data: st.DataObject, first: int) -> None:
        published = set(self.pool._key_of)
        for index, block in enumerate(data.draw(st.sampled_from(self.chains)), first):
            if block not in published:
                self.pool.publish(key(index), block)

    @rule(first=st.integers(0, 5), count=st.integers(1, 4))
    def hold(self, first: int, count: int) -> None:
        keys = [key(index) for index in range(first, first + count)]
        expected = self.pool.published(keys)
        blocks = self.pool.hold_published(keys)
        assert len(blocks) == expected
        if blocks:
            self.chains.append(blocks)

    @precondition(lambda self: self.chains)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chain = data.draw(st.sampled_from(self.chains))
        self.chains.remove(chain)
        self.pool.release(chain)

    @rule()
    def follow_a_piece(self) -> None:
        added, removed = self.pool.take_changes()
        assert len(added) + len(removed) <= PIECE
        assert not set(added) & set(removed)
        for gone in removed:
            del self.known[gone]
        for come in added:
            assert come not in self.known
            self.known[come] = self.pool._block_of[come]

    @rule()
    def follow(self) -> None:
        while self.pool.has_changes:
            self.follow_a_piece()
        assert set(self.known) == set(self.pool._block_of)

    @rule()
    def forget(self) -> None:
        self.known.clear()
        self.pool.tell_anew()

    def teardown(self) -> None:
        self.patch.undo()

    @invariant()
    def holds(self) -> None:
        self.pool.check()
        held = {block for chain in self.chains for block in chain}
        assert self.pool.free_count == 6 - len(held)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_what_one_owner_holds_twice_is_private_when_nobody_else_does() -> None:
    pool = BlockPool(3)
    alone, shared = pool.take(2)
    pool.share([alone, shared, shared])
    assert pool.private_count([alone, alone, shared, shared]) == 1
    pool.release([shared])
    assert pool.private_count([alone, alone, shared, shared]) == 2
