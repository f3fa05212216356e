"""Who stands aside, and who goes back when."""

import math

from hypothesis import given
from hypothesis import strategies as st

from pdserve.ids import RequestId
from pdserve.router.deferrals import Deferrals
from pdserve.router.orders.static import StaticOrder
from tests.unit.router.entries import entry


def _order() -> StaticOrder:
    return StaticOrder(lambda entry: entry.work_ns)


def _taken(deferrals: Deferrals, open_bits: int, now_ns: int) -> list[str]:
    return [one.id for one in deferrals.take_due(open_bits, now_ns, _order())]


def test_one_goes_back_for_a_worker_that_is_open_the_best_first() -> None:
    deferrals = Deferrals()
    for name, work_ms, bits in (("r1", 30, 0b110), ("r2", 10, 0b010), ("r3", 5, 0b100)):
        deferrals.add(entry(name, work_ms), 1000, bits)
    assert _taken(deferrals, 0b001, 0) == []
    assert _taken(deferrals, 0b011, 0) == ["r2"]
    assert _taken(deferrals, 0b011, 0) == ["r1"]
    assert _taken(deferrals, 0b011, 0) == []
    assert [one.id for one in deferrals] == ["r3"]


def test_all_go_back_who_have_waited_enough() -> None:
    deferrals = Deferrals()
    for name, until_ns in (("r1", 10), ("r2", 20), ("r3", 30)):
        deferrals.add(entry(name, 10), until_ns, 0b1)
    assert deferrals.next_ns == 10
    assert _taken(deferrals, 0, 9) == []
    assert _taken(deferrals, 0, 20) == ["r1", "r2"]
    assert deferrals.next_ns == 30
    assert RequestId("r3") in deferrals
    assert RequestId("r1") not in deferrals


def test_who_left_is_not_taken() -> None:
    deferrals = Deferrals()
    one = entry("r1", 10)
    deferrals.add(one, 10, 0b1)
    deferrals.remove(one)
    assert len(deferrals) == 0
    assert _taken(deferrals, 0b1, 10) == []
    assert deferrals.next_ns == math.inf


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 7)), max_size=20), st.data())
def test_nobody_is_forgotten(waits: list[tuple[int, int]], data: st.DataObject) -> None:
    """Who has waited enough is taken at the next look, whatever opened before."""
    deferrals = Deferrals()
    left = {}
    for number, (until_ns, bits) in enumerate(waits):
        deferrals.add(entry(f"r{number}", 1 + number % 3), until_ns, bits)
        left[f"r{number}"] = until_ns
    for now_ns in range(0, 51, 5):
        for name in _taken(deferrals, data.draw(st.integers(0, 7)), now_ns):
            del left[name]
        assert deferrals.next_ns <= min(left.values(), default=math.inf)
        assert all(until_ns > now_ns for until_ns in left.values())
    assert not left
    assert len(deferrals) == 0


def test_keys_are_looked_up_again_once_their_basis_is_another() -> None:
    deferrals, order = Deferrals(), _order()
    entries = {name: entry(name, work_ms) for name, work_ms in (("r1", 10), ("r2", 20), ("r3", 30))}
    for one in entries.values():
        deferrals.add(one, 1000, 0b1)
    assert deferrals.take_due(0b1, 0, order) == [entries["r1"]]
    entries["r3"].work_ns = 1
    order.key_basis = "another"
    assert deferrals.take_due(0b1, 0, order) == [entries["r3"]]
    deferrals.check(order)
