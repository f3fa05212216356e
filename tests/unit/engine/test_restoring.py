"""Restore or recompute: the least total, and no surprise when one side becomes cheaper."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from pdserve.engine.restoring import PrefillMeter, PrefillSpeed, Tier, blocks_to_restore
from pdserve.kvstore.path_speed import PathCost

BLOCK_TOKENS = 16
BLOCK_BYTES = 1 << 20

costs = st.builds(PathCost, st.floats(0, 0.5), st.floats(1e6, 1e11))
speeds = st.builds(PrefillSpeed, st.floats(1e-6, 1e-1), st.floats(1, 1e6))


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, tuple[Tier, Tier], int]:
    """Blocks that are here, tiers behind each other, tokens."""
    first = draw(st.integers(0, 20))
    arena = first + draw(st.integers(0, 20))
    disk = arena + draw(st.integers(0, 20))
    tokens = disk * BLOCK_TOKENS + draw(st.integers(1, 300))
    return first, (Tier(arena, draw(costs)), Tier(disk, draw(costs))), tokens


def choose(first: int, tiers: tuple[Tier, Tier], tokens: int, speed: PrefillSpeed) -> int:
    return blocks_to_restore(
        first,
        tiers,
        block_tokens=BLOCK_TOKENS,
        block_bytes=BLOCK_BYTES,
        prompt_tokens=tokens,
        speed=speed,
    )


def total_s(
    blocks: int, first: int, tiers: tuple[Tier, Tier], tokens: int, speed: PrefillSpeed
) -> float:
    arena, disk = tiers
    from_arena = min(blocks, arena.end) - first
    from_disk = max(0, blocks - arena.end)
    fetch_s = arena.cost.time_s(from_arena * BLOCK_BYTES) + disk.cost.time_s(
        from_disk * BLOCK_BYTES
    )
    return fetch_s + speed.time_s(blocks * BLOCK_TOKENS, tokens)


@given(prompts(), speeds)
def test_no_number_of_blocks_is_better(
    prompt: tuple[int, tuple[Tier, Tier], int], speed: PrefillSpeed
) -> None:
    first, tiers, tokens = prompt
    chosen = choose(first, tiers, tokens, speed)
    assert first <= chosen <= tiers[1].end
    best_s = min(total_s(k, first, tiers, tokens, speed) for k in range(first, tiers[1].end + 1))
    assert total_s(chosen, first, tiers, tokens, speed) <= best_s * (1 + 1e-9)


@given(prompts(), speeds, st.floats(1, 100))
def test_what_becomes_dearer_is_used_no_more_than_before(
    prompt: tuple[int, tuple[Tier, Tier], int], speed: PrefillSpeed, times: float
) -> None:
    first, (arena, disk), tokens = prompt
    before = choose(first, (arena, disk), tokens, speed)
    slower_disk = Tier(disk.end, PathCost(disk.cost.fixed_s, disk.cost.bytes_per_s / times))
    later_disk = Tier(disk.end, PathCost(disk.cost.fixed_s * times, disk.cost.bytes_per_s))
    slower_worker = PrefillSpeed(speed.token_s * times, speed.context_tokens)
    assert choose(first, (arena, slower_disk), tokens, speed) <= before
    assert choose(first, (arena, later_disk), tokens, speed) <= before
    assert choose(first, (arena, disk), tokens, slower_worker) >= before


def test_a_disk_is_worth_it_for_a_slow_worker_alone() -> None:
    """16 blocks, 16 MiB at 16 MiB/s: a second. 256 tokens: 2.56 s at 10 ms, 0.256 s at 1 ms."""
    arena = Tier(4, PathCost(0.0, 1e12))
    disk = Tier(20, PathCost(0.0, 16 * BLOCK_BYTES))
    tokens = 20 * BLOCK_TOKENS + 1
    assert choose(0, (arena, disk), tokens, PrefillSpeed(1e-2, 1e9)) == 20
    assert choose(0, (arena, disk), tokens, PrefillSpeed(1e-3, 1e9)) == 4
    # Attention makes the same tokens dearer behind a long prefix.
    assert choose(0, (arena, disk), tokens, PrefillSpeed(1e-3, 32)) == 20


def test_nothing_at_all_from_a_store_that_takes_longer_than_computing() -> None:
    far = Tier(8, PathCost(1.0, 1e6))
    assert choose(2, (far, far), 300, PrefillSpeed(1e-5, 1e6)) == 2


def test_of_equals_the_longest() -> None:
    """A block takes a second either way; without a context that makes tokens dearer."""
    even = Tier(8, PathCost(0.0, BLOCK_BYTES))
    speed = PrefillSpeed(1 / BLOCK_TOKENS, 2.0**60)
    assert choose(0, (even, even), 8 * BLOCK_TOKENS, speed) == 8


@given(st.floats(1e-6, 1e-2), st.floats(10, 1e5))
def test_the_meter_finds_the_speed_whatever_the_chunks(token_s: float, context: float) -> None:
    meter = PrefillMeter(context)
    assert meter.speed is None
    for start, count in product((0, 512, 4096), (64, 256)):
        elapsed_s = PrefillSpeed(token_s, context).time_s(start, start + count)
        meter.observe([(start, start + count)], round(elapsed_s * 1e6))
    assert meter.speed is not None
    assert abs(meter.speed.token_s / token_s - 1) < 0.02  # of whole microseconds


def test_one_odd_step_does_not_turn_the_meter() -> None:
    meter = PrefillMeter(1e6)
    for _ in range(5):
        meter.observe([(0, 100)], 100_000)
    meter.observe([(0, 100)], 100_000_000)
    assert meter.speed is not None
    assert meter.speed.token_s < 2e-3
