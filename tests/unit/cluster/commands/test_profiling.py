"""What is measured: grids within bounds, steps that a runner accepts, a budget that is kept, and
points that become a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import S
from pdserve.cluster.commands import profiling
from pdserve.cluster.commands.profile import doubtful, fitted
from pdserve.cluster.commands.profiling import (
    HELD_OUT_DECODE,
    HELD_OUT_PREFILL,
    MOVED_BLOCKS,
    Bench,
    Measured,
    Room,
    Taken,
    decode_grid,
    prefill_grid,
    within_budget,
)
from pdserve.errors import ConfigError
from pdserve.model.runner import ModelRunner, Run
from pdserve.router.costs import DecodeCost, MoveCost, PrefillCost, StepCost
from pdserve.router.fitting import MovePoint, PrefillPoint, StepPoint

LAPTOP = Room(context_tokens=8192, pool_tokens=34_944, block_tokens=16, running_max=64)
VOCAB = 40


@dataclass
class FakePool:
    block_count: int = 32
    block_tokens: int = 16
    block_bytes: int = 64

    def __post_init__(self) -> None:
        self.copied: list[tuple[int, int]] = []

    def copy_block(self, source: int, target: int) -> None:
        self.copied.append((source, target))


class FakeRunner:
    """Takes what ``ModelRunner`` takes, and refuses what it refuses."""

    def __init__(self) -> None:
        self.architecture = SimpleNamespace(context_tokens=256, vocab_size=VOCAB)
        self.pool = FakePool()
        self.steps: list[list[Run]] = []

    def step(self, runs: Sequence[Run]) -> torch.Tensor:
        ModelRunner._check(cast(ModelRunner, self), runs)
        written = [
            block
            for run in runs
            for block in run.blocks[run.start // 16 : -(-(run.start + len(run.tokens)) // 16)]
        ]
        assert len(set(written)) == len(written), "two runs write one block"
        self.steps.append(list(runs))
        return torch.zeros((sum(run.wants_logits for run in runs), VOCAB))


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def bench(runner: FakeRunner, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(profiling, "RUNS_S", 0.0)
    return Bench(cast(Any, runner), chunk_tokens=64, running_max=4)


# ── what to measure ──────────────────────────────────────────────────────────────────────────────


def test_a_profile_has_at_most_sixty_points() -> None:
    moves = 3 * len(MOVED_BLOCKS)  # park, restore, hand-off
    held_out = len(HELD_OUT_PREFILL) + len(HELD_OUT_DECODE)
    assert len(prefill_grid(LAPTOP)) + len(decode_grid(LAPTOP)) + moves + held_out <= 60


@given(
    st.integers(2, 10_000), st.integers(2, 3000), st.sampled_from([1, 16, 64]), st.integers(1, 99)
)
def test_grids_keep_within_what_there_is(
    context_tokens: int, blocks: int, block_tokens: int, running_max: int
) -> None:
    room = Room(context_tokens, blocks * block_tokens, block_tokens, running_max)
    for uncached, cached in prefill_grid(room):
        assert uncached + cached <= min(context_tokens, room.pool_tokens)
    for sequences, context in decode_grid(room):
        assert sequences <= running_max
        assert context <= context_tokens
        assert sequences * -(-context // block_tokens) <= blocks


def test_cheap_points_come_first() -> None:
    assert prefill_grid(LAPTOP)[0] == (16, 0)
    assert decode_grid(LAPTOP)[0] == (1, 64)
    work = [PREFILL.time_ns(u) for u, _ in prefill_grid(LAPTOP)]
    assert all(before <= after for before, after in pairwise(work))
    contexts = [sequences * context for sequences, context in decode_grid(LAPTOP)]
    assert all(before <= after for before, after in pairwise(contexts))


# ── within which time ────────────────────────────────────────────────────────────────────────────


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def spend(self, seconds: float) -> float:
        self.now_s += seconds
        return seconds


def test_what_would_not_fit_is_left_out_and_counted() -> None:
    clock = Clock()
    taken = within_budget([1.0, 2.0, 3.0, 4.0, 5.0], clock.spend, budget_s=10.0, now_s=clock)
    # After 1 + 2 + 3 s four are left, and the next one may take twice the last one's three.
    assert (taken.points, taken.left_out) == ([1.0, 2.0, 3.0], 2)
    assert clock.now_s <= 10.0


def test_a_budget_that_suffices_leaves_nothing_out() -> None:
    clock = Clock()
    taken = within_budget([1.0, 1.0], clock.spend, budget_s=10.0, now_s=clock)
    assert (taken.points, taken.left_out) == ([1.0, 1.0], 0)


def test_nothing_to_measure_is_nothing() -> None:
    taken: Taken[float] = within_budget([], Clock().spend, budget_s=1.0, now_s=Clock())
    assert (taken.points, taken.left_out) == ([], 0)


# ── steps ────────────────────────────────────────────────────────────────────────────────────────


def test_the_pool_is_filled_with_copies_of_one_chunk(bench: Bench, runner: FakeRunner) -> None:
    bench.fill()
    assert [target for _, target in runner.pool.copied] == list(range(4, 32))
    assert {source for source, _ in runner.pool.copied} == {0, 1, 2, 3}


def test_a_prefill_runs_in_chunks_behind_what_is_cached(bench: Bench, runner: FakeRunner) -> None:
    point = bench.prefill((100, 48))
    assert (point.uncached_tokens, point.cached_tokens) == (100, 48)
    assert point.seconds > 0
    assert len(runner.steps) == 2 * profiling.RUNS_MIN
    (first,), (second,) = runner.steps[:2]
    assert (first.start, len(first.tokens), first.wants_logits) == (48, 64, False)
    assert (second.start, len(second.tokens), second.wants_logits) == (112, 36, True)


def test_a_decode_step_attends_to_as_many_tokens_as_it_says(
    bench: Bench, runner: FakeRunner
) -> None:
    point = bench.step((4, 50))
    assert (point.sequences, point.context_tokens) == (4, 200)
    runs = runner.steps[0]
    assert [(run.start, len(run.tokens)) for run in runs] == [(49, 1)] * 4
    blocks = [block for run in runs for block in run.blocks]
    assert len(set(blocks)) == len(blocks) == 16, "sequences share no block"


def test_every_point_of_the_grids_is_a_step_that_the_runner_takes(
    bench: Bench, runner: FakeRunner
) -> None:
    for pair in prefill_grid(bench.room):
        bench.prefill(pair)
    for pair in decode_grid(bench.room):
        bench.step(pair)
    assert {len(runs) for runs in runner.steps} == {1, 2, 4}


# ── from points to a model ───────────────────────────────────────────────────────────────────────

STEP = StepCost(fixed_s=0.01, context_s=2e-7, sequence_s=0.001)
PREFILL = PrefillCost(fixed_s=0.01, token_s=5e-4, pair_s=5e-8)
DECODE = DecodeCost(small=STEP, large=STEP)
MOVE = MoveCost(fixed_s=1e-4, bytes_per_s=4e9)


def measured(**changed: Any) -> Measured:
    moves = [MovePoint(n, MOVE.time_ns(n) / S) for n in (10**5, 10**6, 10**7, 10**8)]
    parts: dict[str, Any] = {
        "prefill": Taken([_prefill(u, h) for u, h in prefill_grid(LAPTOP)], 2),
        "decode": Taken([_step(b, c) for b, c in decode_grid(LAPTOP)]),
        "host": Taken(moves),
        "handoff": Taken(moves),
        "held_out_prefill": Taken([_prefill(u, h, 1.1) for u, h in HELD_OUT_PREFILL]),
        "held_out_decode": Taken([]),
    }
    return Measured(**(parts | changed))


def _prefill(uncached: int, cached: int, factor: float = 1.0) -> PrefillPoint:
    return PrefillPoint(uncached, cached, PREFILL.time_ns(uncached, cached) / S * factor)


def _step(sequences: int, context: int) -> StepPoint:
    return StepPoint(
        sequences, sequences * context, DECODE.step_ns(sequences, sequences * context) / S
    )


def test_a_profile_says_what_was_measured_and_how_well_it_fits() -> None:
    costs, about = fitted("smol", measured(), 23_040)
    assert (costs.name, costs.origin, costs.kv_token_bytes) == ("smol", "measured", 23_040)
    assert costs.prefill.token_s == pytest.approx(5e-4, rel=1e-3)
    assert costs.host.bytes_per_s == pytest.approx(4e9, rel=1e-3)
    errors = about["errors_percent"]["prefill"]
    assert (errors["points"], errors["points_without_time"]) == (18, 2)
    assert errors["mean"] < 0.1
    assert errors["held_out_mean"] == pytest.approx(100 * (1 - 1 / 1.1), abs=0.1)
    assert "held_out_mean" not in about["errors_percent"]["decode"]


def test_a_model_that_misses_what_it_has_not_seen_is_doubtful() -> None:
    assert doubtful(fitted("smol", measured(), 23_040)[1]) == []
    missed = Taken([_prefill(u, h, 1.5) for u, h in HELD_OUT_PREFILL])
    assert doubtful(fitted("smol", measured(held_out_prefill=missed), 23_040)[1]) == ["prefill"]


def test_too_little_measured_is_said_and_not_guessed() -> None:
    with pytest.raises(ConfigError, match="prefill: 2 points were measured, at least 4"):
        fitted("smol", measured(prefill=Taken([_prefill(16, 0), _prefill(64, 0)], 16)), 23_040)
