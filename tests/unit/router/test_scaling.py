"""The autoscaler: what makes a pool grow and shrink, and that a constant load does not move it."""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdserve.config import AutoscalingConfig
from pdserve.messages import Role
from pdserve.router.scaling import (
    ADOPT_MS,
    Autoscaler,
    Bounds,
    DecodeSignals,
    Observation,
    Plan,
    PrefillSignals,
)
from tests.unit.router.pools_model import Load, Pools, Workers

SETTINGS = AutoscalingConfig(
    upscale_delay_s=2, downscale_delay_s=15, zero_delay_s=60, start_s=5, load_memory_s=30
)
PREFILL = PrefillSignals(
    workers=2, busy=0, queued=0, oldest_wait_ms=0, work_ms=0, arrived_work_ms=0, shed_count=0
)
DECODE = DecodeSignals(
    workers=2, blocks=120, worker_blocks=100, sequences=8, worker_sequences=64, parked=0,
    is_full=False, step_fixed_ms=10.0, step_shared_ms=8.0,
)  # fmt: skip


def plan(least: int = 1, most: int = 8, **fields: float | None) -> Plan:
    bounds = {role: Bounds(least, most) for role in Role}
    return Plan(settings=SETTINGS, bounds=bounds, **fields)


class Watched:
    """An autoscaler that is shown one thing for as long as is wanted."""

    def __init__(self, of: Plan) -> None:
        self.autoscaler = Autoscaler(of)
        self.at_ms = 1_000_000
        self.busy = 0.0  # prefill workers' worth of work that arrives
        self.arrived_ms = 0.0
        self.arrived = 0
        self.why = {Role.PREFILL: "", Role.DECODE: ""}

    def see(
        self,
        seconds: float,
        prefill: PrefillSignals = PREFILL,
        decode: DecodeSignals = DECODE,
        live: int = 1,
    ) -> tuple[int | None, int | None]:
        until_ms = self.at_ms + seconds * 1000
        while self.at_ms < until_ms:
            self.at_ms += 500
            self.arrived_ms += self.busy * 500
            self.arrived += live > 0
            work = replace(prefill, arrived_work_ms=round(self.arrived_ms))
            for one in self.autoscaler.decide(
                Observation(self.at_ms, live, self.arrived, work, decode)
            ):
                self.why[one.pool] = one.why
        return self.autoscaler.wanted(Role.PREFILL), self.autoscaler.wanted(Role.DECODE)

    def adopt(self, prefill: PrefillSignals = PREFILL, decode: DecodeSignals = DECODE) -> None:
        self.see(ADOPT_MS / 1000 + 0.5, prefill, decode)


def late(workers: int = 2, busy: int = 2, work_ms: int = 60_000) -> PrefillSignals:
    return replace(
        PREFILL, workers=workers, busy=busy, queued=9, oldest_wait_ms=1001, work_ms=work_ms
    )


# ── prefill ──────────────────────────────────────────────────────────────────────────────────────


def test_it_looks_on_before_it_says_anything() -> None:
    watched = Watched(plan())
    assert watched.see(4) == (None, None)
    watched.adopt()
    assert watched.see(1) == (2, 2)


def test_a_backlog_that_lasts_longer_than_a_start_brings_workers_after_the_delay() -> None:
    watched = Watched(plan())
    watched.busy = 1.0
    watched.adopt()
    assert watched.see(2, late())[0] == 2
    assert "for 1.5 of 2 s" in watched.why[Role.PREFILL]
    assert watched.see(1, late())[0] == 4, "60 s of work: at most twice as many at once"
    assert "oldest has waited 1001 ms" in watched.why[Role.PREFILL]
    assert watched.see(3, late())[0] == 4
    assert "2 workers are starting" in watched.why[Role.PREFILL]


def test_a_backlog_that_is_over_before_a_worker_could_start_brings_none() -> None:
    watched = Watched(plan())
    watched.busy = 1.0
    watched.adopt()
    assert watched.see(6, late(work_ms=4_000))[0] == 2
    assert "over in 4.0 s; a worker starts in 5.0 s" in watched.why[Role.PREFILL]


def test_backlogs_that_come_again_and_again_bring_one_though_each_is_soon_over() -> None:
    watched = Watched(plan())
    watched.busy = 1.0
    watched.adopt()
    assert watched.see(20, late(work_ms=4_000))[0] == 3


def test_prefill_does_not_grow_while_decode_is_what_binds() -> None:
    watched = Watched(plan())
    watched.adopt()
    full = replace(DECODE, blocks=200, is_full=True, parked=2)
    prefill, decode = watched.see(3, late(busy=0), full)
    assert (prefill, decode) == (2, 3)
    assert "but for decode: 2 prefill workers idle" in watched.why[Role.PREFILL]
    assert watched.see(3, late(busy=2), full)[0] == 4, "now both are short"


def test_what_arrives_per_second_makes_prefill_grow_before_anybody_is_late() -> None:
    watched = Watched(plan())
    watched.busy = 2.5
    watched.adopt()
    assert watched.see(3)[0] == 4, "2.5 workers' worth, at 80 % of each"
    assert "2.50 workers arrive" in watched.why[Role.PREFILL]


def test_a_predicted_first_token_beyond_the_objective_counts_as_late() -> None:
    behind = replace(late(work_ms=12_000), oldest_wait_ms=10)
    for ttft_ms, wanted in ((7_000.0, 2), (5_000.0, 4)):
        watched = Watched(plan(ttft_ms=ttft_ms))
        watched.busy = 1.5
        watched.adopt()
        assert watched.see(2.5, behind)[0] == wanted


def test_refusals_count_as_late() -> None:
    watched = Watched(plan())
    watched.adopt()
    for shed in range(1, 8):
        watched.see(0.5, replace(PREFILL, shed_count=shed, work_ms=90_000))
    assert watched.autoscaler.wanted(Role.PREFILL) == 4


def test_prefill_shrinks_only_when_the_smaller_pool_would_have_been_enough_all_along() -> None:
    watched = Watched(plan())
    watched.busy = 0.3
    watched.adopt()
    assert watched.see(8)[0] == 2
    assert watched.see(2, late(work_ms=100))[0] == 2, "late for a moment"
    assert watched.see(14)[0] == 2, "that was less than 15 s ago"
    assert watched.see(3)[0] == 1


# ── decode ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("decode", "wanted"),
    [
        (DECODE, 2),
        (replace(DECODE, blocks=170), 2),
        (replace(DECODE, blocks=171), 3),
        (replace(DECODE, sequences=109), 3),
        (replace(DECODE, blocks=350), 4),
        (replace(DECODE, parked=1), 3),
        (replace(DECODE, blocks=51), 1),
        (replace(DECODE, blocks=52), 2),
        (replace(DECODE, blocks=0, sequences=0), 1),
    ],
)
def test_decode_follows_blocks_places_and_the_parked(decode: DecodeSignals, wanted: int) -> None:
    watched = Watched(plan())
    watched.adopt()
    assert watched.see(18 if wanted < 2 else 3, decode=decode)[1] == wanted


@pytest.mark.parametrize(("tpot_ms", "wanted"), [(15.0, 2), (13.0, 3), (11.5, 4), (9.0, 2)])
def test_decode_grows_until_a_token_is_soon_enough_if_any_number_can_do_that(
    tpot_ms: float, wanted: int
) -> None:
    watched = Watched(plan(tpot_ms=tpot_ms))
    watched.adopt()
    assert watched.see(3)[1] == wanted


def test_headroom_of_tokens_keeps_workers_that_room_alone_would_not() -> None:
    little = replace(DECODE, blocks=20)
    for tpot_ms, wanted in ((None, 1), (18.5, 2), (30.0, 1)):
        watched = Watched(plan(tpot_ms=tpot_ms))
        watched.adopt()
        assert watched.see(20, decode=little)[1] == wanted


# ── both ─────────────────────────────────────────────────────────────────────────────────────────


def test_bounds_hold_whatever_is_asked_for() -> None:
    watched = Watched(plan(least=2, most=3))
    watched.adopt()
    assert watched.see(9, late(work_ms=10**7), replace(DECODE, blocks=10**6)) == (3, 3)
    assert "replicas_max is 3" in watched.why[Role.DECODE]
    calm = replace(DECODE, blocks=0, sequences=0, workers=3)
    assert watched.see(90, replace(PREFILL, workers=3), calm) == (2, 2)


def test_pools_sleep_together_and_wake_together() -> None:
    watched = Watched(plan(least=0))
    calm = replace(DECODE, blocks=0, sequences=0)
    watched.adopt()
    assert watched.see(58, decode=calm, live=0) == (1, 1)
    assert watched.see(20, decode=calm, live=0) == (0, 0)
    assert "nobody came" in watched.why[Role.DECODE]
    nobody = replace(PREFILL, workers=0)
    none = replace(calm, workers=0)
    assert watched.see(60, nobody, none, live=0) == (0, 0)
    assert watched.see(0.5, replace(nobody, queued=1), none, live=1) == (1, 1), "at once"
    assert watched.see(300, replace(PREFILL, workers=1), replace(calm, workers=1), live=0) == (0, 0)


def test_one_that_streams_keeps_prefill_awake() -> None:
    watched = Watched(plan(least=0))
    watched.adopt()
    assert watched.see(300, live=1)[0] == 1


def test_one_pool_for_both_jobs_takes_what_the_needier_job_needs() -> None:
    one = replace(plan(), bounds={Role.DECODE: Bounds(1, 8)})
    watched = Watched(one)
    watched.adopt()
    assert watched.see(3, late())[1] == 4
    watched = Watched(one)
    watched.adopt()
    assert watched.see(3, decode=replace(DECODE, blocks=300))[1] == 4
    watched = Watched(one)
    watched.busy = 1.0
    watched.adopt()
    assert watched.see(30, decode=replace(DECODE, blocks=0, sequences=0))[1] == 2


def test_a_start_is_measured() -> None:
    watched = Watched(plan())
    watched.adopt()
    watched.see(3, decode=replace(DECODE, blocks=250))
    watched.see(20, decode=replace(DECODE, blocks=250))
    watched.see(1, decode=replace(DECODE, blocks=250, workers=3))
    assert 10 < watched.autoscaler.start_s(Role.DECODE) < 14


# ── no oscillation ───────────────────────────────────────────────────────────────────────────────


SETTLE_S = 300.0
WATCH_S = 900.0


@settings(max_examples=30)
@given(
    rate=st.floats(0.05, 8),
    prefill_s=st.floats(0.02, 2),
    tokens=st.integers(1, 400),
    start_s=st.floats(0, 40),
    stream_ms=st.floats(0, 2),
    believed_s=st.floats(1, 60),
    begin=st.integers(1, 6),
    tpot_ms=st.sampled_from([None, 25.0]),
)
@example(
    rate=0.8,
    prefill_s=1.0,
    tokens=10,
    start_s=8,
    stream_ms=0.5,
    believed_s=10,
    begin=1,
    tpot_ms=None,
).via("the high mark itself")
@example(
    rate=3.0,
    prefill_s=0.05,
    tokens=300,
    start_s=8,
    stream_ms=2,
    believed_s=10,
    begin=4,
    tpot_ms=None,
).via("steps that get longer in a smaller pool")
def test_a_constant_load_moves_each_number_at_most_once_each_way_after_settling(
    rate: float,
    prefill_s: float,
    tokens: int,
    start_s: float,
    stream_ms: float,
    believed_s: float,
    begin: int,
    tpot_ms: float | None,
) -> None:
    changed = replace(SETTINGS, start_s=believed_s)
    bounds = {role: Bounds(1, 6) for role in Role}
    autoscaler = Autoscaler(Plan(settings=changed, bounds=bounds, tpot_ms=tpot_ms))
    workers = Workers(start_s=start_s, step_stream_s=stream_ms / 1000)
    pools = Pools(workers, autoscaler, begin=begin)
    pools.run(Load(rate=rate, prefill_s=prefill_s, tokens=tokens), SETTLE_S + WATCH_S)
    for role in Role:
        ups, downs = pools.turns(role, SETTLE_S)
        assert ups <= 1, f"{role}: {_moves(pools, role)}"
        assert downs <= 1, f"{role}: {_moves(pools, role)}"


def _moves(pools: Pools, role: Role) -> list[tuple[float, int]]:
    moves: list[tuple[float, int]] = []
    for at_s, count in pools.numbers[role]:
        if not moves or moves[-1][1] != count:
            moves.append((at_s, count))
    return moves


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [0.3, 0.75, 1.5])
def test_chance_arrivals_hardly_move_it(rate: float, seed: int) -> None:
    """An hour of Poisson arrivals: a few moves, where each burst might have been two."""
    autoscaler = Autoscaler(plan())
    pools = Pools(Workers(), autoscaler, seed=seed)
    pools.run(Load(rate=rate, prefill_s=1.0, tokens=200), 3600)
    for role in Role:
        ups, downs = pools.turns(role, SETTLE_S)
        assert ups + downs <= 4, f"seed {seed}: {role}: {_moves(pools, role)}"


def test_a_tenfold_load_is_followed_up_and_down_again() -> None:
    autoscaler = Autoscaler(plan())
    pools = Pools(Workers(), autoscaler)
    quiet = Load(rate=0.4, prefill_s=1.0, tokens=200)
    pools.run(quiet, 300)
    assert pools.count == {Role.PREFILL: 1, Role.DECODE: 1}
    pools.run(replace(quiet, rate=4.0), 300)
    assert pools.count[Role.PREFILL] >= 5
    pools.run(quiet, 600)
    assert pools.count == {Role.PREFILL: 1, Role.DECODE: 1}
