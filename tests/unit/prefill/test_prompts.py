"""The prefill loop alone: chunks, prefixes, tickets, preemption, refusals."""

from dataclasses import replace

import pytest

from pdserve.engine.outputs import GiveUp
from pdserve.errors import IllegalTransition
from pdserve.ids import BlockKey, RequestId
from pdserve.lifecycle import Phase
from pdserve.messages import (
    Cancel,
    ChunkDone,
    FinishReason,
    Handoff,
    Preempt,
    Request,
    Timing,
    WorkerFailed,
)
from pdserve.prefill.prompt import Prompt, Stage
from pdserve.prefill.prompts import TICKET_SLICE_MS, WAITING_MAX
from tests.unit.engine.fakes import EOS, FakeRunner
from tests.unit.engine.rig import NAMESPACE, Rig, plain, prompt, request


class Inbox:
    """Stands for a decode worker: keeps hand-offs."""

    def __init__(self) -> None:
        self.handoffs: list[Handoff] = []

    def handle(self, handoff: Handoff) -> None:
        self.handoffs.append(handoff)


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def inbox(rig: Rig) -> Inbox:
    inbox = Inbox()
    rig.decodes["d0"] = inbox  # type: ignore[assignment]
    return inbox


def run_prefill(rig: Rig) -> None:
    while rig.prefills["p0"].busy():
        rig.step(rig.prefills["p0"])


def failure(rig: Rig) -> str:
    (failed,) = rig.told(WorkerFailed)
    assert isinstance(failed, WorkerFailed)
    return failed.error.kind


def test_a_handoff_names_everything_that_decode_needs(rig: Rig, inbox: Inbox) -> None:
    rig.prefill()
    asked = request(tokens=prompt(10))
    rig.send(asked)
    run_prefill(rig)
    (handoff,) = inbox.handoffs
    assert handoff.request == asked
    assert handoff.store == rig.d_address
    assert handoff.tokens == prompt(10) + plain(asked)[:1]
    assert handoff.block_keys == asked.block_keys
    assert [token.token for token in handoff.unsent] == list(plain(asked)[:1])
    assert (handoff.timing.prefill, handoff.timing.cached_tokens) == ("p0", 0)
    ticket = rig.d_store.tickets[handoff.ticket]
    assert (ticket.reader, ticket.sealed, len(ticket.keys)) == ("d0", True, 2)
    assert ticket.tail is not None


def test_chunks_are_told_with_what_has_kv(rig: Rig, inbox: Inbox) -> None:
    rig.prefill(chunk_tokens=8)
    rig.send(request(tokens=prompt(19)))
    run_prefill(rig)
    chunks = rig.told(ChunkDone)
    assert [chunk.computed_tokens for chunk in chunks] == [8, 16, 19]  # type: ignore[attr-defined]


def test_short_prompts_share_a_step_and_do_not_wait_for_a_part_of_a_long_one(inbox: Inbox) -> None:
    rig = Rig(offload=False)  # nobody waits for the store's prefixes
    rig.decodes["d0"] = inbox  # type: ignore[assignment]
    rig.prefill(chunk_tokens=16)
    for index, length in enumerate((3, 5, 20)):
        rig.send(request(f"r{index}", prompt(length, salt=index)))
    run_prefill(rig)
    assert rig.runners["p0"].steps == [[3, 5], [16], [4]]


def test_one_that_goes_ahead_is_computed_between_two_chunks_of_a_longer_one(inbox: Inbox) -> None:
    rig = Rig(offload=False)
    rig.decodes["d0"] = inbox  # type: ignore[assignment]
    loop = rig.prefill(chunk_tokens=8)
    long, short = request("long", prompt(30)), request("short", prompt(5, salt=1))
    rig.send(long)
    while not rig.runners["p0"].steps:
        rig.step(loop)
    loop.handle(replace(rig.dispatch(short), ahead_of=long.request))
    run_prefill(rig)
    assert rig.runners["p0"].steps == [[8], [5], [8], [8], [6]]
    assert [handoff.request.request for handoff in inbox.handoffs] == ["short", "long"]
    assert [handoff.unsent[0].token for handoff in inbox.handoffs] == [
        plain(short)[0],
        plain(long)[0],
    ]


def test_who_was_to_go_ahead_of_one_that_is_done_is_last_in_line(rig: Rig, inbox: Inbox) -> None:
    loop = rig.prefill()
    for name in ("a", "b"):
        loop.handle(replace(rig.dispatch(request(name, prompt(9))), ahead_of=RequestId("gone")))
    run_prefill(rig)
    assert [handoff.request.request for handoff in inbox.handoffs] == ["a", "b"]


def test_each_chunk_is_pushed_while_the_next_is_computed(rig: Rig, inbox: Inbox) -> None:
    prefill = rig.prefill(chunk_tokens=8)
    rig.send(request(tokens=prompt(24)))
    pushed = []
    while prefill.busy():
        rig.step(prefill)
        pushed.append(sum(len(ticket.keys) for ticket in rig.d_store.tickets.values()))
    assert [count for count in (2, 4, 6) if count in pushed] == [2, 4, 6]


def test_a_prefix_in_the_device_pool_is_not_computed(rig: Rig, inbox: Inbox) -> None:
    prefill = rig.prefill()
    for name, tokens in (("a", prompt(12)), ("b", (*prompt(12), 3, 4, 5))):
        rig.send(request(name, tokens))
        run_prefill(rig)
    assert rig.runners["p0"].computed_tokens == 12 + 3
    assert inbox.handoffs[1].timing.cached_tokens == 12
    assert prefill.load().counters["prompt_tokens_cached_device"] == 12


def test_of_a_wholly_cached_prompt_the_last_block_is_computed(rig: Rig, inbox: Inbox) -> None:
    rig.prefill()
    for name in ("a", "b"):
        rig.send(request(name, prompt(12)))
        run_prefill(rig)
    assert rig.runners["p0"].computed_tokens == 12 + 4
    assert inbox.handoffs[0].unsent == inbox.handoffs[1].unsent


def test_a_prefix_in_the_store_is_restored_and_pushed_on(rig: Rig, inbox: Inbox) -> None:
    rig.prefill("p1")
    rig.send(request("a", prompt(12)), prefill="p1")
    while rig.prefills["p1"].busy():
        rig.step(rig.prefills["p1"])
    rig.d_store.blocks.clear()  # decode's store has lost them meanwhile
    rig.d_store.tickets.clear()
    rig.prefill("p0")
    rig.send(request("b", prompt(18)))
    run_prefill(rig)
    assert rig.runners["p0"].computed_tokens == 6
    assert len(rig.d_store.blocks) == 4


@pytest.mark.parametrize(("cached_tokens", "computed"), [(0, 14), (4, 2), (None, 2)])
def test_the_store_is_asked_unless_the_router_knows_that_it_has_nothing(
    rig: Rig, inbox: Inbox, cached_tokens: int | None, computed: int
) -> None:
    loop = rig.prefill()
    asked = request(tokens=prompt(14))
    seed_store(rig, asked, count=3)
    loop.handle(replace(rig.dispatch(asked), cached_tokens=cached_tokens))
    run_prefill(rig)
    assert rig.runners["p0"].computed_tokens == computed
    assert inbox.handoffs[0].unsent[0].token == plain(asked)[0]


def test_a_hand_off_leaves_before_the_next_chunk_is_computed(inbox: Inbox) -> None:
    """Its push has ended, and others wait for it: it does not wait for a step."""
    rig = Rig(offload=False)
    rig.decodes["d0"] = inbox  # type: ignore[assignment]
    loop = rig.prefill(chunk_tokens=8)
    for name, length in (("short", 5), ("long", 40)):
        rig.send(request(name, prompt(length)))
    while not inbox.handoffs:
        rig.step(loop)
    assert rig.runners["p0"].steps == [[5], [8]], "the ticket came with the second step"


def test_a_bad_block_in_the_store_is_computed(rig: Rig, inbox: Inbox) -> None:
    prefill = rig.prefill()
    asked = request(tokens=prompt(14))
    seed_store(rig, asked, count=3)
    rig.p_store.bad.add(asked.block_keys[1])
    rig.send(asked)
    run_prefill(rig)
    assert rig.runners["p0"].computed_tokens == 14 - 4
    assert inbox.handoffs[0].unsent[0].token == plain(asked)[0]
    assert prefill.load().counters["checksum_failures"] == 1


def seed_store(rig: Rig, asked: Request, count: int) -> None:
    """Put the first blocks of ``asked`` into prefill's store, as some other worker would have."""
    from pdserve.model.runner import Run

    runner = FakeRunner(8)
    runner.step([Run(tokens=asked.tokens, start=0, blocks=range(8))])

    def fill(index: int, out: memoryview) -> None:
        runner.pool.read_block(index, out)

    rig.p_store.put(asked.block_keys[:count], 0, fill, tenant=asked.tenant)


def test_without_the_local_store_everything_is_computed(inbox: Inbox, rig: Rig) -> None:
    rig.prefill()
    rig.p_store.down = True
    rig.send(request(tokens=prompt(14)))
    run_prefill(rig)
    assert len(inbox.handoffs) == 1
    assert rig.runners["p0"].computed_tokens == 14


def test_offload_off_neither_looks_into_nor_fills_the_local_store(inbox: Inbox) -> None:
    rig = Rig(offload=False)
    rig.decodes["d0"] = inbox  # type: ignore[assignment]
    rig.prefill()
    rig.send(request(tokens=prompt(14)))
    run_prefill(rig)
    assert not rig.p_store.calls
    assert len(rig.d_store.blocks) == 3


def test_a_prompt_larger_than_the_pool_fails(rig: Rig, inbox: Inbox) -> None:
    rig.prefill(blocks=3)
    rig.send(request(tokens=prompt(13)))
    run_prefill(rig)
    assert failure(rig) == "out_of_blocks"
    rig.check_idle()


def test_a_prompt_that_fits_later_waits(rig: Rig, inbox: Inbox) -> None:
    prefill = rig.prefill(blocks=4)
    rig.send(request("a", prompt(12)))
    rig.send(request("b", prompt(13, salt=1)))
    rig.step(prefill)
    assert (prefill.load().running, prefill.load().waiting) == (1, 1)
    run_prefill(rig)
    assert [handoff.request.request for handoff in inbox.handoffs] == ["a", "b"]


def test_more_than_may_wait_are_refused(rig: Rig, inbox: Inbox) -> None:
    prefill = rig.prefill()
    for index in range(WAITING_MAX + 1):
        prefill.handle(rig.dispatch(request(f"r{index}", prompt(4))))
    rig.step(prefill)
    assert failure(rig) == "queue_full"


def test_no_slots_at_decode_fail_after_the_configured_wait(rig: Rig, inbox: Inbox) -> None:
    rig.prefill()
    rig.d_store.full = True
    rig.send(request(tokens=prompt(14)))
    run_prefill(rig)
    assert failure(rig) == "out_of_blocks"
    tries = rig.d_store.calls.count("open_ticket")
    assert tries * TICKET_SLICE_MS == rig.store_config.ticket_wait_ms
    rig.check_idle()


def test_slots_that_come_late_are_taken(rig: Rig, inbox: Inbox) -> None:
    prefill = rig.prefill()
    rig.d_store.full = True
    rig.send(request(tokens=prompt(14)))
    for _ in range(6):
        rig.step(prefill)
    rig.d_store.full = False
    run_prefill(rig)
    assert len(inbox.handoffs) == 1


def test_a_ticket_that_vanishes_fails_the_attempt(rig: Rig, inbox: Inbox) -> None:
    prefill = rig.prefill()
    rig.send(request(tokens=prompt(30)))
    while not rig.d_store.tickets:
        rig.step(prefill)
    rig.d_store.tickets.clear()
    run_prefill(rig)
    assert failure(rig) == "ticket_gone"
    assert not inbox.handoffs
    rig.check_idle()


def test_decodes_store_down_fails_the_attempt(rig: Rig, inbox: Inbox) -> None:
    rig.prefill()
    rig.d_store.down = True
    rig.send(request(tokens=prompt(14)))
    run_prefill(rig)
    assert failure(rig) == "store_unavailable"
    rig.check_idle()


@pytest.mark.parametrize(
    ("asked", "finish"),
    [
        (request(max_tokens=1), FinishReason.LENGTH),
        (request(stop=(chr(ord("a") + plain(request())[0]),)), FinishReason.STOP),
        (request(stop_token_ids=plain(request())[:1]), FinishReason.STOP),
    ],
)
def test_a_first_token_that_is_the_last_goes_to_the_gateway(
    rig: Rig, inbox: Inbox, asked: Request, finish: FinishReason
) -> None:
    rig.prefill()
    rig.send(asked)
    run_prefill(rig)
    assert not inbox.handoffs
    assert rig.tokens() == plain(asked)[:1]
    assert rig.finish() is finish
    assert rig.events() == ["ended"]
    assert len(rig.p_store.blocks) == 2  # the next turn finds them
    rig.check_idle()


def test_an_end_of_sequence_token_is_not_drawn_below_min_tokens(rig: Rig, inbox: Inbox) -> None:
    prompts = (divmod(number, EOS) for number in range(500))
    tokens = next(t for t in prompts if plain(request(tokens=t, max_tokens=1)) == (EOS,))
    rig.prefill()
    rig.send(request("ends", tokens, ignore_eos=False))
    rig.send(request("goes on", tokens, ignore_eos=False, min_tokens=1))
    run_prefill(rig)
    assert rig.finish("ends") is FinishReason.STOP
    assert [handoff.request.request for handoff in inbox.handoffs] == ["goes on"]
    assert inbox.handoffs[0].unsent[0].token != EOS


def test_a_request_whose_last_token_was_delivered_already_just_ends(rig: Rig, inbox: Inbox) -> None:
    rig.prefill()
    rig.send(request(tokens=prompt(12), prompt_tokens=10, max_tokens=2, attempt=1))
    run_prefill(rig)
    assert rig.deltas[request().request][0].offset == 2
    assert rig.finish() is FinishReason.LENGTH
    assert rig.runners["p0"].computed_tokens == 0


@pytest.mark.parametrize("before", range(12))
@pytest.mark.parametrize("why", ["cancelled", "the router is gone"])
def test_what_is_given_up_at_any_step_leaves_nothing(
    rig: Rig, inbox: Inbox, before: int, why: str
) -> None:
    prefill = rig.prefill()
    asked = request(tokens=prompt(30))
    seed_store(rig, asked, count=2)
    rig.send(asked)
    for _ in range(before):
        rig.step(prefill)
    prefill.handle(Cancel(asked.request) if why == "cancelled" else GiveUp())
    run_prefill(rig)
    for handoff in inbox.handoffs:  # too late: decode's to drop
        rig.d_store.abort(handoff.ticket)
    rig.check_idle()


@pytest.mark.parametrize("before", range(12))
@pytest.mark.parametrize("one_host", [True, False])
def test_preempt_at_any_step_keeps_what_was_computed(
    inbox: Inbox, before: int, one_host: bool
) -> None:
    rig = Rig(one_host=one_host)
    rig.decodes["d0"] = inbox  # type: ignore[assignment]
    prefill = rig.prefill("p0")
    rig.prefill("p1")
    asked = request(tokens=prompt(30))
    rig.send(asked)
    for _ in range(before):
        rig.step(prefill)
    prefill.handle(Preempt(asked.request, 0, Phase.PREFILLING))
    prefill.handle(Preempt(asked.request, 0, Phase.PREFILLING))  # twice is once
    rig.run_prefills()
    if not inbox.handoffs:
        assert rig.events() == ["preempted"]
        rig.check_idle()
        rig.send(asked, prefill="p1")
        rig.run_prefills()
    assert inbox.handoffs[0].unsent[0].token == plain(asked)[0]
    assert rig.runners["p0"].computed_tokens + rig.runners["p1"].computed_tokens == 30


def test_what_a_resumed_prompt_finds_is_not_told_as_cached(rig: Rig, inbox: Inbox) -> None:
    prefill = rig.prefill()
    asked = request(tokens=prompt(14))
    seed_store(rig, asked, count=2)
    dispatch = rig.dispatch(asked)
    prefill.handle(replace(dispatch, timing=Timing(preempted_count=1, cached_tokens=4)))
    run_prefill(rig)
    assert inbox.handoffs[0].timing.cached_tokens == 4


def test_a_preempt_for_another_attempt_is_ignored(rig: Rig, inbox: Inbox) -> None:
    prefill = rig.prefill()
    asked = request(attempt=1)
    rig.send(asked)
    prefill.handle(Preempt(asked.request, 0, Phase.PREFILLING))
    prefill.handle(Preempt(request("unknown").request, 0, Phase.PREFILLING))
    run_prefill(rig)
    assert len(inbox.handoffs) == 1


def test_a_newer_attempt_replaces_an_older_and_not_the_other_way(rig: Rig, inbox: Inbox) -> None:
    prefill = rig.prefill()
    rig.send(request(tokens=prompt(30), attempt=1))
    rig.step(prefill)
    rig.send(request(tokens=prompt(30), attempt=0))
    rig.send(request(tokens=prompt(30), attempt=2))
    run_prefill(rig)
    assert [handoff.request.attempt for handoff in inbox.handoffs] == [2]
    rig.d_store.abort(inbox.handoffs[0].ticket)
    rig.check_idle()


def test_draining_finishes_what_runs_and_hands_back_the_rest(rig: Rig, inbox: Inbox) -> None:
    prefill = rig.prefill(blocks=4)
    rig.send(request("a", prompt(12)))
    rig.send(request("b", prompt(13, salt=1)))
    rig.step(prefill)
    prefill.drain()
    rig.send(request("c"))
    run_prefill(rig)
    assert [handoff.request.request for handoff in inbox.handoffs] == ["a"]
    assert (rig.events("b"), rig.events("c")) == (["preempted"], ["preempted"])
    load = prefill.load()
    assert (load.running, load.waiting) == (0, 0)


def test_load_tells_which_keys_came_and_went(rig: Rig, inbox: Inbox) -> None:
    prefill = rig.prefill(blocks=4)
    first, second = request("a", prompt(12)), request("b", prompt(16, salt=1))
    rig.send(first)
    run_prefill(rig)
    load = prefill.load()
    assert (load.blocks_added, load.free_blocks) == (first.block_keys, 4)
    rig.send(second)
    run_prefill(rig)
    load = prefill.load()
    assert load.blocks_added == second.block_keys
    assert set(load.blocks_removed) == set(first.block_keys)


def test_an_idle_loop_is_not_busy(rig: Rig) -> None:
    prefill = rig.prefill()
    assert not prefill.busy()
    assert prefill.step() == []


def test_stages_follow_the_table() -> None:
    one = Prompt(sequence=FakeSequence(), store=Rig().p_address)  # type: ignore[arg-type]
    with pytest.raises(IllegalTransition, match="r: sealing while waiting"):
        one.move_to(Stage.SEALING)


class FakeSequence:
    id = "r"


def test_keys_of_the_gateway_are_not_hashed_again(rig: Rig, inbox: Inbox) -> None:
    """The first one tells whether they are of this worker's model and layout."""
    rig.prefill()
    asked = request(tokens=prompt(10))
    keys = (asked.block_keys[0], BlockKey(bytes(16)))
    rig.send(replace(asked, block_keys=keys))
    run_prefill(rig)
    assert inbox.handoffs[0].block_keys == keys


def test_keys_of_another_version_are_replaced_by_own_ones(rig: Rig, inbox: Inbox) -> None:
    """A gateway of the version that is being replaced names blocks as its own workers do. Were
    this worker's blocks to get those names, the old workers would read them."""
    rig.prefill()
    asked = request(tokens=prompt(10))
    keys = tuple(BlockKey(bytes([i]) * 16) for i in range(2))
    rig.send(replace(asked, block_keys=keys))
    run_prefill(rig)
    assert inbox.handoffs[0].block_keys == asked.block_keys
    assert inbox.handoffs[0].namespace == NAMESPACE.hex()
