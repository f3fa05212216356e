"""Which decode worker is paired with a prefill worker, by the way there and its step."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.ids import HostId, RequestId
from pdserve.messages import Stop
from pdserve.router.fleet import Fleet
from pdserve.router.pairing import hand_offs
from pdserve.router.placement import Choice, place
from pdserve.router_config import RouterConfig
from tests.unit.router.build import BLOCK_TOKENS, hello
from tests.unit.router.entries import COSTS, entry

labels = st.lists(st.sampled_from(["", "a", "b"]), max_size=3).map(tuple)


def _fleet(places: dict[str, tuple[str, ...]], *, mode: str = "disaggregated") -> Fleet:
    """Workers at slots 0, 1, … each on a host of its own, unless names end in the same letter."""
    fleet = Fleet(RouterConfig(mode=mode), COSTS)  # type: ignore[arg-type]
    for name, where in places.items():
        plain = hello(name)
        address = dataclasses.replace(plain.address, host=HostId(f"host-{name[-1]}"))
        fleet.add(dataclasses.replace(plain, address=address, place=where), 0)
    return fleet


def _stream(fleet: Fleet, slot: int, count: int) -> None:
    worker = fleet.at(slot)
    worker.streams = {RequestId(f"y{i}"): None for i in range(count)}
    fleet.changed(worker)


def _decode_of(fleet: Fleet, *, tpot_slo_ns: float | None = None, max_tokens: int = 8) -> str:
    one = entry("r", 160)
    one.request = dataclasses.replace(one.request, stop=Stop(max_tokens=max_tokens))
    choice = place(
        fleet,
        one,
        ((0, fleet.prefill_bits),),
        block_tokens=BLOCK_TOKENS,
        tpot_slo_ns=tpot_slo_ns,
        now_ns=0,
    )
    assert isinstance(choice, Choice)
    return str(choice.decode.id)


def test_the_same_rack_before_the_same_zone_before_another() -> None:
    prefill = ("z", "r")
    near = {"d1": ("y", "r"), "d2": ("z", "q"), "d3": ("z", "r")}
    assert _decode_of(_fleet({"p0": prefill, **near})) == "d3"
    del near["d3"]
    assert _decode_of(_fleet({"p0": prefill, **near})) == "d2"


def test_the_same_host_before_the_same_rack() -> None:
    assert _decode_of(_fleet({"p7": ("z", "r"), "d1": ("z", "r"), "d7": ("z", "r")})) == "d7"


def test_without_labels_the_shortest_step_wins_wherever_it_is() -> None:
    fleet = _fleet({"p7": (), "d1": (), "d7": ()})
    assert not fleet.is_placed
    assert _decode_of(fleet) == "d1"


def test_a_way_that_saves_less_than_the_steps_cost_is_not_taken() -> None:
    fleet = _fleet({"p0": ("z", "r"), "d1": ("y", "q"), "d2": ("z", "r")})
    _stream(fleet, 2, 3)
    assert _decode_of(fleet, max_tokens=1) == "d2"
    assert _decode_of(fleet, max_tokens=10_000) == "d1"


def test_a_near_worker_without_room_is_passed_over() -> None:
    fleet = _fleet({"p0": ("z", "r"), "d1": ("y", "q"), "d2": ("z", "r")})
    fleet.at(2).free_blocks = 3
    fleet.changed(fleet.at(2))
    assert _decode_of(fleet) == "d1"


def test_a_near_worker_whose_steps_would_break_the_objective_is_passed_over() -> None:
    fleet = _fleet({"p0": ("z", "r"), "d1": ("y", "q"), "d2": ("z", "r")})
    _stream(fleet, 2, 3)
    limit_ns = COSTS.decode.step_ns(2, 0)
    assert _decode_of(fleet, max_tokens=1, tpot_slo_ns=limit_ns) == "d1"


def test_who_comes_and_goes_changes_the_pairs() -> None:
    fleet = _fleet({"p0": ("z", "r"), "d1": ("y", "q"), "d2": ("z", "r")})
    assert _decode_of(fleet) == "d2"
    fleet.remove(fleet.at(2))
    assert _decode_of(fleet) == "d1"
    fleet.add(dataclasses.replace(hello("d3"), place=("y", "q")), 0)
    assert fleet.at(2).id == "d3", "where the near one was"
    assert _decode_of(fleet) == "d1"
    fleet.add(dataclasses.replace(hello("d4"), place=("z", "r")), 0)
    assert _decode_of(fleet) == "d4"


@given(one=labels, other=labels, ratio=st.floats(1, 8))
def test_ways_are_symmetric_and_no_shorter_than_within_a_rack(
    one: tuple[str, ...], other: tuple[str, ...], ratio: float
) -> None:
    way = hand_offs(one, other, same_host=False, far_ratio=ratio)
    assert way == hand_offs(other, one, same_host=False, far_ratio=ratio)
    assert way >= 1.0
    if one and "" not in one:
        assert hand_offs(one, one, same_host=False, far_ratio=ratio) == 1.0
    assert hand_offs(one, other, same_host=True, far_ratio=ratio) == 0.0


@pytest.mark.parametrize(("levels", "way"), [(0, 1.0), (1, 3.0), (2, 9.0)])
def test_each_level_of_difference_makes_the_way_longer(levels: int, way: float) -> None:
    other = ("z", "r")[: 2 - levels] + ("x",) * levels
    assert hand_offs(("z", "r"), other, same_host=False, far_ratio=3.0) == way
