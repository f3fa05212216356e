"""The change feed: a copy that follows it equals the index."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.ids import BlockKey
from pdserve.kvstore.feed import ChangeFeed

KEYS = [BlockKey(bytes([i]) * 16) for i in range(4)]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30),
    st.integers(1, 8),
)
def test_a_copy_that_asks_now_and_then_equals_the_index(
    steps: list[tuple[int, bool]], changes_max: int
) -> None:
    feed = ChangeFeed(changes_max=changes_max)
    index: set[BlockKey] = set()
    copy: set[BlockKey] = set()
    after = 0
    for which, asks in steps:
        key = KEYS[which]
        if key in index:
            index.remove(key)
            feed.removed(key)
        else:
            index.add(key)
            feed.added(key)
        if asks:
            changes = feed.since(after)
            if changes is None:
                assert feed.sequence - after > changes_max
                copy = set(index)
            else:
                added, removed = changes
                assert set(added).isdisjoint(removed)
                copy = (copy - set(removed)) | set(added)
            after = feed.sequence
            assert copy == index


def test_a_sequence_that_this_feed_never_gave_is_not_believed() -> None:
    feed = ChangeFeed()
    feed.added(KEYS[0])
    assert feed.since(2) is None
    assert feed.since(-1) is None
    assert feed.since(1) == ([], [])
