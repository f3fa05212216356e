"""Role switches: new work goes elsewhere at once, former work is called back and goes on."""

from dataclasses import replace

import pytest

from pdserve.clock import S
from pdserve.errors import ConfigError
from pdserve.ids import WorkerId
from pdserve.lifecycle import Event
from pdserve.messages import Role
from pdserve.router.commands import Command
from pdserve.router.duties import Duty
from tests.unit.router.build import core_with, handoff, hello, request, settings, told


def test_streams_of_a_worker_that_prefills_from_now_on_resume_elsewhere() -> None:
    core, (p0, d0, _) = core_with(hello("p0"), hello("d0"), hello("d1"))
    first, second = request("r1", 40), request("r2", 40)
    core.on_submit(first, 0)
    core.on_submit(second, 0)
    assert core.state.entries[first.request].decode == "d0"
    p0.event(first, Event.PREFILL_DONE)
    d0.event(first, Event.ADOPTED)
    said = told(core.assign(WorkerId("d0"), Duty.PREFILL, 0))
    assert "d0 <- preempt r1" in said
    parked = core.on_parked(handoff(first, d0.hello), WorkerId("d0"), 0)
    assert told(parked) == ["d1 <- resume r1, decode d1"]
    core.state.check()
    # Now both prefill: who comes is sent where nobody is.
    d0.report()
    third = request("r3", 600)
    assert any(
        line.startswith("d0 <- dispatch r3, decode d1") for line in told(core.on_submit(third, 0))
    )
    core.state.check()
    assert core.state.counters["lost"] == 0


def test_prompts_of_a_worker_that_decodes_from_now_on_go_back_to_the_queue() -> None:
    core, (p0, p1, _) = core_with(hello("p0"), hello("p1"), hello("d0"))
    asked = [request(f"r{index}", 500) for index in range(2)]
    for one in asked:
        core.on_submit(one, 0)
    there = list(core.state.fleet.at(0).prompts)
    said = told(core.assign(WorkerId("p0"), Duty.DECODE, 0))
    assert said == [f"p0 <- preempt {there[0]}"]
    back = next(one for one in asked if one.request == there[0])
    p0.event(back, Event.PREEMPTED, computed_tokens=128)
    core.state.check()
    assert core.state.entries[back.request].prefill != "p0"
    other = next(one for one in asked if one is not back)
    again = told(p1.event(other, Event.PREFILL_DONE))
    assert any(line.startswith(f"p1 <- dispatch {back.request}") for line in again)
    assert not core.state.vacating


def test_who_does_not_heed_a_call_is_called_again_a_second_later() -> None:
    core, (p0, d0, _) = core_with(hello("p0"), hello("d0"), hello("d1"))
    one = request("r1", 40)
    core.on_submit(one, 0)
    assert told(core.assign(WorkerId("d0"), Duty.PREFILL, 0)) == [], "it is on its way there"
    p0.event(one, Event.PREFILL_DONE)
    d0.event(one, Event.ADOPTED, now_ns=S // 2)
    assert told(core.on_tick(S)) == ["d0 <- preempt r1"]
    assert told(core.on_tick(S + S // 2)) == []
    assert told(core.on_tick(2 * S)) == ["d0 <- preempt r1"]
    d0.event(one, Event.ENDED, now_ns=2 * S)
    core.on_tick(3 * S)
    assert not core.state.vacating


@pytest.mark.parametrize(
    ("mode", "worker", "duty", "problem"),
    [
        ("disaggregated", "p0", Duty.DECODE, "p0 is the only worker that prefills"),
        ("disaggregated", "d0", Duty.PREFILL, "d0 is the only worker that decodes"),
        ("disaggregated", "d0", Duty.BOTH, "needs router.mode auto"),
        ("aggregated", "d0", Duty.PREFILL, "every worker does both"),
        ("disaggregated", "d7", Duty.PREFILL, "'d7', which is not there; there are d0, p0"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    mode: str, worker: str, duty: Duty, problem: str
) -> None:
    config = replace(settings(), mode=mode)  # type: ignore[arg-type]
    core, _ = core_with(hello("p0"), hello("d0"), config=config)
    with pytest.raises(ConfigError, match=problem):
        core.assign(WorkerId(worker), duty, 0)
    assert core.state.counters["role_switches"] == 0
    core.state.check()


def test_in_auto_mode_a_worker_keeps_to_its_role_until_it_has_both_again() -> None:
    core, _ = core_with(
        hello("p0"), hello("d0"), hello("d1"), config=replace(settings(), mode="auto")
    )
    worker = core.state.fleet.get(WorkerId("d1"))
    assert worker is not None
    core.assign(WorkerId("d1"), Duty.PREFILL, 0)
    assert (worker.hello.role, worker.prefills, worker.decodes) == (Role.PREFILL, True, False)
    core.assign(WorkerId("d1"), Duty.DECODE, 0)
    assert (worker.hello.role, worker.prefills, worker.decodes) == (Role.DECODE, False, True)
    core.assign(WorkerId("d1"), Duty.BOTH, 0)
    assert (worker.hello.role, worker.prefills, worker.decodes) == (Role.DECODE, True, True)
    core.state.check()


def test_pools_are_told_apart_from_roles() -> None:
    core, _ = core_with(hello("p0"), hello("d0"), hello("d1"))
    core.assign(WorkerId("d1"), Duty.PREFILL, 0)
    shown = {w.worker: (w.role, w.pool) for w in core.snapshot(0).workers}
    assert shown[WorkerId("d1")] == (Role.PREFILL, Role.DECODE)
    seen = core.observation(0)
    assert (seen.prefill.workers, seen.prefill.lent) == (2, 1)
    assert (seen.decode.workers, seen.decode.lent) == (1, -1)


def test_who_is_drained_gets_nothing_and_what_it_has_moves() -> None:
    core, (p0, d0, _) = core_with(hello("p0"), hello("d0"), hello("d1"))
    one = request("r1", 40)
    core.on_submit(one, 0)
    p0.event(one, Event.PREFILL_DONE)
    d0.event(one, Event.ADOPTED)
    assert told(core.assign(WorkerId("d0"), Duty.NONE, 0)) == ["d0 <- preempt r1"]
    parked = core.on_parked(handoff(one, d0.hello), WorkerId("d0"), 0)
    assert told(parked) == ["d1 <- resume r1, decode d1"]
    core.on_submit(request("r2", 40), 0)
    assert core.state.entries[request("r2", 40).request].decode == "d1"
    core.state.check()
    shown = {w.worker: w.duty for w in core.snapshot(0).workers}
    assert shown == {"p0": Duty.PREFILL, "d0": Duty.NONE, "d1": Duty.DECODE}
    seen = core.observation(0)
    assert (seen.decode.workers, seen.decode.lent) == (1, -1), "as if it were not there"
    with pytest.raises(ConfigError, match="d1 is the only worker that decodes"):
        core.assign(WorkerId("d1"), Duty.NONE, 0)
    core.assign(WorkerId("d0"), Duty.DECODE, 0)
    core.assign(WorkerId("d1"), Duty.NONE, 0)
    core.state.check()


def test_in_aggregated_mode_a_worker_is_drained_and_comes_back() -> None:
    config = replace(settings(), mode="aggregated")
    core, _ = core_with(hello("d0"), hello("d1"), config=config)
    one = request("r1", 600)
    core.on_submit(one, 0)
    first = core.state.entries[one.request].prefill
    assert first is not None
    other = WorkerId("d1" if first == "d0" else "d0")
    assert f"{first} <- preempt r1" in told(core.assign(first, Duty.NONE, 0))
    core.state.check()
    worker = core.state.fleet.get(first)
    assert worker is not None
    assert worker.rests
    with pytest.raises(ConfigError, match=f"{other} is the only worker that prefills"):
        core.assign(other, Duty.NONE, 0)
    core.assign(first, Duty.BOTH, 0)
    assert not worker.rests
    core.state.check()


def test_a_prompt_that_was_bound_to_a_worker_and_called_back_is_bound_to_another() -> None:
    config = replace(settings(), placement="round_robin")
    core, (p0, _, _) = core_with(hello("p0"), hello("p1"), hello("d0"), config=config)
    one = request("r1", 500)
    core.on_submit(one, 0)
    assert core.state.entries[one.request].prefill == "p0"
    assert told(core.assign(WorkerId("p0"), Duty.NONE, 0)) == ["p0 <- preempt r1"]
    said = told(p0.event(one, Event.PREEMPTED, computed_tokens=128))
    assert any(line.startswith("p1 <- dispatch r1") for line in said), "it waits for ever at p0"
    core.state.check()


# ── standing in ──────────────────────────────────────────────────────────────────────────────────


def _routes(commands: list[Command]) -> list[str]:
    return [line.partition(", level")[0] for line in told(commands)]


def test_a_prefill_worker_decodes_until_the_pool_that_died_has_a_worker_again() -> None:
    core, (p0, d0) = core_with(hello("p0"), hello("d0"))
    one = request("r1", 40)
    core.on_submit(one, 0)
    p0.event(one, Event.PREFILL_DONE)
    d0.event(one, Event.ADOPTED)
    core.on_worker_lost(d0.hello.worker, 0)
    assert core.snapshot(0).workers[0].duty is Duty.BOTH
    again = replace(one, attempt=1)
    assert _routes(core.on_submit(again, 0)) == ["p0 <- dispatch r1, decode p0"]
    p0.event(again, Event.PREFILL_DONE)
    p0.event(again, Event.ADOPTED)
    core.state.fleet.check()
    assert told(core.on_hello(hello("d1"), 0)) == ["p0 <- preempt r1"]
    parked = core.on_parked(handoff(again, p0.hello), WorkerId("p0"), 0)
    assert told(parked) == ["d1 <- resume r1, decode d1"]
    assert core.snapshot(0).workers[1].duty is Duty.PREFILL
    assert _routes(core.on_submit(request("r2", 40), 0)) == ["p0 <- dispatch r2, decode d1"]
    core.state.check()


def test_decode_workers_prefill_until_the_pool_that_died_has_a_worker_again() -> None:
    core, (p0, d0, _) = core_with(hello("p0"), hello("d0"), hello("d1"))
    core.on_worker_lost(p0.hello.worker, 0)
    asked = [request(f"r{index}", 500) for index in range(2)]
    said = [_routes(core.on_submit(one, 0)) for one in asked]
    assert said == [["d0 <- dispatch r0, decode d0"], ["d1 <- dispatch r1, decode d1"]]
    back = told(core.on_hello(hello("p1"), 0))
    assert back == ["d0 <- preempt r0", "d1 <- preempt r1"]
    d0.event(asked[0], Event.PREEMPTED, computed_tokens=128)
    assert core.state.entries[asked[0].request].prefill == "p1"
    core.state.check()


def test_one_more_of_those_who_are_left_helps_too_and_a_death_among_them_changes_nothing() -> None:
    core, (p0, p1, d0) = core_with(hello("p0"), hello("p1"), hello("d0"))
    core.on_worker_lost(d0.hello.worker, 0)
    core.on_hello(hello("p2"), 0)
    core.on_worker_lost(p0.hello.worker, 0)
    core.on_worker_lost(p1.hello.worker, 0)
    assert _routes(core.on_submit(request("r", 40), 0)) == ["p2 <- dispatch r, decode p2"]
    core.on_hello(hello("d1"), 0)
    assert not core.state.fleet.shares
    core.state.check()


@pytest.mark.parametrize(("left", "stand_in"), [(True, True), (False, False)])
def test_nobody_stands_in_for_who_left_in_order_or_where_that_is_not_wanted(
    left: bool, stand_in: bool
) -> None:
    core, (_, d0) = core_with(
        hello("p0"), hello("d0"), config=replace(settings(), stand_in=stand_in)
    )
    core.on_worker_lost(d0.hello.worker, 0, left=left)
    assert core.on_submit(request("r", 40), 0) == []
    assert core.state.counters["stand_ins"] == 0
