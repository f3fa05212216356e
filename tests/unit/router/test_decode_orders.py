from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.ids import RequestId, WorkerId
from pdserve.router.costs import believed
from pdserve.router.decode_base import SWAPS_MAX, exchange, memory_binds, ranked
from pdserve.router.decode_orders import (
    DecodeOrder,
    DecodeRoom,
    Stream,
    Swap,
    decode_order_of,
    mlfq_level,
)
from tests.unit.router.streams import ONLY, room, stream

COSTS = believed(1000)


def names(streams: list[Stream]) -> str:
    return " ".join(one.request for one in streams)


def order(name: str) -> DecodeOrder:
    return decode_order_of(name, COSTS, moves_max=2)  # type: ignore[arg-type]


def swap(out: str, into: str) -> Swap:
    return Swap(RequestId(out), RequestId(into))


FULL = room(1, running_max=1)


def test_first_come_first_served_goes_by_arrival_and_never_parks() -> None:
    fcfs = order("fcfs")
    parked = [stream("b", arrived_ns=2), stream("c", arrived_ns=1), stream("a", arrived_ns=2)]
    assert names(fcfs.resume_order(parked, 9)) == "c a b"
    assert fcfs.swaps([stream("long", worker=ONLY, generated=10**6)], parked, [FULL], 9) == []


@pytest.mark.parametrize(
    ("generated", "level"), [(0, 0), (31, 0), (32, 1), (95, 1), (96, 2), (223, 2), (224, 3)]
)
def test_each_quantum_is_twice_the_one_before(generated: int, level: int) -> None:
    assert mlfq_level(generated) == level


def test_mlfq_parks_whoever_has_used_up_its_quantum() -> None:
    mlfq = order("mlfq")
    parked = [stream("new", generated=0)]
    assert mlfq.swaps([stream("old", worker=ONLY, generated=31)], parked, [FULL], 0) == []
    old = [stream("old", worker=ONLY, generated=32)]
    assert mlfq.swaps(old, parked, [FULL], 0) == [swap("old", "new")]


def test_mlfq_is_first_come_first_served_within_a_level() -> None:
    parked = [
        stream("late", since_ns=2),
        stream("low", generated=40, since_ns=0),
        stream("early", since_ns=1),
    ]
    assert names(order("mlfq").resume_order(parked, 3)) == "early late low"


def test_the_oracle_serves_the_shortest_remaining_first() -> None:
    oracle = order("oracle")
    parked = [stream("a", total=50), stream("b", generated=90, total=100)]
    assert names(oracle.resume_order(parked, 0)) == "b a"
    running = [stream("r", worker=ONLY, total=20)]
    assert oracle.swaps(running, parked, [FULL], 0) == [swap("r", "b")]


def test_the_oracle_weighs_what_remains_by_memory_where_memory_binds() -> None:
    oracle = order("oracle")
    short = room(1, free_tokens=10)
    parked = [stream("small", context=100, total=50), stream("large", context=1000, total=20)]
    oracle.swaps([stream("r", worker=ONLY, context=10, total=1)], parked, [short], 0)
    assert names(oracle.resume_order(parked, 0)) == "small large"
    oracle.swaps([stream("r", worker=ONLY, context=10, total=1)], parked, [FULL], 0)
    assert names(oracle.resume_order(parked, 0)) == "large small"


def test_an_oracle_that_nobody_told_anything_says_so() -> None:
    with pytest.raises(AssertionError, match="how long a will be"):
        order("oracle").resume_order([stream("a"), stream("b", total=1)], 0)


@pytest.mark.parametrize("name", ["gated", "fcfs", "mlfq", "oracle"])
def test_every_order_takes_an_empty_cluster_and_an_ended_answer(name: str) -> None:
    one = order(name)
    one.finished("all", 5, 0)
    one.finished("all", 5, 0, context_tokens=9, arrived_ns=0)
    assert one.resume_order([], 0) == []
    assert one.swaps([], [], [], 0) == []
    assert one.swaps([], [stream("a", total=3)], [], 0) == []


def test_memory_binds_where_workers_have_places_left() -> None:
    assert memory_binds([room(1, running_max=2)])
    assert not memory_binds([room(2, running_max=2)])


# ── exchange ─────────────────────────────────────────────────────────────────────────────────────


def wished(running: list[Stream], parked: list[Stream], *rooms: DecodeRoom) -> list[Swap]:
    """By tokens generated, least first."""
    return exchange(
        ranked(running, lambda one: one.generated_tokens),
        ranked(parked, lambda one: one.generated_tokens),
        rooms,
    )


def test_who_fits_beside_the_others_needs_no_swap() -> None:
    running = [stream("r", worker=ONLY, generated=9)]
    assert wished(running, [stream("p")], room(1)) == []


def test_the_place_that_was_free_is_given_once() -> None:
    running = [stream("r", worker=ONLY, generated=9)]
    parked = [stream("p"), stream("q", generated=1)]
    assert wished(running, parked, room(1, running_max=2)) == [swap("r", "q")]


def test_who_is_no_better_waits() -> None:
    running = [stream("r", worker=ONLY, generated=9)]
    assert wished(running, [stream("p", generated=9)], FULL) == []


def test_the_worst_that_leaves_room_enough_goes() -> None:
    running = [
        stream("worst", worker=ONLY, generated=9, context=50),
        stream("bad", worker=ONLY, generated=8, context=90),
    ]
    tight = room(2, running_max=2, free_tokens=10)
    assert wished(running, [stream("p", context=100)], tight) == [swap("bad", "p")]


def test_the_room_that_a_large_one_leaves_serves_several() -> None:
    running = [stream("large", worker=ONLY, generated=9, context=300)]
    parked = [stream("p", context=100), stream("q", context=100), stream("s", context=100)]
    assert wished(running, parked, room(1, free_tokens=0)) == [swap("large", "p")]


def test_streams_of_workers_without_a_room_stay() -> None:
    running = [stream("r", worker=WorkerId("draining"), generated=9)]
    assert wished(running, [stream("p")], FULL) == []


streams = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 200)), max_size=30)


@given(streams, streams, st.integers(0, 300))
def test_swaps_name_nobody_twice_gain_and_fit(
    running: list[tuple[int, int]], parked: list[tuple[int, int]], free: int
) -> None:
    outs = {
        f"r{index}": stream(f"r{index}", worker=ONLY, generated=generated, context=context)
        for index, (generated, context) in enumerate(running)
    }
    intos = {
        f"p{index}": stream(f"p{index}", generated=generated, context=context)
        for index, (generated, context) in enumerate(parked)
    }
    full = room(len(outs), running_max=len(outs), free_tokens=free)
    swaps = wished(list(outs.values()), list(intos.values()), full)
    named = [name for one in swaps for name in (one.out, one.into)]
    assert len(set(named)) == len(named)
    assert len(swaps) <= SWAPS_MAX
    for one in swaps:
        assert one.into is not None
        out, into = outs[one.out], intos[one.into]
        assert into.generated_tokens < out.generated_tokens
        free += out.context_tokens - into.context_tokens
        assert free >= 0
    better = [intos[str(one.into)].generated_tokens for one in swaps]
    assert all(first <= second for first, second in pairwise(better))
