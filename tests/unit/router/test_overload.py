"""Shedding as a policy: pace, shares, returns; and the whole of it in a small simulated cluster."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.clock import MS, S
from pdserve.lifecycle import Event
from pdserve.messages import Refused, Request, ServiceClass
from pdserve.router.admission import CHECK_NS
from pdserve.router.core import Command, RouterCore
from pdserve.router.overload import (
    ANSWERS,
    BACKLOG_MIN,
    PACE_MIN,
    PACE_NS_MIN,
    RETURN_MS_MAX,
    RETURN_MS_MIN,
    Answers,
    Pace,
    Returns,
    TenantQueues,
)
from pdserve.router_config import RouterConfig
from pdserve.simulator.result import Result
from pdserve.simulator.run import SimulationSettings, simulate
from pdserve.simulator.settings import STUDY_COSTS
from pdserve.simulator.synthetic import always, either, merged, poisson
from tests.unit.router.build import core_with, hello, request
from tests.unit.router.build import settings as config_of

FCFS = replace(config_of(), policy="fcfs", preemption=False)
TENANTS = st.sampled_from(["a", "b", "c"])


# ── parts ────────────────────────────────────────────────────────────────────────────────────────


def test_the_pace_is_that_of_the_queue_and_never_more_than_there_are_workers() -> None:
    for work_per_s, workers in ((0.5, 0.5), (2.0, 2.0), (9.0, 4.0), (0.0, PACE_MIN)):
        pace = Pace()
        for step in range(20):
            now_ns = step * S
            pace.observe(BACKLOG_MIN, round(work_per_s * now_ns), now_ns)
        assert pace.workers(4) == pytest.approx(workers)


def test_without_a_backlog_nobody_knows_the_pace() -> None:
    pace = Pace()
    pace.observe(BACKLOG_MIN, 0, 0)
    pace.observe(BACKLOG_MIN, 0, PACE_NS_MIN - 1)
    assert pace.workers(3) == 3.0
    pace.observe(BACKLOG_MIN, 0, PACE_NS_MIN + S)
    assert pace.workers(3) == PACE_MIN
    pace.observe(BACKLOG_MIN - 1, 0, PACE_NS_MIN + 2 * S)
    assert pace.workers(3) == 3.0


def test_what_waits_while_nobody_serves_says_nothing_of_the_pace() -> None:
    pace = Pace()
    pace.observe(BACKLOG_MIN, 0, 0)
    pace.set_workers(0)
    pace.observe(BACKLOG_MIN, 0, 3 * S)
    pace.set_workers(2)
    pace.observe(BACKLOG_MIN, 0, 6 * S)
    assert pace.workers(2) == 2.0
    pace.observe(BACKLOG_MIN, 0, 6 * S + PACE_NS_MIN)
    assert pace.workers(2) == PACE_MIN


def test_while_a_long_prompt_is_computed_the_queue_is_not_taken_to_stand_still() -> None:
    """A worker says after every chunk how far it is, for longer than the pace looks back."""
    core, (p0, _) = core_with(hello("p0", chunk_tokens=128), hello("d0"), config=FCFS)
    core.on_submit(request("long", 12_800), 0)
    for chunk in range(100):
        now_ns = (chunk + 1) * 128 * MS
        p0.chunk(request("long", 12_800), (chunk + 1) * 128, elapsed_ms=128, now_ns=now_ns)
        commands = core.on_submit(request(f"short {chunk}", 100), now_ns)
        assert not [c.message.error for c in commands if isinstance(c.message, Refused)]


def test_what_is_computed_is_as_much_as_was_to_do_where_it_was_computed() -> None:
    """Nobody takes back what is computed: not because a worker is slow, which raises what is left
    of its prompts, nor because another has cached what this one computes."""
    core, (p0, _) = core_with(hello("p0", chunk_tokens=128), hello("d0"), config=FCFS)
    asked = request("long", 512)
    core.on_submit(asked, 0)
    worker = core.state.fleet.get(p0.hello.worker)
    assert worker is not None
    work_ns = worker.prompts[asked.request].work_ns
    assert core.state.computed_work_ns == 0
    computed_ns = []
    for chunk in range(3):
        p0.chunk(asked, (chunk + 1) * 128, elapsed_ms=900, now_ns=(chunk + 1) * S)
        computed_ns.append(core.state.computed_work_ns)
    assert computed_ns == sorted(set(computed_ns))
    p0.event(asked, Event.PREFILL_DONE, now_ns=4 * S)
    assert computed_ns[-1] < core.state.computed_work_ns <= work_ns


def test_who_comes_when_a_pool_is_back_is_not_refused_for_the_time_that_it_was_away() -> None:
    """Found by ``tests.simulation``: 20 short prompts were predicted to take a minute."""
    core, _ = core_with(hello("d0"))  # the prefill pool is not there yet
    for number in range(20):
        core.on_submit(request(f"r{number}", 600, deadline_ms=40_000), number * 100 * MS)
    core.on_hello(hello("p0"), 6 * S)
    commands = core.on_submit(request("probe", 600, deadline_ms=40_000), 6 * S + 100 * MS)
    refused = [c.message for c in commands if isinstance(c.message, Refused)]
    assert not refused, refused[0].error


@pytest.mark.parametrize("leaves", ["p0", "d0"])
def test_a_pool_that_drains_has_no_pace_though_it_is_still_there(leaves: str) -> None:
    """Found by ``tests.simulation``: the only worker left and waited for another one to take over
    what it had parked, and who came meanwhile was predicted to wait for a minute."""
    core, reporters = core_with(hello("p0"), hello("d0"))
    leaver = next(each for each in reporters if each.hello.worker == leaves)
    leaver.report(draining=True)
    for number in range(20):
        core.on_submit(request(f"r{number}", 600, deadline_ms=40_000), number * 100 * MS)
    core.on_submit(request("later", 600, deadline_ms=40_000), 6 * S)
    core.on_hello(hello(f"{leaves[0]}1"), 6 * S)
    commands = core.on_submit(request("probe", 600, deadline_ms=40_000), 6 * S + 100 * MS)
    refused = [c.message for c in commands if isinstance(c.message, Refused)]
    assert not refused, refused[0].error


def test_an_answers_time_is_the_usual_one_unless_it_may_have_fewer_tokens() -> None:
    answers = Answers()
    for _ in range(ANSWERS - 1):
        answers.ended(100, 100 * 20 * MS)
    assert answers.expected_ns(1000) == 0.0
    answers.ended(100, 100 * 20 * MS)
    assert answers.expected_ns(1000) == pytest.approx(100 * 20 * MS)
    assert answers.expected_ns(10) == pytest.approx(10 * 20 * MS)


@given(
    st.lists(st.tuples(st.floats(0, 300_000), st.floats(0, 20 * S), st.integers(0, S))),
)
def test_returns_are_given_out_one_after_the_other_and_none_beyond_the_bound(
    asked: list[tuple[float, float, int]],
) -> None:
    returns, now_ns, last_ns = Returns(), 0, 0
    for soonest_ms, spacing_ns, pause_ns in asked:
        now_ns += pause_ns
        after_ms = returns.after_ms(soonest_ms, spacing_ns, now_ns)
        assert RETURN_MS_MIN <= after_ms <= RETURN_MS_MAX
        if after_ms < RETURN_MS_MAX / 2 and soonest_ms < RETURN_MS_MAX / 2:
            assert after_ms >= int(soonest_ms)
            assert now_ns + (after_ms + 1) * MS >= last_ns
            last_ns = now_ns + after_ms * MS


@given(st.lists(st.tuples(TENANTS, st.integers(1, 10**9)), max_size=40), TENANTS, st.integers(0))
def test_what_goes_before_a_tenants_request_is_bounded_by_its_own_share(
    waiting: list[tuple[str, int]], tenant: str, work_ns: int
) -> None:
    queues = TenantQueues({"a": 2.0})
    for name, each_ns in waiting:
        queues.entered(name, each_ns)
    own_ns = sum(each_ns for name, each_ns in waiting if name == tenant)
    total_ns = sum(each_ns for _, each_ns in waiting)
    before_ns = queues.before_ns(tenant, work_ns)
    assert own_ns <= before_ns <= total_ns
    weight = 2.0 if tenant == "a" else 1.0
    others = (4.0 - weight) / weight
    assert before_ns <= own_ns + (own_ns + work_ns) * others + 2
    assert queues.others(tenant) == any(name != tenant for name, _ in waiting)
    for name, each_ns in waiting:
        queues.left(name, each_ns)
    assert len(queues) == 0


# ── admission ────────────────────────────────────────────────────────────────────────────────────


def _core(config: RouterConfig) -> RouterCore:
    return core_with(hello("p0", chunk_tokens=1), hello("d0"), config=config)[0]


def _refused(commands: list[Command]) -> list[str]:
    return [c.message.error.kind for c in commands if isinstance(c.message, Refused)]


def _filled(config: RouterConfig, tokens: int = 500) -> RouterCore:
    """One runs, and one waits, as long each."""
    core = _core(config)
    for name in ("runs", "waits"):
        assert _refused(core.on_submit(request(name, tokens), 0)) == []
    return core


def _retried(asked: Request, retries: int = 1) -> Request:
    return replace(asked, retries=retries)


def test_a_deadline_that_cannot_be_kept_is_refused_at_once() -> None:
    core = _filled(config_of())
    assert _refused(core.on_submit(request("late", 100, deadline_ms=550), 0)) == ["queue_full"]
    assert _refused(core.on_submit(request("in time", 100, deadline_ms=2000), 0)) == []


def test_whoever_is_next_is_taken_whatever_is_predicted() -> None:
    """Or else costs that are believed wrongly would never be put right."""
    core = _core(config_of())
    assert _refused(core.on_submit(request("runs", 900, deadline_ms=100), 0)) == []


def test_a_prediction_that_refuses_everybody_is_checked_now_and_then() -> None:
    core = _core(replace(config_of(), ttft_max_ms={"standard": 100.0}))
    late = "queue_full"
    assert _refused(core.on_submit(request("a", 900), 0)) == [late]
    assert _refused(core.on_submit(request("b", 900), CHECK_NS - 1)) == [late]
    assert _refused(core.on_submit(request("c", 900), CHECK_NS)) == []
    assert _refused(core.on_submit(request("d", 900), 3 * CHECK_NS)) == [late]  # c is computed
    assert _refused(core.on_submit(request("e", 10), 3 * CHECK_NS)) == [late]


def test_each_class_has_its_bound() -> None:
    config = replace(config_of(), ttft_max_ms={"interactive": 650.0, "batch": 4000.0})
    for service_class, tokens, kinds in (
        ("interactive", 200, ["queue_full"]),
        ("standard", 200, []),
        ("batch", 200, []),
        ("batch", 3500, ["queue_full"]),
    ):
        asked = replace(request("a", tokens), service_class=ServiceClass(service_class))
        assert _refused(_filled(config).on_submit(asked, 0)) == kinds, service_class


def test_who_asks_again_is_turned_away_first() -> None:
    config = replace(config_of(), ttft_max_ms={"standard": 2500.0})
    core = _filled(config)
    asked = request("a", 500)
    assert _refused(core.on_submit(_retried(asked), 0)) == ["queue_full"]
    assert _refused(core.on_submit(asked, 0)) == []
    counters = core.snapshot(0).counters
    assert (counters["retries_arrived"], counters["shed_retries"], counters["shed"]) == (1, 1, 1)


def test_a_retry_has_half_of_the_places() -> None:
    core = _filled(config_of(waiting_max=2))
    assert _refused(core.on_submit(_retried(request("again", 10)), 0)) == ["queue_full"]
    assert _refused(core.on_submit(request("first", 10), 0)) == []


def test_a_tenant_has_its_share_of_the_places_while_others_wait() -> None:
    core = _core(config_of(waiting_max=8))
    core.on_submit(request("runs", 900), 0)
    for index in range(4):
        assert _refused(core.on_submit(request(f"f{index}", 100, tenant="flood"), 0)) == []
    assert _refused(core.on_submit(request("f4", 100, tenant="flood"), 0)) == []  # alone: all
    assert _refused(core.on_submit(request("v0", 100, tenant="victim"), 0)) == []
    assert _refused(core.on_submit(request("f5", 100, tenant="flood"), 0)) == [
        "rate_limit_exceeded"
    ]
    assert _refused(core.on_submit(request("v1", 100, tenant="victim"), 0)) == []


def test_who_has_waited_too_long_is_told_so_and_never_computed() -> None:
    core = _filled(replace(config_of(), queue_age_max_ms=5000.0))
    assert core.next_tick_ns() is not None
    assert _refused(core.on_tick(4499 * MS)) == []
    # Half a second of prefill more, and its first token would come after the bound.
    assert _refused(core.on_tick(4500 * MS)) == ["queue_full"]
    assert core.snapshot(0).counters["shed_by_age"] == 1
    assert core.snapshot(0).phases["queued"] == 0
    core.state.check()


def test_what_was_dispatched_once_is_not_refused_for_its_age() -> None:
    core = _core(replace(config_of(), queue_age_max_ms=5000.0))
    core.on_submit(request("runs", 500), 0)
    core.on_submit(request("again", 500, attempt=1), 0)
    assert _refused(core.on_tick(100 * S)) == []


# ── the whole, simulated ─────────────────────────────────────────────────────────────────────────

TTFT_S = 2.0
WORKERS = 2
SHED = RouterConfig(ttft_max_ms={"standard": TTFT_S * 1000})
CAPACITY_PER_S = WORKERS * S / STUDY_COSTS.prefill_ns(1500, 0)


def _goodput(result: Result, tenant: str | None = None) -> int:
    in_time = np.nan_to_num(result.ttft_s, nan=np.inf) <= TTFT_S
    mine = np.array([tenant in (None, each) for each in result.tenants])
    return int((result.finished & in_time & mine).sum())


def _cluster(**changes: object) -> SimulationSettings:
    given_settings = SimulationSettings(
        router=SHED, prefill_workers=WORKERS, decode_workers=1, timeout_s=20.0
    )
    return replace(given_settings, **changes)  # type: ignore[arg-type]


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2, 5]), st.booleans())
def test_goodput_stays_near_its_peak_whatever_is_offered(
    seed: int, times: int, mixed: bool
) -> None:
    """Mixed lengths let more through, never less: the short ones fit in."""
    prompt = either(1500, 300, other_share=0.5) if mixed else always(1500)

    def goodput(per_s: float) -> int:
        count = round(per_s * 6)
        trace = poisson(count, per_s, seed=seed, prompt=prompt, generated=always(20))
        result = simulate(trace, _cluster())
        late = result.ttft_s > TTFT_S + 0.5
        # A long prompt may have to let short ones go first once it has begun.
        assert mixed or not late.any(), "who is served at all is served in time, or nearly"
        return _goodput(result)

    assert goodput(times * CAPACITY_PER_S) >= 0.9 * goodput(CAPACITY_PER_S)


@settings(max_examples=2, deadline=None)
@given(st.integers(0, 1000))
def test_a_flood_takes_nothing_from_another_tenant(seed: int) -> None:
    """The victim asks for less than its half."""
    rate = 0.35 * CAPACITY_PER_S
    victim = poisson(
        round(rate * 6), rate, seed=seed, prompt=always(1500), generated=always(20), tenant="v"
    )
    flood_rate = 5 * CAPACITY_PER_S
    flood = poisson(
        round(flood_rate * 6), flood_rate, seed=seed + 1, prompt=always(1500),
        generated=always(20), tenant="f",
    )  # fmt: skip
    alone = _goodput(simulate(victim, _cluster()), "v")
    assert _goodput(simulate(merged("both", victim, flood), _cluster()), "v") >= 0.9 * alone


def test_a_storm_of_retries_does_not_keep_the_cluster_down() -> None:
    """Ten times the load for a second, from clients that ask four times more, heeding
    nothing: who arrives five seconds later is served in time."""
    calm = poisson(
        round(0.6 * CAPACITY_PER_S * 12), 0.6 * CAPACITY_PER_S, seed=3,
        prompt=always(1500), generated=always(20),
    )  # fmt: skip
    burst = poisson(
        round(10 * CAPACITY_PER_S), 10 * CAPACITY_PER_S, seed=4,
        prompt=always(1500), generated=always(20),
    )  # fmt: skip
    storming = _cluster(client_retries=4, client_patience_s=0.5)
    result = simulate(merged("storm", calm, burst), storming)
    after = result.arrival_s >= 6.0
    assert result.counters["shed_retries"] > 100
    assert after.sum() > 20
    assert (result.ttft_s[after] <= TTFT_S).all()
