from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import S
from pdserve.config import AutoscalingConfig
from pdserve.messages import Role
from pdserve.router.scaling import (
    DecodeLoad,
    PrefillLoad,
    wanted_decode,
    wanted_prefill,
    wanted_replicas,
)
from tests.unit.router.build import core_with, hello, request, settings

SETTINGS = AutoscalingConfig(queue_age_ms=1000, kv_pressure_ratio=0.85)
CALM = DecodeLoad(used_blocks=60, worker_blocks=100, sequences=4, worker_sequences=64, parked=0)


@pytest.mark.parametrize(
    ("load", "current", "wanted"),
    [
        (PrefillLoad(oldest_wait_ms=1001, queued=3, busy_workers=2), 2, 3),
        (PrefillLoad(oldest_wait_ms=1000, queued=3, busy_workers=2), 2, 2),
        (PrefillLoad(oldest_wait_ms=0, queued=1, busy_workers=0), 0, 1),
        (PrefillLoad(oldest_wait_ms=0, queued=0, busy_workers=0), 1, 0),
        (PrefillLoad(oldest_wait_ms=0, queued=0, busy_workers=0), 0, 0),
        (PrefillLoad(oldest_wait_ms=0, queued=0, busy_workers=1), 3, 2),
        (PrefillLoad(oldest_wait_ms=0, queued=0, busy_workers=2), 3, 3),
    ],
)
def test_prefill_grows_with_the_age_of_its_queue_and_shrinks_when_idle(
    load: PrefillLoad, current: int, wanted: int
) -> None:
    assert wanted_prefill(load, SETTINGS, current=current) == wanted


@pytest.mark.parametrize(
    ("load", "current", "wanted"),
    [
        (CALM, 1, 1),
        (replace(CALM, used_blocks=86), 1, 2),
        (replace(CALM, sequences=60), 1, 2),
        (replace(CALM, parked=1), 1, 2),
        (replace(CALM, used_blocks=51), 2, 1),
        (replace(CALM, used_blocks=52), 2, 2),
        (replace(CALM, used_blocks=0, sequences=0), 1, 0),
        (replace(CALM, used_blocks=0, sequences=0), 0, 0),
    ],
)
def test_decode_grows_under_pressure_and_shrinks_when_one_fewer_would_do(
    load: DecodeLoad, current: int, wanted: int
) -> None:
    assert wanted_decode(load, SETTINGS, current=current) == wanted


def _turns(numbers: list[int]) -> int:
    """How often a series changes its direction."""
    moves = [b - a for a, b in pairwise(numbers) if a != b]
    return sum(a * b < 0 for a, b in pairwise(moves))


@given(st.integers(0, 2000), st.integers(0, 400), st.integers(1, 12))
def test_a_constant_decode_load_never_moves_the_number_to_and_fro(
    blocks: int, sequences: int, current: int
) -> None:
    """Whatever the pool cannot hold is parked; the rest is spread over it."""
    numbers = [current]
    for _ in range(30):
        held = min(blocks, numbers[-1] * 100)
        load = DecodeLoad(held, 100, sequences, 64, parked=int(blocks > held))
        numbers.append(wanted_decode(load, SETTINGS, current=numbers[-1]))
    assert _turns(numbers) == 0


@given(st.floats(0, 12), st.integers(1, 12))
def test_a_constant_prefill_load_never_moves_the_number_to_and_fro(
    load_workers: float, current: int
) -> None:
    """Load in workers' worth: what exceeds the pool waits ever longer, else nothing waits."""
    numbers = [current]
    for _ in range(30):
        over = load_workers > numbers[-1]
        busy = min(numbers[-1], -int(-load_workers // 1))
        load = PrefillLoad(2000 if over else 0, int(over), busy)
        numbers.append(wanted_prefill(load, SETTINGS, current=numbers[-1]))
    assert _turns(numbers) == 0


def test_figures_come_from_the_routers_snapshot() -> None:
    core, _ = core_with(hello("p0"), hello("p1"), hello("d0", block_count=100))
    for index in range(6):
        core.on_submit(request(f"r{index}", 600), 0)
    snapshot = core.snapshot(2_000_000_000)
    assert wanted_replicas(Role.PREFILL, snapshot, SETTINGS, current=2) == 3
    # Two are on their way to it, 38 blocks each.
    assert wanted_replicas(Role.DECODE, snapshot, SETTINGS, current=1) == 1
    pressed = replace(SETTINGS, kv_pressure_ratio=0.75)
    assert wanted_replicas(Role.DECODE, snapshot, pressed, current=1) == 2


def test_a_pool_that_does_both_grows_for_either_and_shrinks_when_neither_needs_it() -> None:
    config = replace(settings(), mode="aggregated")
    core, (d0, _) = core_with(hello("d0"), hello("d1"), config=config)

    def wanted(now_ns: int) -> int:
        snapshot = core.snapshot(now_ns)
        return wanted_replicas(Role.DECODE, snapshot, SETTINGS, current=2, aggregated=True)

    assert wanted(0) == 1
    asked = [request(f"r{index}", 600) for index in range(3)]
    for one in asked:
        core.on_submit(one, 0)
    assert wanted(1 * S) == 2
    assert wanted(2 * S) == 3, "one waits for a prefill, though blocks are free"
    for one in asked:
        core.on_cancel(one.request, 2 * S)
    d0.report(free_blocks=0)
    assert wanted(2 * S) == 2, "blocks are used, though nobody waits"
    d0.report(free_blocks=1000)
    assert wanted(2 * S) == 1


def test_a_pool_without_workers_is_wanted_when_somebody_waits() -> None:
    core, _ = core_with()
    assert wanted_replicas(Role.DECODE, core.snapshot(0), SETTINGS, current=0) == 0
    assert wanted_replicas(Role.PREFILL, core.snapshot(0), SETTINGS, current=0) == 0
    core.on_submit(request("r", 8), 0)
    assert wanted_replicas(Role.PREFILL, core.snapshot(0), SETTINGS, current=0) == 1
