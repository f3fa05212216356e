from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.clock import MS, S
from pdserve.router.costs import CostModel, DecodeCost, MoveCost, PrefillCost, StepCost
from pdserve.router.decode_shadow import FCFS, Job, Outcome, Plan, replay
from pdserve.router.lengths import LengthModel

FAR = 10**6 * S


def costs(*, move_s: float = 0.0) -> CostModel:
    """A step takes 10 ms, whatever is in it."""
    step = StepCost(fixed_s=0.01, context_s=0.0, sequence_s=0.0)
    move = MoveCost(fixed_s=move_s, bytes_per_s=1e18)
    return CostModel(
        name="test",
        origin="believed",
        prefill=PrefillCost(fixed_s=0.0, token_s=1e-3),
        decode=DecodeCost(small=step, large=step),
        handoff=move,
        host=move,
        ssd=move,
        kv_token_bytes=1,
    )


def job(arrived_ms: int, generated: int, *, prompt: int = 10, runs: bool = False) -> Job:
    return Job("all", arrived_ms * MS, prompt, generated, runs=runs)


def heavy_tailed() -> LengthModel:
    model = LengthModel()
    for _ in range(400):
        for length in (10, 10, 10, 1000):
            model.observe("all", length)
    return model


def played(
    jobs: Sequence[Job],
    plan: Plan = FCFS,
    *,
    running_max: int = 1,
    capacity_tokens: int = 1 << 30,
    lengths: LengthModel | None = None,
    moves_max: int = 2,
    move_s: float = 0.0,
) -> Outcome:
    return replay(
        jobs,
        plan,
        0,
        running_max=running_max,
        capacity_tokens=capacity_tokens,
        costs=costs(move_s=move_s),
        lengths=lengths or LengthModel(),
        moves_max=moves_max,
    )


def test_alone_an_answer_takes_its_steps() -> None:
    outcome = played([job(0, 50)])
    assert outcome.mean_ns == 500 * MS
    assert outcome.wait_ns == 0


def test_the_second_waits_for_the_only_place() -> None:
    outcome = played([job(0, 50), job(100, 10)])
    assert outcome.mean_ns == (500 + 500) * MS / 2
    assert outcome.wait_ns == 400 * MS / 2
    assert outcome.memory_share == 0


def test_side_by_side_nobody_waits() -> None:
    outcome = played([job(0, 50), job(100, 10)], running_max=2)
    assert outcome.mean_ns == (500 + 100) * MS / 2


def test_memory_makes_wait_as_well() -> None:
    outcome = played([job(0, 50), job(100, 10)], running_max=2, capacity_tokens=40)
    assert outcome.wait_ns == 400 * MS / 2
    assert outcome.memory_share == 1


def test_who_fits_nowhere_runs_alone() -> None:
    outcome = played([job(0, 50, prompt=1000), job(0, 10)], running_max=2, capacity_tokens=40)
    assert outcome.mean_ns == (500 + 600) * MS / 2


def test_who_runs_already_goes_on_and_has_come_so_far() -> None:
    there = Job("all", -5 * S, 10, 50, attained_tokens=30, runs=True)
    outcome = played([job(0, 10), there])
    assert outcome.mean_ns == (300 + 200) * MS / 2  # of what there was, only what is to come
    assert outcome.p99_ns == pytest.approx(5200 * MS, rel=0.02)


def test_a_plan_that_parks_lets_the_short_pass() -> None:
    jobs = [job(0, 1000), job(1000, 10)]
    assert played(jobs).mean_ns == pytest.approx((10_000 + 9_100) * MS / 2)
    outcome = played(jobs, Plan(FAR, parks=True), lengths=heavy_tailed())
    assert outcome.mean_ns == pytest.approx((10_100 + 100) * MS / 2)


def test_moves_take_time_and_are_few() -> None:
    jobs = [job(0, 1000), job(1000, 10)]
    plan = Plan(FAR, parks=True)
    free = played(jobs, plan, lengths=heavy_tailed())
    dear = played(jobs, plan, lengths=heavy_tailed(), move_s=0.5)
    assert dear.mean_ns == pytest.approx(free.mean_ns + 500 * MS)
    none = played(jobs, plan, lengths=heavy_tailed(), moves_max=0)
    assert none == played(jobs)


def test_a_small_spread_keeps_to_arrival() -> None:
    jobs = [job(0, 1000), job(1000, 10)]
    outcome = played(jobs, Plan(1 * MS, parks=True), lengths=heavy_tailed())
    assert outcome.mean_ns == played(jobs).mean_ns


def test_where_memory_binds_the_small_one_is_begun_first() -> None:
    jobs = [job(0, 100), job(1, 10, prompt=1000), job(2, 10)]
    outcome = played(jobs, Plan(FAR, weighs_memory=True))
    assert outcome.mean_ns == pytest.approx((1000 + 1098 + 1199) * MS / 3)


def test_nobody_to_play_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        played([])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5000), st.integers(1, 300), st.integers(1, 500)),
        min_size=1,
        max_size=25,
    ),
    st.sampled_from([FCFS, Plan(S, True), Plan(FAR, True, True), Plan(FAR, False, True)]),
    st.integers(1, 4),
    st.integers(1, 2000),
)
def test_every_job_ends_no_sooner_than_its_own_steps(
    sizes: list[tuple[int, int, int]], plan: Plan, running_max: int, capacity: int
) -> None:
    jobs = sorted(
        (job(at, generated, prompt=prompt) for at, generated, prompt in sizes),
        key=lambda one: one.arrived_ns,
    )
    outcome = played(
        jobs, plan, running_max=running_max, capacity_tokens=capacity, lengths=heavy_tailed()
    )
    alone_ns = sum(one.generated_tokens for one in jobs) * 10 * MS / len(jobs)
    assert outcome.mean_ns >= alone_ns * (1 - 1e-9)
    assert outcome.wait_ns >= 0
