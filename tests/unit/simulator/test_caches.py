from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from pdserve.simulator import caches
from pdserve.simulator.caches import BlockCache, Blocks


def chain(document: int, length: int) -> Blocks:
    """A document's first blocks; documents share the first two."""
    names = [0, 1, *range(100 * document, 100 * document + 98)]
    return tuple(names[:length])


def told_more(told: set[int], cache: BlockCache) -> set[int]:
    """What somebody knows of it who knew ``told`` and hears what has changed since: never what is
    known, never that something left of which nothing was heard."""
    added, removed = cache.take_changes()
    assert set(removed) <= told
    assert not told & set(added)
    return (told - set(removed)) | set(added)


def test_children_are_evicted_before_their_parents() -> None:
    cache = BlockCache(4)
    cache.touch(chain(1, 4))
    cache.touch(chain(2, 3))  # one fresh block: the tail of the first has to go
    assert cache.prefix_blocks(chain(1, 4)) == 3
    assert cache.prefix_blocks(chain(2, 3)) == 3


def test_a_prefix_longer_than_the_cache_leaves_its_beginning() -> None:
    cache = BlockCache(3)
    cache.touch(chain(1, 5))
    assert len(cache) == 3
    assert cache.prefix_blocks(chain(1, 5)) == 3


def test_a_cache_of_nothing_has_nothing() -> None:
    cache = BlockCache(0)
    cache.touch(chain(1, 2))
    assert len(cache) == 0
    assert cache.take_changes() == ((), ())


Steps = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 8), st.booleans()), max_size=40)


@given(steps=Steps, block_max=st.one_of(st.none(), st.integers(0, 9)))
def test_what_is_told_is_what_is_there_and_never_too_much(
    steps: list[tuple[int, int, bool]], block_max: int | None
) -> None:
    cache = BlockCache(block_max)
    told: set[int] = set()
    for document, length, tells in steps:
        cache.touch(chain(document, length))
        assert block_max is None or len(cache) <= block_max
        if tells:
            told = told_more(told, cache)
    told = told_more(told, cache)
    assert len(told) == len(cache)
    for document in range(1, 6):
        here = [key in told for key in chain(document, 8)]
        assert sum(here) == cache.prefix_blocks(chain(document, 8)), "a child outlived its parent"


@given(steps=Steps, block_max=st.integers(0, 30), oldest_max=st.integers(1, 4))
def test_it_is_a_list_by_last_use_however_many_are_found_at_once(
    steps: list[tuple[int, int, bool]], block_max: int, oldest_max: int
) -> None:
    cache = BlockCache(block_max)
    used: list[int] = []
    told: set[int] = set()
    with patch.object(caches, "OLDEST_MAX", oldest_max):
        for document, length, shrinks in steps:
            keys = chain(document, length)
            used = [key for key in used if key not in keys] + [*reversed(keys)]
            used = used[max(0, len(used) - block_max) :]
            cache.touch(keys)
            if shrinks:  # a prompt takes the room
                cache.trim(block_max // 2)
                used = used[max(0, len(used) - block_max // 2) :]
            told = told_more(told, cache)
            assert told == set(used)
