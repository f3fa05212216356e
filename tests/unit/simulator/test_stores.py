"""The stores of all hosts: what another host has of a prompt, beside asking each of them."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.config import SsdWrite
from pdserve.simulator.caches import Blocks
from pdserve.simulator.settings import SimulationSettings
from pdserve.simulator.stores import Disk, Holders, HostStore, stores_of
from tests.unit.simulator.test_caches import chain, told_more

HOSTS, BLOCK_TOKENS = 3, 16

Steps = st.lists(
    st.tuples(st.integers(0, HOSTS - 1), st.integers(1, 4), st.integers(1, 8), st.booleans()),
    max_size=40,
)


def _stores(store_blocks: int | None, *, fetches: bool = True) -> list[HostStore]:
    settings = SimulationSettings(
        hosts=HOSTS,
        store_tokens=None if store_blocks is None else store_blocks * BLOCK_TOKENS,
        fetches=fetches,
    )
    return [store for store in stores_of(settings, BLOCK_TOKENS) if store is not None]


@given(steps=Steps, store_blocks=st.one_of(st.none(), st.integers(1, 9)))
def test_what_another_host_has_is_the_most_that_any_one_of_them_has(
    steps: list[tuple[int, int, int, bool]], store_blocks: int | None
) -> None:
    stores = _stores(store_blocks)
    for host, document, length, shrinks in steps:
        stores[host].touch(chain(document, length))
        if shrinks and store_blocks is not None:
            stores[host].trim(store_blocks // 2)
        for asking in stores:
            for other in range(1, 5):
                keys = chain(other, 8)
                most = max(one.prefix_blocks(keys) for one in stores if one is not asking)
                assert asking.blocks_elsewhere(keys) == most


def test_a_prefix_of_which_two_hosts_have_a_part_each_is_as_long_as_the_longer_part() -> None:
    asking, one, other = _stores(None)
    one.touch(chain(1, 3))
    other.touch(chain(1, 5)[3:])
    assert asking.blocks_elsewhere(chain(1, 5)) == 3


def test_where_nothing_is_fetched_nobody_else_has_anything() -> None:
    asking, other, _ = _stores(None, fetches=False)
    other.touch(chain(1, 3))
    assert not asking.fetches
    assert asking.blocks_elsewhere(chain(1, 3)) == 0


# ── disks ────────────────────────────────────────────────────────────────────────────────────────


def store_with_disk(memory_blocks: int, disk_blocks: int | None, write: SsdWrite) -> HostStore:
    return HostStore(memory_blocks, 0, None, Disk(disk_blocks, write))


def alone(document: int, length: int) -> Blocks:
    """Blocks that no other document has."""
    return tuple(range(1000 * document, 1000 * document + length))


def evict_all(store: HostStore) -> None:
    limit = store.block_max
    assert limit is not None
    store.touch(alone(99, limit))


def test_what_is_found_again_outlives_memory() -> None:
    store = store_with_disk(8, None, "second_touch")
    store.stored(alone(1, 3))
    store.stored(alone(2, 3))
    store.found(alone(1, 2))
    evict_all(store)
    assert store.prefix_blocks(alone(1, 3)) == 2
    assert store.memory_blocks(alone(1, 3)) == 0
    assert store.prefix_blocks(alone(2, 3)) == 0
    store.found(alone(1, 2))
    assert store.memory_blocks(alone(1, 3)) == 2


def test_all_that_is_stored_outlives_memory_where_it_is_written_through() -> None:
    store = store_with_disk(8, None, "write_through")
    store.stored(alone(1, 3))
    evict_all(store)
    assert store.prefix_blocks(alone(1, 3)) == 3


def test_what_leaves_memory_is_kept_where_that_is_what_is_written() -> None:
    store = store_with_disk(8, None, "on_evict")
    store.stored(alone(1, 3))
    assert store.memory_blocks(alone(1, 3)) == 3
    evict_all(store)
    assert store.memory_blocks(alone(1, 3)) == 0
    assert store.prefix_blocks(alone(1, 3)) == 3


def test_a_full_disk_forgets_what_was_used_least_recently_children_first() -> None:
    store = store_with_disk(8, 4, "write_through")
    store.stored(alone(1, 3))
    store.stored(alone(2, 3))
    evict_all(store)
    assert store.prefix_blocks(alone(1, 3)) == 1
    assert store.prefix_blocks(alone(2, 3)) == 3


def test_without_a_limit_of_memory_there_is_nothing_for_a_disk_to_do() -> None:
    unlimited = SimulationSettings(store_tokens=None, disk_tokens=None)
    assert [store is not None and store.has_disk for store in stores_of(unlimited, 16)] == [False]
    limited = SimulationSettings(store_tokens=160, disk_tokens=None)
    assert [store is not None and store.has_disk for store in stores_of(limited, 16)] == [True]


DiskSteps = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 8), st.booleans(), st.booleans()), max_size=40
)


@given(
    steps=DiskSteps,
    memory_blocks=st.integers(0, 9),
    disk_blocks=st.none() | st.integers(1, 20),
    write=st.sampled_from(["second_touch", "write_through", "on_evict"]),
)
def test_what_is_told_is_what_memory_or_disk_has(
    steps: list[tuple[int, int, bool, bool]],
    memory_blocks: int,
    disk_blocks: int | None,
    write: SsdWrite,
) -> None:
    holders = Holders()
    store = HostStore(memory_blocks, 0, holders, Disk(disk_blocks, write))
    elsewhere = HostStore(memory_blocks, 1, holders)
    told: set[int] = set()
    for document, length, finds, tells in steps:
        keys = chain(document, length)
        if finds:
            store.found(keys[: store.prefix_blocks(keys)])
        else:
            store.stored(keys)
        if tells:
            told = told_more(told, store)
    told = told_more(told, store)
    for document in range(1, 5):
        keys = chain(document, 8)
        prefix = store.prefix_blocks(keys)
        assert all(key in told for key in keys[:prefix])
        assert prefix == len(keys) or keys[prefix] not in told
        assert store.memory_blocks(keys) <= prefix
        assert elsewhere.blocks_elsewhere(keys) == prefix
