from dataclasses import replace

from pdserve.clock import MS
from pdserve.ids import WorkerId
from pdserve.router.placement import (
    DecodeOption,
    PrefillOption,
    blocks_of,
    choose_decode,
    choose_prefill,
    choose_resume,
)


def _prefill(
    name: str, *, wait_ms: int = 0, work_ms: int = 100, cached: int = 0, room: bool = True
) -> PrefillOption:
    idle = wait_ms == 0
    return PrefillOption(WorkerId(name), wait_ms * MS, work_ms * MS, cached, idle, room)


def _decode(name: str, *, free: int = 50, used: int = 50, bound: int = 1) -> DecodeOption:
    return DecodeOption(WorkerId(name), free, used, bound, running_max=4)


def test_without_workers_there_is_no_choice() -> None:
    assert choose_prefill([]) is None
    assert choose_decode([], least_blocks=1) is None
    assert choose_resume([], least_blocks=1, parked_by=WorkerId("d0")) is None


def test_a_cached_prefix_outweighs_a_short_wait() -> None:
    busy = _prefill("p1", wait_ms=40, work_ms=10, cached=90)
    assert choose_prefill([_prefill("p0"), busy]) == busy


def test_a_long_wait_outweighs_a_cached_prefix() -> None:
    free = _prefill("p0")
    assert choose_prefill([free, _prefill("p1", wait_ms=95, work_ms=10, cached=90)]) == free


def test_ties_go_to_the_longer_prefix_and_then_to_the_lower_id() -> None:
    cached = _prefill("p2", cached=16)
    assert choose_prefill([_prefill("p1"), cached, _prefill("p0")]) == cached
    assert choose_prefill([_prefill("p1"), _prefill("p0")]) == _prefill("p0")


def test_it_waits_for_a_full_worker_that_would_be_done_sooner() -> None:
    full = _prefill("p0", wait_ms=20, work_ms=10, room=False)
    assert choose_prefill([full, _prefill("p1", wait_ms=50)]) is None


def test_but_not_while_another_worker_is_idle() -> None:
    full = _prefill("p0", wait_ms=20, work_ms=10, room=False)
    idle = _prefill("p1")
    assert choose_prefill([full, _prefill("p2", wait_ms=50), idle]) == idle


def test_blocks_are_counted_up() -> None:
    assert [blocks_of(tokens, 16) for tokens in (1, 16, 17)] == [1, 1, 2]


def test_the_least_loaded_decode_worker_gets_it() -> None:
    light = _decode("d1", used=10)
    assert choose_decode([_decode("d0"), light], least_blocks=5) == light
    assert choose_decode([_decode("d1"), _decode("d0")], least_blocks=5) == _decode("d0")


def test_decode_keeps_a_block_to_grow_for_everybody() -> None:
    """Two run there and one comes: 5 blocks now, 3 to grow."""
    option = _decode("d0", bound=2, free=8)
    assert choose_decode([option], least_blocks=5) == option
    assert choose_decode([replace(option, free_blocks=7)], least_blocks=5) is None


def test_an_idle_decode_worker_takes_what_just_fits() -> None:
    option = _decode("d0", bound=0, free=5)
    assert choose_decode([option], least_blocks=5) == option
    assert choose_decode([option], least_blocks=6) is None


def test_a_decode_worker_runs_so_many_sequences_and_no_more() -> None:
    assert choose_decode([_decode("d0", bound=4)], least_blocks=1) is None


def test_a_parked_request_returns_to_where_it_was_parked_only_if_nobody_else_has_room() -> None:
    parker, other = _decode("d0", used=0), _decode("d1", used=90)
    by = parker.worker
    assert choose_resume([parker, other], least_blocks=5, parked_by=by) == other
    full = replace(other, free_blocks=0)
    assert choose_resume([parker, full], least_blocks=5, parked_by=by) == parker
