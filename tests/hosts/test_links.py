"""What becomes of packets: by ratio, by seed, one direction at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hosts.links import CUT, NS_PER_MS, PERFECT, Link, Links

ratios = st.floats(0, 1)
links = st.builds(
    Link,
    loss_ratio=ratios,
    delay_ms=st.floats(0, 500),
    jitter_ms=st.floats(0, 100),
    duplicate_ratio=ratios,
)


@given(link=links, seed=st.integers(0, 2**32), now_ns=st.integers(0, 10**15))
def test_a_copy_arrives_neither_too_early_nor_too_late(link: Link, seed: int, now_ns: int) -> None:
    table = Links(seed)
    table.set("a", "b", link)
    for _ in range(10):
        arrivals = table.arrivals_ns("a", "b", now_ns=now_ns)
        assert len(arrivals) <= 2
        for arrival_ns in arrivals:
            late_ns = arrival_ns - now_ns
            assert link.delay_ms * NS_PER_MS - 1 <= late_ns
            assert late_ns <= (link.delay_ms + link.jitter_ms) * NS_PER_MS + 1
    assert table.carried_count == 10
    assert table.lost_count <= 10


@given(link=links, seed=st.integers(0, 2**32))
def test_one_seed_is_one_run(link: Link, seed: int) -> None:
    def run() -> list[list[int]]:
        table = Links(seed)
        table.set("a", "b", link)
        return [table.arrivals_ns("a", "b", now_ns=index) for index in range(50)]

    assert run() == run()


@given(link=links)
def test_a_link_has_one_direction_and_no_neighbours(link: Link) -> None:
    table = Links(0)
    table.set("a", "b", link)
    for pair in (("b", "a"), ("a", "c"), ("c", "b")):
        assert table.arrivals_ns(*pair, now_ns=5) == [5]


def test_what_is_cut_loses_all_and_what_is_healed_nothing() -> None:
    table = Links(0)
    table.set("a", "b", CUT)
    assert [table.arrivals_ns("a", "b", now_ns=0) for _ in range(100)] == [[]] * 100
    assert table.lost_count == 100
    table.set("a", "b", PERFECT)
    assert table.arrivals_ns("a", "b", now_ns=7) == [7]


def test_losses_are_as_many_as_was_said() -> None:
    table = Links(4)
    table.set("a", "b", Link(loss_ratio=0.05))
    for _ in range(10_000):
        table.arrivals_ns("a", "b", now_ns=0)
    assert 400 < table.lost_count < 600


@pytest.mark.parametrize(
    ("field", "value"), [("loss_ratio", 1.1), ("duplicate_ratio", -0.1), ("delay_ms", -1.0)]
)
def test_nonsense_is_refused_by_its_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Link(**{field: value})
