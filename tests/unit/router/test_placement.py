"""Which prefill worker, which decode worker; or rather wait. A token is a millisecond."""

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pdserve.clock import MS, S
from pdserve.ids import RequestId
from pdserve.messages import Role, Stop
from pdserve.router.entry import Entry
from pdserve.router.fleet import LEAD_NS, Fleet
from pdserve.router.placement import (
    DEFER_MAX_NS,
    KEPT_TOKENS_MAX,
    Choice,
    Deferred,
    blocks_of,
    choose_decode,
    choose_resume,
    lead_ns,
    own_costs,
    place,
    usable_tokens,
)
from pdserve.router.prefix_index import Hits
from pdserve.router.worker import Held, Worker
from pdserve.router_config import RouterConfig
from tests.unit.router.build import BLOCK_TOKENS, hello
from tests.unit.router.entries import COSTS, entry

CHUNK_TOKENS = 128


def _fleet(*names: str, mode: str = "disaggregated") -> Fleet:
    """Workers at slots 0, 1, … in the order of their names here."""
    fleet = Fleet(RouterConfig(mode=mode), COSTS)  # type: ignore[arg-type]
    for name in names:
        fleet.add(hello(name, chunk_tokens=CHUNK_TOKENS, running_max=4), 0)
    return fleet


def _set(
    fleet: Fleet,
    slot: int,
    *,
    busy_ms: int = 0,
    prompts: tuple[int, ...] = (),
    streams: int = 0,
    context_tokens: int = 0,
    free_blocks: int = 1000,
    draining: bool = False,
) -> Worker:
    """Bring a worker into a state: when it is done, uncomputed tokens it holds, what it decodes."""
    worker = fleet.at(slot)
    worker.free_at_ns = busy_ms * MS
    held = [Held(tokens, COSTS.prefill_ns(tokens), is_new=True) for tokens in prompts]
    worker.prompts = {RequestId(f"x{i}"): one for i, one in enumerate(held)}
    worker.streams = {RequestId(f"y{i}"): None for i in range(streams)}
    worker.context_tokens = context_tokens
    worker.free_blocks = free_blocks
    worker.draining = draining
    fleet.changed(worker)
    fleet.check()
    return worker


FULL = (CHUNK_TOKENS + 1,)


def _place(
    fleet: Fleet,
    one: Entry,
    cached_blocks: tuple[int, ...] = (),
    *,
    now_ns: int = 0,
    tpot_slo_ns: float | None = None,
    only: Worker | None = None,
) -> Choice | Deferred | None:
    return place(
        fleet,
        one,
        _hits(fleet, cached_blocks),
        block_tokens=BLOCK_TOKENS,
        tpot_slo_ns=tpot_slo_ns,
        now_ns=now_ns,
        only=only,
    )


def _hits(fleet: Fleet, cached_blocks: tuple[int, ...]) -> Hits:
    """Of leading blocks by slot; 0 where none are given."""
    bits: dict[int, int] = {}
    for worker in fleet.all():
        if worker.prefills:
            blocks = cached_blocks[worker.slot] if worker.slot < len(cached_blocks) else 0
            bits[blocks] = bits.get(blocks, 0) | 1 << worker.slot
    return tuple(sorted(bits.items()))


def _to(choice: Choice | Deferred | None) -> tuple[str, str]:
    assert isinstance(choice, Choice), choice
    return choice.prefill.id, choice.decode.id


# ── a prefill worker ─────────────────────────────────────────────────────────────────────────────


def test_without_workers_there_is_no_choice() -> None:
    assert _place(_fleet("p0"), entry("r", 100)) is None
    assert _place(_fleet("p0", mode="auto"), entry("r", 100)) is None


def test_a_cached_prefix_outweighs_a_short_wait() -> None:
    fleet = _fleet("p0", "p1", "d0")
    _set(fleet, 1, busy_ms=70)
    choice = _place(fleet, entry("r", 100), (0, 5))
    assert isinstance(choice, Choice)
    assert choice.prefill.id == "p1"  # 70 + 20 ms beat 100
    assert (choice.cached_tokens, choice.uncached_tokens) == (80, 20)
    assert (choice.work_ns, choice.price_ns) == (20 * MS, 90 * MS)


def test_a_long_wait_outweighs_a_cached_prefix() -> None:
    fleet = _fleet("p0", "p1", "d0")
    _set(fleet, 1, busy_ms=90)
    assert _to(_place(fleet, entry("r", 100), (0, 5))) == ("p0", "d0")


def test_ties_go_to_the_lower_slot() -> None:
    assert _to(_place(_fleet("p1", "p0", "d0"), entry("r", 100))) == ("p1", "d0")


def test_a_worker_measured_to_be_slow_is_dearer() -> None:
    fleet = _fleet("p0", "p1", "d0")
    fleet.at(0).correction.observe(10 * S, 15 * S)
    _set(fleet, 0)
    assert _to(_place(fleet, entry("r", 100))) == ("p1", "d0")


def test_the_last_token_is_always_computed_and_own_blocks_count_everywhere() -> None:
    one = entry("r", 160)
    assert usable_tokens(one, 10, BLOCK_TOKENS) == 159
    assert usable_tokens(one, 3, BLOCK_TOKENS) == 48
    one.computed_tokens = 140
    assert usable_tokens(one, 3, BLOCK_TOKENS) == 128


def test_who_was_bound_on_arrival_goes_there_whatever_it_costs() -> None:
    fleet = _fleet("p0", "p1", "d0")
    bound = _set(fleet, 1, busy_ms=10_000)
    choice = _place(fleet, entry("r", 100), only=bound)
    assert isinstance(choice, Choice)
    assert (choice.prefill.id, choice.reason) == ("p1", "bound on arrival")
    _set(fleet, 1, draining=True)
    assert _place(fleet, entry("r", 100), only=bound) is None


def test_one_that_drains_is_no_choice() -> None:
    fleet = _fleet("p0", "p1", "d0")
    _set(fleet, 0, draining=True)
    assert _to(_place(fleet, entry("r", 100))) == ("p1", "d0")
    _set(fleet, 1, draining=True)
    assert _place(fleet, entry("r", 100)) is None


# ── rather wait ──────────────────────────────────────────────────────────────────────────────────


def test_it_waits_for_a_full_worker_that_has_its_prefix_for_as_long_as_it_gains() -> None:
    fleet = _fleet("p0", "p1", "d0")
    _set(fleet, 1, busy_ms=30, prompts=FULL)
    one = entry("r", 100)
    # At p1 it would be done after 30 + 20 ms, at p0 after 100.
    assert _place(fleet, one, (0, 5), now_ns=0) == Deferred(50 * MS, 0b10)
    # It is late: from when it first was worth it, 80 ms are the most that can be gained.
    assert _place(fleet, one, (0, 5), now_ns=60 * MS) == Deferred(80 * MS, 0b10)
    assert _to(_place(fleet, one, (0, 5), now_ns=80 * MS)) == ("p0", "d0")


def test_it_never_waits_longer_than_a_second() -> None:
    fleet = _fleet("p0", "p1", "d0")
    _set(fleet, 1, busy_ms=100, prompts=FULL)
    one = entry("r", 5000)
    cached = (0, 300)
    assert _place(fleet, one, cached, now_ns=7) == Deferred(7 + DEFER_MAX_NS, 0b10)
    assert _place(fleet, one, cached, now_ns=6 + DEFER_MAX_NS) == Deferred(7 + DEFER_MAX_NS, 0b10)
    assert _to(_place(fleet, one, cached, now_ns=7 + DEFER_MAX_NS)) == ("p0", "d0")


def test_a_shorter_wait_alone_is_no_reason_to_wait() -> None:
    """p1 is believed to be done long before p0, but p0 has room, and that is a fact."""
    fleet = _fleet("p0", "p1", "d0")
    _set(fleet, 0, busy_ms=500)
    _set(fleet, 1, busy_ms=10, prompts=FULL)
    assert _to(_place(fleet, entry("r", 100))) == ("p0", "d0")
    assert _to(_place(fleet, entry("r", 100), (5, 0))) == ("p0", "d0")


def test_it_does_not_wait_where_nobody_has_room() -> None:
    fleet = _fleet("p0", "p1", "d0")
    for slot in (0, 1):
        _set(fleet, slot, busy_ms=10, prompts=FULL)
    assert _place(fleet, entry("r", 100), (0, 5)) is None


def test_one_of_several_is_open_shortly_before_it_is_done() -> None:
    """What waits in its line does not count: it would share the next chunk."""
    fleet = _fleet("p0", "p1", "d0")
    for slot in (0, 1):
        _set(fleet, slot, busy_ms=300, prompts=(100, 20))
    one = entry("r", 100)
    opens_ns = 280 * MS - LEAD_NS
    assert fleet.soonest_open_ns() == opens_ns
    assert _place(fleet, one, now_ns=opens_ns - 1) is None
    assert _to(_place(fleet, one, now_ns=opens_ns)) == ("p0", "d0")
    loading = entry("r", 100, cached_tokens=1000)
    lead = lead_ns(fleet, loading)
    assert lead > 0
    assert _place(fleet, loading, now_ns=opens_ns - lead - 1) is None
    assert _to(_place(fleet, loading, now_ns=opens_ns - lead)) == ("p0", "d0")


def test_one_alone_is_open_while_the_next_chunk_has_room() -> None:
    fleet = _fleet("p0", "p1", "d0")
    _set(fleet, 0, busy_ms=300, prompts=(100,))
    opens_ns = 300 * MS - LEAD_NS
    assert fleet.soonest_open_ns() == 0.0  # p1
    assert fleet.is_another_open_by(0.0, but=0)
    assert not fleet.is_another_open_by(opens_ns - 1, but=1)
    assert fleet.is_another_open_by(opens_ns, but=1)
    fleet.remove(fleet.at(1))
    assert fleet.soonest_open_ns() == 0.0
    _set(fleet, 0, busy_ms=300, prompts=FULL)
    assert fleet.soonest_open_ns() == math.inf


# ── a decode worker ──────────────────────────────────────────────────────────────────────────────


def test_blocks_are_counted_up() -> None:
    assert [blocks_of(tokens, 16) for tokens in (1, 16, 17)] == [1, 1, 2]


def _decode(fleet: Fleet, blocks: int, *, tpot_slo_ns: float | None = None) -> str | None:
    chosen = choose_decode(fleet, blocks, tpot_slo_ns=tpot_slo_ns)
    return None if chosen is None else chosen.id


def test_the_decode_worker_with_the_shortest_step_gets_it() -> None:
    fleet = _fleet("d0", "d1")
    assert _decode(fleet, 5) == "d0"
    _set(fleet, 0, streams=1)
    assert _decode(fleet, 5) == "d1"
    _set(fleet, 1, streams=1, context_tokens=50_000)
    assert _decode(fleet, 5) == "d0"


def test_decode_keeps_a_block_to_grow_for_everybody() -> None:
    """Two run there and one comes: 5 blocks now, 3 to grow."""
    fleet = _fleet("d0")
    _set(fleet, 0, streams=2, free_blocks=8)
    assert _decode(fleet, 5) == "d0"
    _set(fleet, 0, streams=2, free_blocks=7)
    assert _decode(fleet, 5) is None


def test_an_idle_decode_worker_takes_what_just_fits() -> None:
    fleet = _fleet("d0")
    _set(fleet, 0, free_blocks=5)
    assert _decode(fleet, 5) == "d0"
    assert _decode(fleet, 6) is None


def test_a_decode_worker_runs_so_many_sequences_and_no_more() -> None:
    fleet = _fleet("d0")
    _set(fleet, 0, streams=4)
    assert _decode(fleet, 1) is None


def test_a_decode_worker_that_drains_takes_nothing() -> None:
    fleet = _fleet("d0")
    _set(fleet, 0, draining=True)
    assert _decode(fleet, 1) is None


def test_nobody_is_bound_where_tokens_would_take_too_long_unless_it_is_alone() -> None:
    """A step is 10 ms and one for each stream."""
    fleet = _fleet("d0")
    _set(fleet, 0, streams=2)
    assert _decode(fleet, 1, tpot_slo_ns=13 * MS) == "d0"
    assert _decode(fleet, 1, tpot_slo_ns=12 * MS) is None
    _set(fleet, 0)
    assert _decode(fleet, 1, tpot_slo_ns=1 * MS) == "d0"


def test_a_parked_request_returns_to_where_it_was_parked_only_if_nobody_else_has_room() -> None:
    fleet = _fleet("d0", "d1")
    parker = fleet.at(0)
    _set(fleet, 1, streams=3, context_tokens=10_000)
    assert choose_resume(fleet, 5, parked_by=parker) is fleet.at(1)
    assert choose_resume(fleet, 5, parked_by=None) is parker
    _set(fleet, 1, free_blocks=0)
    assert choose_resume(fleet, 5, parked_by=parker) is parker
    _set(fleet, 0, free_blocks=0)
    assert choose_resume(fleet, 5, parked_by=parker) is None


# ── workers that do both ─────────────────────────────────────────────────────────────────────────


def _answer(one: Entry, max_tokens: int) -> Entry:
    one.request = replace(one.request, stop=Stop(max_tokens=max_tokens))
    return one


def test_aggregated_who_prefills_decodes() -> None:
    fleet = _fleet("d0", "d1", mode="aggregated")
    _set(fleet, 0, busy_ms=50)
    assert _to(_place(fleet, entry("r", 100))) == ("d1", "d1")
    _set(fleet, 1, streams=4)  # it runs no more sequences
    assert _to(_place(fleet, entry("r", 100))) == ("d0", "d0")


def test_aggregated_a_prompt_holds_up_the_streams_that_are_there() -> None:
    """Three streams would each lose 100 ms at d0; at d1 it only waits 250."""
    fleet = _fleet("d0", "d1", mode="aggregated")
    _set(fleet, 0, streams=3)
    _set(fleet, 1, busy_ms=250)
    assert _to(_place(fleet, entry("r", 100))) == ("d1", "d1")
    _set(fleet, 1, busy_ms=350)
    assert _to(_place(fleet, entry("r", 100))) == ("d0", "d0")


def test_auto_a_decode_worker_prefills_what_costs_it_less_than_the_hand_off() -> None:
    """A hand-off of 1,600 tokens takes 38 ms; 16 of them uncached are 16 ms for each stream."""
    fleet = _fleet("p0", "d0", mode="auto")
    _set(fleet, 1, streams=1)
    long = _answer(entry("r", 16, cached_tokens=1584), 100)
    assert _to(_place(fleet, long, (99, 99))) == ("d0", "d0")
    _set(fleet, 1, streams=3)
    assert _to(_place(fleet, long, (99, 99))) == ("p0", "d0")


def test_auto_a_prefill_worker_keeps_a_short_answer() -> None:
    fleet = _fleet("p0", "d0", mode="auto")
    _set(fleet, 1, streams=3)
    for max_tokens, decode in ((KEPT_TOKENS_MAX, "p0"), (KEPT_TOKENS_MAX + 1, "d0")):
        one = _answer(entry("r", 100), max_tokens)
        assert _to(_place(fleet, one)) == ("p0", decode)


def test_auto_it_keeps_none_whose_steps_would_hold_up_who_waits_there() -> None:
    fleet = _fleet("p0", "d0", mode="auto")
    _set(fleet, 0, prompts=(20,))
    _set(fleet, 1, streams=2)
    assert _to(_place(fleet, _answer(entry("r", 100), 16))) == ("p0", "d0")


def test_auto_it_keeps_none_that_it_has_no_blocks_for() -> None:
    fleet = _fleet("p0", "d0", mode="auto")
    _set(fleet, 0, free_blocks=7)
    _set(fleet, 1, streams=2)
    assert _to(_place(fleet, _answer(entry("r", 100), 1))) == ("p0", "p0")
    _set(fleet, 0, free_blocks=6)
    assert _to(_place(fleet, _answer(entry("r", 100), 1))) == ("p0", "d0")


def test_auto_a_prefill_worker_is_no_decode_worker_however_idle() -> None:
    fleet = _fleet("p0", "p1", "d0", mode="auto")
    _set(fleet, 2, streams=3)
    assert _to(_place(fleet, _answer(entry("r", 100), 1000))) == ("p0", "d0")
    assert _decode(fleet, 1) == "d0"
    assert choose_resume(fleet, 1, parked_by=fleet.at(2)) is fleet.at(2)


def test_auto_without_decode_room_a_prefill_worker_is_no_choice() -> None:
    fleet = _fleet("p0", "d0", mode="auto")
    for slot in (0, 1):
        _set(fleet, slot, free_blocks=3)
    assert _place(fleet, entry("r", 100)) is None


# ── a model ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Figures:
    """One worker as drawn."""

    role: Role
    busy_ms: int
    prompts: tuple[int, ...]
    streams: int
    free_blocks: int
    draining: bool
    cached_blocks: int
    slow: bool


FIGURES = st.builds(
    _Figures,
    role=st.sampled_from(Role),
    busy_ms=st.integers(0, 400),
    prompts=st.sampled_from(((), (20,), (60, 60), FULL)),
    streams=st.integers(0, 4),
    free_blocks=st.sampled_from((3, 20, 1000)),
    draining=st.booleans(),
    cached_blocks=st.integers(0, 12),
    slow=st.booleans(),
)


def _priced(fleet: Fleet, one: Entry, cached: tuple[int, ...], now_ns: int) -> dict[int, float]:
    """By the definition: slot to the instant at which it is done, where it may go at all."""
    total, least_blocks = one.total_tokens, blocks_of(one.total_tokens + 1, BLOCK_TOKENS)
    shares, prices = fleet.shares, dict[int, float]()
    room = {w.slot: w.room_blocks >= least_blocks for w in fleet.of(Role.DECODE)}
    for worker in fleet.all():
        hands_off = worker.hello.role is Role.PREFILL
        goes_on = any(room.values()) if hands_off or not shares else room[worker.slot]
        if not worker.prefills or worker.draining or not goes_on:
            continue
        hit = min(cached[worker.slot] * BLOCK_TOKENS, total - 1)
        work_ns = COSTS.prefill_ns(total - hit, hit)
        cost_ns = work_ns * worker.correction.factor
        if shares:
            cost_ns += work_ns * (len(worker.streams) if worker.decodes else 0)
            cost_ns += COSTS.handoff.time_ns(COSTS.kv_token_bytes * total) * hands_off
        prices[worker.slot] = max(worker.free_at_ns, now_ns) + cost_ns
    return prices


@given(
    figures=st.lists(FIGURES, min_size=1, max_size=7),
    mode=st.sampled_from(("disaggregated", "aggregated", "auto")),
    tokens=st.integers(1, 300),
    now_ms=st.integers(0, 300),
)
def test_it_goes_to_the_cheapest_worker_with_room_or_waits_for_a_cheaper_one(
    figures: list[_Figures], mode: str, tokens: int, now_ms: int
) -> None:
    if mode == "aggregated":
        figures = [replace(one, role=Role.DECODE) for one in figures]
    fleet = _fleet(*(f"{one.role[0]}{slot}" for slot, one in enumerate(figures)), mode=mode)
    for slot, one in enumerate(figures):
        if one.slow:
            fleet.at(slot).correction.observe(1 * S, 2 * S)
        worker = fleet.at(slot)
        _set(
            fleet,
            slot,
            busy_ms=one.busy_ms,
            prompts=one.prompts if worker.prefills else (),
            streams=one.streams if worker.decodes else 0,
            free_blocks=one.free_blocks,
            draining=one.draining,
        )
    assume(any(worker.prefills for worker in fleet.all()))
    cached = tuple(one.cached_blocks for one in figures)
    now_ns = now_ms * MS
    asked = entry("r", tokens)
    priced = _priced(fleet, asked, cached, now_ns)
    opens_ns = now_ns + lead_ns(fleet, asked)
    opened = [slot for slot in priced if fleet.open_ns[slot] <= opens_ns]
    choice = _place(fleet, asked, cached, now_ns=now_ns)
    if not opened:
        assert choice is None
        return
    cheapest_ns = min(priced[slot] for slot in opened)
    if isinstance(choice, Deferred):
        gain_ns = cheapest_ns - min(priced.values())
        assert gain_ns > 0.99 * MS
        assert choice.until_ns == pytest.approx(now_ns + min(gain_ns, DEFER_MAX_NS), abs=2)
        asked.deferred_ns = now_ns - DEFER_MAX_NS  # it has waited enough
        choice = _place(fleet, asked, cached, now_ns=now_ns)
    assert isinstance(choice, Choice)
    assert choice.prefill.slot in opened
    assert priced[choice.prefill.slot] == pytest.approx(cheapest_ns, abs=2)
    assert choice.price_ns == pytest.approx(cheapest_ns - now_ns, abs=2)
    if mode == "aggregated" or (mode == "auto" and choice.prefill.hello.role is Role.DECODE):
        assert choice.decode is choice.prefill
    if choice.decode is not choice.prefill:
        least_blocks = blocks_of(tokens + 1, BLOCK_TOKENS)
        assert choice.decode.room_blocks >= least_blocks
        assert fleet.step_ns[choice.decode.slot] == min(
            fleet.step_ns[worker.slot]
            for worker in fleet.of(Role.DECODE)
            if worker.room_blocks >= least_blocks
        )


def test_own_costs_leave_out_how_busy_a_worker_is() -> None:
    fleet = _fleet("p0", "p1", "d0")
    _set(fleet, 0, busy_ms=10_000)
    costs_ns = own_costs(fleet, entry("r", 100), _hits(fleet, (5, 0)), BLOCK_TOKENS)
    assert (costs_ns[0], costs_ns[1]) == (20 * MS, 100 * MS)
