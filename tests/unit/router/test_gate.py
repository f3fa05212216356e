import pytest

from pdserve.clock import MS, S
from pdserve.router.costs import CostModel, DecodeCost, MoveCost, PrefillCost, StepCost
from pdserve.router.decode_base import DecodeRoom, Stream, Swap
from pdserve.router.decode_shadow import FCFS, Plan
from pdserve.router.gate import CREDIT_MAX_NS, JOBS_MIN, STUDY_EVERY_NS, GatedOrder
from tests.unit.router.streams import ONLY, room, stream

STUDY_CALLS = 10
"""More calls than a study has replays."""

MOVE_NS = 5 * MS


def costs(*, move_ns: int = MOVE_NS) -> CostModel:
    """A step takes 10 ms; a move takes as long as it is told."""
    step = StepCost(fixed_s=0.01, context_s=0.0, sequence_s=0.0)
    move = MoveCost(fixed_s=move_ns / S, bytes_per_s=1e18)
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


def gated(
    lengths: tuple[int, ...],
    *,
    every_ns: int = 100 * MS,
    contexts: tuple[int, ...] = (100,),
    tail_ratio: float = 10.0,
    moves_max: int = 2,
    move_ns: int = MOVE_NS,
) -> GatedOrder:
    """An order that has seen 300 answers of these lengths in turn, one arriving each ``every_ns``;
    the last of them a minute before the instant 0."""
    order = GatedOrder(costs(move_ns=move_ns), moves_max=moves_max, tail_ratio=tail_ratio)
    for index in range(300):
        generated = lengths[index % len(lengths)]
        order.finished(
            "all",
            generated,
            0,
            context_tokens=contexts[index % len(contexts)] + generated,
            arrived_ns=(index - 300) * every_ns - 60 * S,
        )
    return order


LONG = stream("long", worker=ONLY, generated=200, since_ns=-60 * S, arrived_ns=-60 * S)
SHORT = [stream(f"short{index}", arrived_ns=index) for index in range(4)]
FULL = room(1, running_max=1)


def study(order: GatedOrder, rooms: DecodeRoom = FULL, running: Stream = LONG) -> None:
    for call in range(STUDY_CALLS):
        order.swaps([running], SHORT, [rooms], call)


HEAVY = (5, 5, 5, 5, 5, 5, 5, 5, 5, 400)
"""Nine short answers and a long one: 44.5 tokens, 445 ms of the only place, on average."""


def test_before_anything_is_known_it_is_first_come_first_served() -> None:
    order = GatedOrder(costs(), moves_max=2)
    parked = [stream("b", arrived_ns=2), stream("a", arrived_ns=1, context=9000)]
    assert [one.request for one in order.resume_order(parked, 0)] == ["a", "b"]
    assert order.swaps([LONG], parked, [FULL], 0) == []
    assert order.plan == FCFS


def test_a_few_answers_prove_nothing() -> None:
    order = GatedOrder(costs(), moves_max=2)
    for index in range(JOBS_MIN - 1):
        order.finished("all", 5, 0, context_tokens=10, arrived_ns=index)
    study(order)
    assert order.plan == FCFS


def test_answers_that_nobody_timed_prove_nothing() -> None:
    order = GatedOrder(costs(), moves_max=2)
    for _ in range(300):
        order.finished("all", 5, 0)
    study(order)
    assert order.plan == FCFS
    assert order.lengths.observed_count == 300


def test_where_short_ones_wait_for_long_ones_parking_is_proven() -> None:
    order = gated(HEAVY, every_ns=500 * MS)
    study(order)
    assert order.plan.parks
    assert not order.plan.weighs_memory


def test_where_all_are_alike_nothing_is_gained() -> None:
    order = gated((44,), every_ns=500 * MS)
    study(order, running=stream("r", worker=ONLY, generated=20, since_ns=-60 * S))
    assert order.plan == FCFS


def test_a_tail_that_would_suffer_forbids_it() -> None:
    order = gated(HEAVY, every_ns=500 * MS, tail_ratio=0.5)
    study(order)
    assert order.plan == FCFS


def test_where_memory_binds_small_ones_are_begun_first() -> None:
    order = gated((40,), every_ns=80 * MS, contexts=(100, 100, 100, 8000))
    tight = DecodeRoom(ONLY, 1, 100, 0, 10_000)
    study(order, tight, stream("r", worker=ONLY, context=9_000, since_ns=-60 * S))
    assert order.plan.weighs_memory
    parked = [stream("large", context=8000, arrived_ns=0), stream("small", arrived_ns=1)]
    assert [one.request for one in order.resume_order(parked, 0)] == ["small", "large"]


def test_a_study_is_spread_over_calls_and_repeated_after_its_time() -> None:
    order = gated(HEAVY, every_ns=500 * MS)
    order.swaps([LONG], SHORT, [FULL], 0)
    assert order.plan == FCFS
    study(order)
    proven = order.plan
    assert proven.parks
    order._plan = FCFS
    study(order)
    assert order.plan == FCFS
    for call in range(STUDY_CALLS):
        order.swaps([LONG], SHORT, [FULL], STUDY_EVERY_NS + call)
    assert order.plan.parks


def test_a_quiet_time_refutes_nothing() -> None:
    order = gated(HEAVY, every_ns=500 * MS)
    study(order)
    proven = order.plan
    assert proven.parks
    roomy = room(1, running_max=1000)
    for call in range(STUDY_CALLS):
        order.swaps([LONG], SHORT, [roomy], STUDY_EVERY_NS + call)
    assert order.plan == proven


def test_a_new_study_may_refute_the_last() -> None:
    order = gated(HEAVY, every_ns=500 * MS)
    study(order)
    for index in range(5000):
        order.finished("all", 44, 0, context_tokens=144, arrived_ns=index * 500 * MS)
    for call in range(STUDY_CALLS):
        order.swaps([LONG], SHORT, [FULL], 5000 * S + call)
    assert order.plan == FCFS


# ── single swaps ─────────────────────────────────────────────────────────────────────────────────

NOW = 1000 * S


def proven(*, moves_max: int = 2, move_ns: int = MOVE_NS, credit: bool = True) -> GatedOrder:
    """An order that follows a plan that parks, and has credit for moves."""
    order = gated(HEAVY, moves_max=moves_max, move_ns=move_ns)
    order._plan = Plan(100 * S, parks=True)
    order._next_study_ns = 1 << 62
    order._studied_count = 1 << 30
    if credit:
        order.swaps([], [], [FULL], 0)
    return order


def running(*, generated: int = 100, since_ns: int = NOW - S, moves: int = 0) -> Stream:
    return stream(
        "long",
        worker=ONLY,
        generated=generated,
        since_ns=since_ns,
        arrived_ns=NOW - S,
        moves=moves,
    )


def waiting(*, since_ns: int = NOW - S, moves: int = 0) -> Stream:
    return stream("short", since_ns=since_ns, arrived_ns=NOW - S, moves=moves)


def wished(order: GatedOrder, out: Stream, into: Stream, rooms: DecodeRoom = FULL) -> list[Swap]:
    return order.swaps([out], [into], [rooms], NOW)


def test_a_long_one_makes_place_for_a_short_one() -> None:
    assert wished(proven(), running(), waiting()) == [Swap(running().request, waiting().request)]


def test_who_fits_beside_needs_no_swap() -> None:
    assert wished(proven(), running(), waiting(), room(1, running_max=2)) == []


def test_where_memory_binds_a_plan_for_places_parks_nobody() -> None:
    assert wished(proven(), running(), waiting(), room(1, free_tokens=0)) == []


def test_who_may_be_about_to_end_stays() -> None:
    assert wished(proven(), running(generated=0), waiting()) == []


@pytest.mark.parametrize(("moves", "goes"), [(0, True), (1, True), (2, False)])
def test_nobody_is_parked_more_often_than_allowed(moves: int, goes: bool) -> None:
    assert bool(wished(proven(), running(moves=moves), waiting())) is goes


def test_each_move_of_a_stream_must_gain_more() -> None:
    order = proven(moves_max=100)
    assert wished(order, running(moves=1), waiting())
    assert wished(order, running(moves=50), waiting()) == []


def test_who_has_just_been_moved_stays_for_twice_the_time_of_a_swap() -> None:
    for ago_ns, goes in ((4 * MOVE_NS - 1, False), (4 * MOVE_NS, True)):
        since_ns = NOW - ago_ns
        assert bool(wished(proven(), running(since_ns=since_ns), waiting())) is goes
        assert bool(wished(proven(), running(), waiting(since_ns=since_ns, moves=1))) is goes


def test_a_fresh_one_need_not_have_waited() -> None:
    assert wished(proven(), running(), waiting(since_ns=NOW))


def test_moves_take_a_twentieth_of_the_time_of_the_links() -> None:
    order = proven(move_ns=100 * MS)
    assert CREDIT_MAX_NS == 500 * MS
    swaps = 0
    for tick in range(1002):
        now_ns = NOW + tick * 10 * MS
        swaps += len(order.swaps([running()], [waiting()], [FULL], now_ns))
    # Half a second of credit to begin with, and half a second in the ten that pass; two moves each.
    assert swaps == (500 + 500) // 200


def test_without_credit_nobody_moves() -> None:
    assert wished(proven(credit=False), running(), waiting()) == []


def test_what_makes_room_by_itself_during_the_moves_is_waited_for() -> None:
    order = proven(move_ns=200 * MS)
    ending = [stream(f"ending{index}", worker=ONLY, generated=4, since_ns=0) for index in range(7)]
    full = room(8, running_max=8)
    assert order.swaps([running(), *ending], [waiting()], [full], NOW) == []
    young = [stream(f"young{index}", worker=ONLY, generated=50, since_ns=NOW) for index in range(7)]
    assert order.swaps([running(), *young], [waiting()], [full], NOW) != []
