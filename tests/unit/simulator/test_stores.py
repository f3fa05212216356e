"""The stores of all hosts: what another host has of a prompt, beside asking each of them."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.simulator.settings import SimulationSettings
from pdserve.simulator.stores import HostStore, stores_of
from tests.unit.simulator.test_caches import chain

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
