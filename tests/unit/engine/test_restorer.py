"""What the mover takes from a store with a disk, and what it leaves to be computed."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from pdserve.clock import monotonic
from pdserve.engine.moves import Restore
from pdserve.engine.restorer import TRIED_AGAIN_EVERY, Restorer
from pdserve.engine.restoring import PrefillSpeed
from pdserve.ids import BlockId, BlockKey
from pdserve.kvstore.path_speed import PathCost
from pdserve.model.pool import Direct
from tests.unit.engine.fakes import BLOCK_BYTES
from tests.unit.engine.test_mover import LOCAL, Parts, blocks

KEYS = tuple(BlockKey(bytes([i]) * 16) for i in range(6))
FAST_DISK = PathCost(fixed_s=1e-6, bytes_per_s=1e12)
SLOW_DISK = PathCost(fixed_s=1.0, bytes_per_s=1e6)
TARGETS = blocks(0, 1, 2, 3, 4, 5)


def stored(disk: PathCost | None, *, in_arena: int = 2) -> Parts:
    """Six blocks, of which the arena has the first."""
    parts = Parts()
    store = parts.stores[LOCAL]
    store.blocks = {key: bytes([i]) * BLOCK_BYTES for i, key in enumerate(KEYS)}
    store.below = disk
    store.below_keys = set(KEYS[in_arena:]) if disk else set()
    return parts


def restore(*, first: int = 0, token_s: float | None = 1e-3) -> Restore:
    speed = PrefillSpeed(token_s, 1e6) if token_s else None
    targets: tuple[BlockId, ...] = TARGETS[first:]
    return Restore(
        LOCAL, KEYS, first, targets, prompt_tokens=6 * 16 + 1, block_tokens=16, speed=speed
    )


def test_a_fast_disk_is_waited_for() -> None:
    parts = stored(FAST_DISK)
    assert parts.one(restore()).count == 6
    assert parts.mover.counters()["prefixes_fetched"] == 1
    parts.stores[LOCAL].check_idle()


def test_what_a_slow_disk_has_is_computed() -> None:
    parts = stored(SLOW_DISK)
    moved = parts.one(restore())
    assert (moved.count, moved.error) == (2, None)
    counters = parts.mover.counters()
    assert (counters["prefixes_recomputed"], counters["blocks_recomputed"]) == (1, 4)
    parts.stores[LOCAL].check_idle()


def test_what_the_device_has_is_not_counted_as_recomputed() -> None:
    parts = stored(SLOW_DISK)
    assert parts.one(restore(first=4)).count == 0
    assert parts.mover.counters()["blocks_recomputed"] == 2


def test_a_slow_worker_waits_even_for_a_slow_disk() -> None:
    assert stored(SLOW_DISK).one(restore(token_s=1.0)).count == 6


def test_before_the_first_step_everything_is_taken_unasked() -> None:
    parts = stored(SLOW_DISK)
    assert parts.one(restore(token_s=None)).count == 6
    assert "quote" not in parts.stores[LOCAL].calls


def test_a_store_without_a_disk_is_not_asked() -> None:
    parts = stored(None)
    assert parts.one(restore()).count == 6
    assert "quote" not in parts.stores[LOCAL].calls


def test_a_disk_that_was_slow_is_tried_again() -> None:
    parts = stored(SLOW_DISK)
    counts = [parts.one(restore()).count for _ in range(TRIED_AGAIN_EVERY)]
    assert counts == [2] * (TRIED_AGAIN_EVERY - 1) + [6]


# ── what another host has ────────────────────────────────────────────────────────────────────────


class FakeRemote:
    """Has the leading ``has`` blocks, and says that it has ``says``."""

    def __init__(self, has: int, says: int | None = None) -> None:
        self.has = has
        self.says = has if says is None else says
        self.counters: Mapping[str, int] = {"blocks_elsewhere": 0}
        self.asked: list[tuple[int, int]] = []

    def count(self, keys: Sequence[BlockKey]) -> int:
        return min(self.says, len(keys))

    def fetch(
        self,
        keys: Sequence[BlockKey],
        first: int,
        end: int,
        take: Callable[[int, memoryview], None],
        *,
        block_bytes: int,
        deadline_s: float,
    ) -> int:
        assert deadline_s > 0
        self.asked.append((first, end))
        for index in range(first, min(end, self.has)):
            take(index, memoryview(bytes([index]) * block_bytes))
        return max(0, min(end, self.has) - first)

    def close(self) -> None: ...


class WrittenPool(Direct):
    block_bytes = BLOCK_BYTES

    def __init__(self) -> None:
        self.written: dict[int, bytes] = {}

    def write_block(self, block: int, data: memoryview) -> None:
        self.written[block] = bytes(data)


def restored(remote: FakeRemote, move: Restore, *, near: int = 2) -> tuple[int, dict[int, bytes]]:
    """How many blocks, and what is in the pool then, by its block."""
    store = stored(None).stores[LOCAL]
    for key in KEYS[near:]:
        del store.blocks[key]
    pool = WrittenPool()
    restorer = Restorer(pool, Counter(), monotonic, remote)
    return restorer.restore(store, move), pool.written


def test_where_this_host_ends_another_one_goes_on() -> None:
    remote = FakeRemote(5)
    count, written = restored(remote, restore(token_s=None))
    assert (count, remote.asked) == (5, [(2, 5)])
    assert written == {index: bytes([index]) * BLOCK_BYTES for index in range(5)}
    count, written = restored(FakeRemote(6), restore(first=3, token_s=None), near=4)
    assert (count, sorted(written)) == (3, [3, 4, 5])


def test_who_has_no_more_is_not_asked() -> None:
    for near, says in ((6, 6), (3, 3), (3, 2)):
        remote = FakeRemote(says)
        assert restored(remote, restore(token_s=None), near=near)[0] == near
        assert remote.asked == []


def test_who_says_too_much_gives_what_there_is() -> None:
    assert restored(FakeRemote(3, says=6), restore(token_s=None))[0] == 3


def test_nobody_is_asked_where_not_even_everything_would_pay() -> None:
    class Untouchable(FakeRemote):
        def count(self, keys: Sequence[BlockKey]) -> int:
            raise AssertionError(f"asked for {len(keys)} blocks")

    assert restored(Untouchable(6), restore(token_s=1e-9))[0] == 2


def test_what_is_computed_sooner_is_not_fetched_but_now_and_then() -> None:
    remote = FakeRemote(6)
    store = stored(None).stores[LOCAL]
    store.blocks.clear()
    restorer = Restorer(WrittenPool(), Counter(), monotonic, remote)
    counts = [restorer.restore(store, restore(token_s=1e-9)) for _ in range(TRIED_AGAIN_EVERY)]
    assert counts == [0] * (TRIED_AGAIN_EVERY - 1) + [6]
    assert restorer.restore(store, restore(token_s=1.0)) == 6
