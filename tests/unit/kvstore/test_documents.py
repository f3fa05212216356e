"""Documents in memory: bounded, listed in order, answered once, worked on by one at a time."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.clock import S
from pdserve.errors import CapacityError
from pdserve.kvstore.documents import MemoryDocuments, New

NAMES = st.sampled_from(["a", "b", "c"])
WHO = st.sampled_from(["one", "two"])
DATA = st.binary(max_size=8)
BYTES_MAX, COUNT_MAX, KEEP_S, LEASE_S = 60, 2, 50, 5


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0
        self.documents = MemoryDocuments(bytes_max=BYTES_MAX, clock=lambda: self.now_s * S)
        self.made: dict[str, int] = {}  # and when they end
        self.states: dict[str, bytes] = {}
        self.answers: dict[str, dict[int, bytes]] = {}
        self.leases: dict[str, tuple[str, int]] = {}

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(work)

    def is_there(self, name: str) -> bool:
        return self.made.get(name, 0) > self.now_s

    @rule(seconds=st.integers(1, 20))
    def time_passes(self, seconds: int) -> None:
        self.now_s += seconds

    @rule(name=NAMES, state=DATA, content=DATA)
    def make(self, name: str, state: bytes, content: bytes) -> None:
        if self.is_there(name):
            return
        others = sum(map(self.is_there, self.made))
        try:
            new = New(
                name=name,
                state=state,
                groups=["all"],
                content=content,
                keep_s=KEEP_S,
                count_max=COUNT_MAX,
            )
            self.do(self.documents.make(new))
        except CapacityError:
            assert others >= COUNT_MAX or others  # full, or full of bytes
            return
        assert others < COUNT_MAX
        self.made.pop(name, None)
        self.made[name] = self.now_s + KEEP_S
        self.states[name], self.answers[name] = state, {}
        self.leases.pop(name, None)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        assert self.do(self.documents.remove(name)) == self.is_there(name)
        self.made.pop(name, None)

    @rule(name=NAMES, old=DATA, new=DATA, knows=st.booleans())
    def swap(self, name: str, old: bytes, new: bytes, knows: bool) -> None:
        if knows and self.is_there(name):
            old = self.states[name]
        swapped = self.do(self.documents.swap(name, old, new))
        assert swapped == (self.is_there(name) and self.states[name] == old)
        if swapped:
            self.states[name] = new

    @rule(name=NAMES, number=st.integers(0, 2), data=DATA)
    def answer(self, name: str, number: int, data: bytes) -> None:
        try:
            first = self.do(self.documents.answer(name, number, data))
        except CapacityError:
            return
        assert first == (self.is_there(name) and number not in self.answers[name])
        if first:
            self.answers[name][number] = data

    @rule(name=NAMES, who=WHO)
    def claim(self, name: str, who: str) -> None:
        holder, until_s = self.leases.get(name, ("", 0))
        free = holder == who or until_s <= self.now_s
        claimed = self.do(self.documents.claim(name, who, LEASE_S))
        assert claimed == (self.is_there(name) and free)
        if claimed:
            self.leases[name] = (who, self.now_s + LEASE_S)

    @rule(name=NAMES, who=WHO)
    def release(self, name: str, who: str) -> None:
        self.do(self.documents.release(name, who))
        if self.leases.get(name, ("", 0))[0] == who:
            self.leases[name] = ("", 0)

    @invariant()
    def what_was_made_is_there(self) -> None:
        there = [name for name in self.made if self.is_there(name)]
        assert self.do(self.documents.names("all")) == there
        for name in there:
            assert self.do(self.documents.state(name)) == self.states[name]
            assert self.do(self.documents.answers(name)) == self.answers[name]
        self.documents.check()


TestLife = Life.TestCase
