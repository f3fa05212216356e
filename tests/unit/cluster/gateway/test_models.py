"""Who answers to which name, and how several routers look as one."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.cluster.gateway.calls import Session
from pdserve.cluster.gateway.models import Control, Controls, Models, by_model, merged
from pdserve.cluster.http.exposition import joined
from pdserve.config import GatewayConfig
from pdserve.errors import ConfigError, InvalidField, StoreUnavailable, UnknownModel
from tests.unit.cluster.fake_session import FakeSession

CONFIG = GatewayConfig()
NAMES = st.sampled_from("abcd")


def session(name: str, *adapters: str) -> FakeSession:
    made = FakeSession(adapters=adapters)
    made.model_name = name
    return made


class Registry(RuleBasedStateMachine):
    """Models come and go in any order; a dictionary of names says who must be found."""

    def __init__(self) -> None:
        super().__init__()
        self.first = session("first", "first-lora")
        self.models = Models(self.first, CONFIG)
        self.expected: dict[str, Session] = {"first": self.first, "first-lora": self.first}

    @rule(name=NAMES, adapters=st.sets(st.sampled_from(["a", "b", "x", "first-lora"])))
    def add(self, name: str, adapters: set[str]) -> None:
        new = session(name, *sorted(adapters))
        names = {name, *adapters}
        if names & set(self.expected):
            with pytest.raises(ConfigError, match="two models are called"):
                self.models.add(new, CONFIG)
        else:
            self.models.add(new, CONFIG)
            self.expected |= dict.fromkeys(names, new)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        own = self.expected.get(name)
        if own is not None and own.model_name == name:
            self.expected = {n: each for n, each in self.expected.items() if each is not own}
        else:
            name = "nobody"
        self.models.remove(name)

    @invariant()
    def everybody_is_found_by_every_name(self) -> None:
        assert set(self.models.names) == set(self.expected)
        for name in (*"abcdx", "first", "first-lora"):
            if name in self.expected:
                assert self.models.of(name) is self.expected[name]
            else:
                with pytest.raises(UnknownModel):
                    self.models.of(name)
        assert self.models.of(None) is self.models.of("") is self.first
        assert next(iter(self.models)) is self.first


TestRegistry = Registry.TestCase
TestRegistry.settings = settings(max_examples=20, stateful_step_count=15)


def test_an_unknown_name_is_told_all_that_there_are() -> None:
    models = Models(session("a", "a-lora"), CONFIG)
    models.add(session("b"), CONFIG)
    with pytest.raises(
        UnknownModel, match="'c' does not exist; this cluster serves 'a', 'a-lora', 'b'"
    ):
        models.of("c")
    with pytest.raises(InvalidField, match="has 257 characters"):
        models.of("x" * 257)


def test_a_model_has_its_own_way_of_being_read() -> None:
    models = Models(session("a"), CONFIG)
    own = GatewayConfig(tool_call_parser="llama3_json")
    models.add(session("b"), own)
    assert [models.asked({"model": name})[1] for name in ("a", "b")] == [CONFIG, own]
    assert models.asked({"model": 3})[0].model_name == "a"  # whoever reads the body refuses it


def snapshot(*workers: str, levels: tuple[int, ...] = (0,), oldest_ms: int = 0) -> dict[str, Any]:
    return {
        "mode": "disaggregated",
        "workers": [{"worker": each, "role": "decode", "running": 1} for each in workers],
        "queue_lengths": levels,
        "queued_work_ms": sum(levels),
        "oldest_wait_ms": oldest_ms,
        "oldest_request": f"r{oldest_ms}",
        "parked": 1,
        "phases": {"queued": sum(levels)},
        "prefill_tokens_per_s": 5,
        "counters": {"dispatched": len(workers)},
        "router": {"epoch": 1},
    }


COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple)


@given(st.dictionaries(NAMES, st.tuples(COUNTS, st.integers(0, 99)), min_size=1))
def test_together_nothing_is_lost_or_counted_twice(
    each: dict[str, tuple[tuple[int, ...], int]],
) -> None:
    own = {
        name: snapshot(f"{name}-1", f"{name}-2", levels=levels, oldest_ms=oldest_ms)
        for name, (levels, oldest_ms) in each.items()
    }
    whole = merged(own)
    assert sum(whole["queue_lengths"]) == sum(sum(levels) for levels, _ in each.values())
    assert whole["phases"]["queued"] == sum(whole["queue_lengths"]) == whole["queued_work_ms"]
    assert whole["oldest_wait_ms"] == max(oldest_ms for _, oldest_ms in each.values())
    assert whole["oldest_request"] == f"r{whole['oldest_wait_ms']}"
    assert whole["counters"] == {"dispatched": 2 * len(each)}
    assert whole["parked"] == len(each)
    apart = by_model(whole)
    assert set(apart) == set(own)
    for name, part in apart.items():
        assert [worker["worker"] for worker in part["workers"]] == [f"{name}-1", f"{name}-2"]
        assert part["queue_lengths"] == own[name]["queue_lengths"]


class FakeRouter:
    def __init__(self, name: str, *, answers: bool = True) -> None:
        self.name = name
        self.answers = answers
        self.assigned: list[tuple[str, str]] = []

    async def snapshot(self) -> Mapping[str, Any]:
        if not self.answers:
            raise StoreUnavailable("no router leads")
        return snapshot(f"{self.name}-1")

    async def assign(self, worker: str, role: str) -> str:
        self.assigned.append((worker, role))
        return ""

    @property
    def control(self) -> Control:
        return Control(self.snapshot, self.snapshot, {}, self.assign)


def controls_of(*routers: FakeRouter) -> Controls:
    first, *others = routers
    controls = Controls(first.name, first.control)
    for each in others:
        controls.add(each.name, each.control)
    return controls


def test_one_router_alone_answers_as_it_is() -> None:
    assert asyncio.run(controls_of(FakeRouter("a")).snapshot()) == snapshot("a-1")


def test_a_silent_router_hides_nobody_but_itself() -> None:
    for silent in ("a", "b"):
        routers = [FakeRouter(name, answers=name != silent) for name in ("a", "b")]
        whole = asyncio.run(controls_of(*routers).snapshot())
        assert whole["models"][silent] == {}
        assert {worker["model"] for worker in whole["workers"]} == {"a", "b"} - {silent}
        assert set(by_model(whole)) == {"a", "b"} - {silent}
    nobody = controls_of(FakeRouter("a", answers=False), FakeRouter("b", answers=False))
    with pytest.raises(StoreUnavailable, match="of no model"):
        asyncio.run(nobody.snapshot())


def test_a_role_is_given_by_the_router_that_has_the_worker() -> None:
    a, b = FakeRouter("a"), FakeRouter("b")
    controls = controls_of(a, b)
    asyncio.run(controls.assign("b-1", "none"))
    asyncio.run(controls.assign("nobody", "none"))  # whose refusal it is, is the first one's
    assert (a.assigned, b.assigned) == ([("nobody", "none")], [("b-1", "none")])


def test_a_question_for_a_model_that_left_is_told_who_is_there() -> None:
    controls = controls_of(FakeRouter("a"), FakeRouter("b"))
    controls.remove("b")
    assert controls.of(None) is controls.of("a")
    with pytest.raises(UnknownModel, match="serves 'a'"):
        controls.of("b")


def test_texts_of_figures_become_one_with_each_family_once() -> None:
    a = '# HELP x Some\n# TYPE x counter\nx{m="a"} 1.0\n# TYPE y gauge\ny{m="a"} 2.0\n'
    b = a.replace('"a"', '"b"') + "# TYPE z gauge\nz 3.0\n"
    assert joined([a]) == a
    assert joined([a, b]).splitlines() == [
        "# HELP x Some",
        "# TYPE x counter",
        'x{m="a"} 1.0',
        'x{m="b"} 1.0',
        "# TYPE y gauge",
        'y{m="a"} 2.0',
        'y{m="b"} 2.0',
        "# TYPE z gauge",
        "z 3.0",
    ]
