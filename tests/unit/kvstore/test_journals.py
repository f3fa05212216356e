"""Journals in memory: a model beside them says what must be found, and bounds hold throughout."""

from collections.abc import Coroutine
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.clock import S
from pdserve.errors import CapacityError
from pdserve.kvstore.journals import Found, MemoryJournals

COUNT_MAX, BYTES_MAX, KEEP_S = 3, 60, 10.0

NAMES = st.sampled_from("abcd")
DATA = st.binary(max_size=25)
ALIVE = st.sampled_from([0.0, 2.0])


class Clock:
    now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What it returns; in memory there is nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value
    raise AssertionError("it waits")


class Machine(RuleBasedStateMachine):
    """What is found is what was written last; what is gone stays gone until it is made again."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.journals = MemoryJournals(
            count_max=COUNT_MAX, bytes_max=BYTES_MAX, keep_s=KEEP_S, clock=self.clock
        )
        self.states: dict[str, bytes] = {}
        self.lines: dict[str, list[bytes]] = {}
        self.ends: set[str] = set()
        self.alive_until_ns: dict[str, int] = {}

    def forget(self, name: str) -> None:
        for known in (self.states, self.lines, self.alive_until_ns):
            known.pop(name, None)
        self.ends.discard(name)

    def note_gone(self) -> None:
        """Of those that are written still, none may have given way."""
        for name in list(self.states):
            if run(self.journals.find(name)) is None:
                assert self.clock() >= self.alive_until_ns[name]
                self.forget(name)

    @rule(name=NAMES, state=DATA, alive_s=ALIVE)
    def make(self, name: str, state: bytes, alive_s: float) -> None:
        if run(self.journals.find(name)) is not None:
            return  # names are drawn at random and never used twice
        self.forget(name)
        try:
            run(self.journals.make(name, state, alive_s=alive_s))
        except CapacityError:
            self.note_gone()
            return
        self.states[name], self.lines[name] = state, []
        self.alive_until_ns[name] = self.clock() + round(alive_s * S)
        self.note_gone()

    @rule(name=NAMES, state=DATA, alive_s=ALIVE)
    def write(self, name: str, state: bytes, alive_s: float) -> None:
        there = name in self.states
        try:
            run(self.journals.write(name, state, alive_s=alive_s))
        except CapacityError:
            self.note_gone()
            return
        if there:
            self.states[name] = state
            self.alive_until_ns[name] = self.clock() + round(alive_s * S)
        self.note_gone()

    @rule(name=NAMES, lines=st.lists(DATA, max_size=3), alive_s=ALIVE)
    def append(self, name: str, lines: list[bytes], alive_s: float) -> None:
        there = name in self.states
        try:
            ends = run(self.journals.append(name, lines, alive_s=alive_s))
        except CapacityError:
            self.alive_until_ns[name] = self.clock() + round(alive_s * S)
            self.note_gone()
            return
        assert ends == (not there or name in self.ends)
        if there:
            self.lines[name] += lines
            self.alive_until_ns[name] = self.clock() + round(alive_s * S)
        self.note_gone()

    @rule(name=NAMES)
    def ask_end(self, name: str) -> None:
        run(self.journals.ask_end(name))
        if name in self.states:
            self.ends.add(name)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        assert run(self.journals.remove(name)) == (name in self.states)
        self.forget(name)

    @rule(seconds=st.sampled_from([1, 5, 11]))
    def wait(self, seconds: int) -> None:
        self.clock.now_ns += seconds * S
        self.note_gone()

    @invariant()
    def is_as_the_model_says(self) -> None:
        for name, state in self.states.items():
            is_alive = self.clock() < self.alive_until_ns[name]
            assert run(self.journals.find(name)) == Found(state, is_alive, name in self.ends)
            assert run(self.journals.lines(name, 1, 2)) == self.lines[name][1:3]
        self.journals.check()


TestJournals = Machine.TestCase


@pytest.fixture
def journals() -> MemoryJournals:
    return MemoryJournals(count_max=2, bytes_max=10, keep_s=KEEP_S, clock=Clock())


def test_the_oldest_that_is_done_gives_way(journals: MemoryJournals) -> None:
    for name in "abc":
        run(journals.make(name, b"x"))
    assert run(journals.find("a")) is None
    assert run(journals.find("b")) is not None


def test_what_is_being_written_does_not_give_way(journals: MemoryJournals) -> None:
    run(journals.make("a", b"x", alive_s=1))
    run(journals.make("b", b"x", alive_s=1))
    with pytest.raises(CapacityError):
        run(journals.make("c", b"x"))


def test_bytes_are_bounded(journals: MemoryJournals) -> None:
    run(journals.make("a", b"12345", alive_s=1))
    with pytest.raises(CapacityError):
        run(journals.append("a", [b"123456"], alive_s=1))
    assert run(journals.lines("a", 0, 10)) == []
