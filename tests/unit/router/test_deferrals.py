"""Who stands aside, and who goes back when."""

import math
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.ids import RequestId
from pdserve.router.deferrals import Deferrals
from pdserve.router.entry import Entry
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


@dataclass
class _Modelled:
    entry: Entry
    until_ns: int
    awaited_bits: int


class BesideAModel(RuleBasedStateMachine):
    """Whoever looks at all of them takes the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.deferrals, self.order = Deferrals(), _order()
        self.model: dict[str, _Modelled] = {}
        self.now_ns = self.count = 0

    @rule(work=st.integers(1, 4), wait_ns=st.integers(1, 30), bits=st.integers(1, 15))
    def add(self, work: int, wait_ns: int, bits: int) -> None:
        self.count += 1
        one = entry(f"r{self.count}", work, order=self.count)
        self.deferrals.add(one, self.now_ns + wait_ns, bits)
        self.model[one.id] = _Modelled(one, self.now_ns + wait_ns, bits)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), again=st.booleans())
    def remove(self, data: st.DataObject, again: bool) -> None:
        """Perhaps to come again, with another end."""
        gone = self.model.pop(data.draw(st.sampled_from(sorted(self.model))))
        self.deferrals.remove(gone.entry)
        if again:
            gone = _Modelled(gone.entry, gone.until_ns + 1, gone.awaited_bits)
            self.deferrals.add(gone.entry, gone.until_ns, gone.awaited_bits)
            self.model[gone.entry.id] = gone

    @rule(work=st.integers(1, 4))
    def other_keys(self, work: int) -> None:
        for one in self.model.values():
            one.entry.work_ns = (one.entry.work_ns * 7 + work) % 5
        self.order.key_basis = object()

    @rule(passed_ns=st.integers(0, 10), open_bits=st.integers(0, 15))
    def look(self, passed_ns: int, open_bits: int) -> None:
        self.now_ns += passed_ns
        due = [one for one in self.model.values() if one.until_ns <= self.now_ns]
        if not due:
            wanting = [one for one in self.model.values() if one.awaited_bits & open_bits]
            wanting.sort(key=lambda one: (one.entry.work_ns, one.entry.order))
            due = wanting[:1]
        taken = self.deferrals.take_due(open_bits, self.now_ns, self.order)
        assert taken == [one.entry for one in due]
        for one in due:
            del self.model[one.entry.id]

    @invariant()
    def is_whole(self) -> None:
        self.deferrals.check(self.order)
        assert [one.id for one in self.deferrals] == list(self.model)
        soonest_ns = min((one.until_ns for one in self.model.values()), default=math.inf)
        assert self.deferrals.next_ns <= soonest_ns


TestBesideAModel = BesideAModel.TestCase
