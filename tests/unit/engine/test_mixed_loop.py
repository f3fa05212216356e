"""One worker that computes prompts and decodes: a step of both, staying, preempting, growing."""

from dataclasses import replace

import pytest

from pdserve.clock import S
from pdserve.engine.outputs import GiveUp, ToRouter
from pdserve.ids import RequestId, WorkerId
from pdserve.lifecycle import Phase
from pdserve.messages import (
    Attained,
    Cancel,
    ChunkDone,
    Decision,
    Dispatch,
    Handoff,
    Preempt,
    Sampling,
    Timing,
    WorkerFailed,
)
from pdserve.prefill.batch import ATTENTION_RATE
from tests.unit.engine import rig as rig_module
from tests.unit.engine.fakes import BLOCK_TOKENS
from tests.unit.engine.rig import SAMPLINGS, LateMover, Rig, plain, prompt, request

samplings = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())


def until_streaming(rig: Rig, *names: str, tokens: int = 1, worker: str = "d0") -> None:
    while any(len(rig.tokens(name)) < tokens for name in names):
        rig.step(rig.worker(worker))


# ── staying ──────────────────────────────────────────────────────────────────────────────────────


@samplings
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 17, 40])
def test_a_worker_of_either_role_answers_alone(sampling: Sampling, role: str, length: int) -> None:
    rig = Rig()
    loop = rig.prefill("w") if role == "prefill" else rig.decode("w")
    asked = request(tokens=prompt(length), sampling=sampling, max_tokens=15)
    rig.send(asked, prefill="w", decode="w")
    rig.run()
    assert rig.tokens() == plain(asked)
    assert rig.events() == ["prefill_done", "adopted", "ended"]
    assert loop.load().counters["tokens_generated"] == 15
    assert rig.runners["w"].computed_tokens == length + 14
    rig.check_idle()


def test_what_stays_opens_no_ticket_and_copies_nothing_back() -> None:
    rig = Rig()
    rig.decode()
    asked = request(tokens=prompt(10))
    rig.send(asked, prefill="d0", decode="d0")
    rig.run()
    assert not {"open_ticket", "push", "adopt", "read"} & set(rig.d_store.calls)
    assert set(asked.block_keys) <= set(rig.d_store.blocks)  # offered, for the next turn
    assert not rig.p_store.calls


def test_timing_says_who_did_what_and_that_nothing_was_handed_over() -> None:
    rig = Rig()
    rig.decode()
    rig.send(request(max_tokens=5), prefill="d0", decode="d0")
    rig.run()
    deltas = rig.deltas[RequestId("r")]
    assert deltas[0].offset == 0
    assert [delta.timing is not None for delta in deltas] == [True, False, False, False, True]
    for timing in (deltas[0].timing, deltas[-1].timing):
        assert timing is not None
        assert (timing.prefill, timing.decode, timing.handoff_us) == ("d0", "d0", 0)


def test_a_kept_prompts_blocks_are_found_by_the_next() -> None:
    rig = Rig()
    loop = rig.decode()
    for name, tokens in (("a", prompt(12)), ("b", (*prompt(12), 3, 4, 5))):
        rig.send(request(name, tokens, max_tokens=2), prefill="d0", decode="d0")
        rig.run()
    assert loop.load().counters["prompt_tokens_cached_device"] == 12
    assert rig.tokens("b") == plain(request("b", (*prompt(12), 3, 4, 5), max_tokens=2))


def test_a_kept_chunk_is_offered_before_the_prompt_is_done() -> None:
    rig = Rig()
    loop = rig.decode(chunk_tokens=8)
    rig.send(request(tokens=prompt(30)), prefill="d0", decode="d0")
    while not rig.told(ChunkDone):
        rig.step(loop)
    assert len(rig.d_store.blocks) == 2


def test_a_first_token_that_is_the_last_ends_it() -> None:
    rig = Rig()
    rig.decode()
    rig.send(request(max_tokens=1), prefill="d0", decode="d0")
    rig.run()
    assert rig.tokens() == plain(request())[:1]
    assert rig.events() == ["ended"]
    rig.check_idle()


def test_a_worker_can_do_its_own_part_keep_and_take_over_at_once() -> None:
    rig = Rig()
    rig.prefill()
    rig.decode("d0")
    rig.decode("d1")
    routes = [("p0", "d0"), ("d0", "d0"), ("p0", "p0"), ("d0", "d1"), ("d1", "p0")]
    asked = [
        request(f"r{i}", prompt(5 + 7 * i, salt=i), sampling=SAMPLINGS["seeded"], max_tokens=12)
        for i in range(len(routes))
    ]
    for one, (prefill, decode) in zip(asked, routes, strict=True):
        rig.send(one, prefill=prefill, decode=decode)
    rig.run()
    for one in asked:
        assert rig.tokens(one.request) == plain(one)
        assert rig.events(one.request) == ["prefill_done", "adopted", "ended"]
    rig.check_idle()


# ── a step of both ───────────────────────────────────────────────────────────────────────────────


def test_streams_get_a_token_in_every_step_beside_small_chunks() -> None:
    """Two streams run when a prompt of 18 comes: chunks of 4 instead of 8, and no step without
    the streams' tokens."""
    rig = Rig(offload=False)
    loop = rig.decode(chunk_tokens=8)
    asked = [request(f"r{i}", prompt(5, salt=i), max_tokens=20) for i in range(2)]
    for one in asked:
        rig.send(one, prefill="d0", decode="d0")
    until_streaming(rig, "r0", "r1")
    rig.runners["d0"].steps.clear()
    late = request("late", prompt(18, salt=5))
    rig.send(late, prefill="d0", decode="d0")
    until_streaming(rig, "late")
    assert rig.runners["d0"].steps == [[1, 1, 4], [1, 1, 4], [1, 1, 4], [1, 1, 4], [1, 1, 2]]
    rig.step(loop)
    assert rig.runners["d0"].steps[-1] == [1, 1, 1]
    rig.run()
    for one in (*asked, late):
        assert rig.tokens(one.request) == plain(one)


def test_alone_a_prompt_gets_whole_chunks() -> None:
    rig = Rig(offload=False)
    rig.decode(chunk_tokens=8)
    rig.send(request(tokens=prompt(18), max_tokens=1), prefill="d0", decode="d0")
    rig.run()
    assert rig.runners["d0"].steps == [[8], [8], [2]]


def test_prompts_and_streams_together_are_at_most_running_max() -> None:
    rig = Rig(offload=False)
    loop = rig.decode(running_max=3)
    asked = [request(f"r{i}", prompt(6, salt=i), max_tokens=4 + i) for i in range(7)]
    for one in asked:
        rig.send(one, prefill="d0", decode="d0")
    rig.step(loop)
    assert (loop.load().running, loop.load().waiting) == (3, 4)
    rig.run()
    assert max(len(step) for step in rig.runners["d0"].steps) == 3
    for one in asked:
        assert rig.tokens(one.request) == plain(one)


def test_a_prompt_leaves_a_block_to_each_that_runs() -> None:
    """Of eight blocks the stream holds three; the prompt's five would leave it none."""
    rig = Rig()
    loop = rig.decode(blocks=8)
    rig.send(request("a", prompt(9), max_tokens=12), prefill="d0", decode="d0")
    until_streaming(rig, "a")
    rig.send(request("b", prompt(20, salt=1), max_tokens=3), prefill="d0", decode="d0")
    rig.step(loop)
    assert (loop.load().running, loop.load().waiting) == (1, 1)
    rig.run()
    assert not rig.parked
    for name, tokens, count in (("a", prompt(9), 12), ("b", prompt(20, salt=1), 3)):
        assert rig.tokens(name) == plain(request(name, tokens, max_tokens=count))


def test_out_of_blocks_kept_streams_are_parked_and_go_on_elsewhere() -> None:
    rig = Rig()
    loop = rig.decode("d0", blocks=24)
    rig.prefill("p0")
    rig.resume_on = "p0"
    asked = [
        request(f"r{i}", prompt(14, salt=i), sampling=SAMPLINGS["penalties"], max_tokens=30)
        for i in range(5)
    ]
    for one in asked:
        rig.send(one, prefill="d0", decode="d0")
    rig.run()
    for one in asked:
        assert rig.tokens(one.request) == plain(one)
    assert loop.load().counters["parked"] >= 1
    assert rig.events("r0") == ["prefill_done", "adopted", "ended"]  # the oldest stays
    rig.check_idle()


def test_a_step_of_both_splits_its_time_over_its_chunks() -> None:
    rig = Rig(offload=False)
    loop = rig.decode(chunk_tokens=16)
    now_ns = iter(range(0, 10**9, 1_000_000))
    loop._clock = lambda: next(now_ns)
    rig.send(request("a", prompt(5), max_tokens=9), prefill="d0", decode="d0")
    until_streaming(rig, "a")
    rig.to_router.clear()
    rig.send(request("b", prompt(3, salt=1)), prefill="d0", decode="d0")
    rig.step(loop)
    (chunk,) = rig.told(ChunkDone)
    assert isinstance(chunk, ChunkDone)
    assert chunk.elapsed_us == 1000  # of the whole step: what a chunk costs beside streams


# ── preempting ───────────────────────────────────────────────────────────────────────────────────


@samplings
@pytest.mark.parametrize("kept", [True, False])
def test_a_decode_preempted_by_message_goes_on_elsewhere(sampling: Sampling, kept: bool) -> None:
    rig = Rig()
    rig.prefill()
    decode, other = rig.decode("d0"), rig.decode("d1")
    asked = request(tokens=prompt(14), sampling=sampling, max_tokens=20)
    rig.send(asked, prefill="d0" if kept else "p0")
    while len(rig.tokens()) < 6:
        for loop in (rig.prefills["p0"], decode):
            rig.step(loop)
    decode.handle(Preempt(asked.request, 0, Phase.DECODING))
    decode.handle(Preempt(asked.request, 0, Phase.DECODING))  # twice is once
    rig.run()
    (handoff,) = rig.parked
    assert handoff.tokens == prompt(14) + rig.tokens()
    assert handoff.unsent == ()
    assert decode.load().running == 0
    rig.parked.clear()
    rig.resume(handoff, "d1")
    rig.run()
    assert rig.tokens() == plain(asked)
    assert other.load().counters["resumed"] == 1
    rig.check_idle()


@pytest.mark.parametrize("before", range(14))
@pytest.mark.parametrize("phase", [Phase.PREFILLING, Phase.DECODING])
def test_a_preempt_at_any_step_is_obeyed_or_ignored_and_loses_nothing(
    before: int, phase: Phase
) -> None:
    """It stops what it was meant for: one for a prompt that streams by now parks nobody."""
    rig = Rig()
    loop = rig.decode("d0", chunk_tokens=8)
    asked = request(tokens=prompt(30), max_tokens=6)
    rig.send(asked, prefill="d0", decode="d0")
    for _ in range(before):
        rig.step(loop)
    loop.handle(Preempt(asked.request, 0, phase))
    rig.run()
    assert phase is Phase.DECODING or not rig.parked
    assert phase is Phase.PREFILLING or "preempted" not in rig.events()
    if rig.events() == ["preempted"]:
        rig.send(asked, prefill="d0", decode="d0")
    for handoff in rig.parked:
        rig.resume(handoff, "d0")
    rig.run()
    assert rig.tokens() == plain(asked)
    assert rig.runners["d0"].computed_tokens == 30 + 5
    rig.check_idle()


@pytest.mark.parametrize(
    "unknown",
    [Preempt(RequestId("r"), 1, Phase.DECODING), Preempt(RequestId("other"), 0, Phase.DECODING)],
)
def test_a_preempt_of_what_is_not_there_is_ignored(unknown: Preempt) -> None:
    rig = Rig()
    loop = rig.decode()
    rig.send(request(), prefill="d0", decode="d0")
    until_streaming(rig, "r")
    loop.handle(unknown)
    rig.run()
    loop.handle(Preempt(RequestId("r"), 0, Phase.DECODING))  # too late
    rig.run()
    assert not rig.parked
    assert rig.tokens() == plain(request())
    rig.check_idle()


def test_a_stream_that_is_not_running_yet_is_not_preempted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on its way in, and the router was not told that it is here."""
    monkeypatch.setattr(rig_module, "Mover", LateMover)
    rig = Rig()
    prefill, decode = rig.prefill(), rig.decode()
    rig.send(request())
    while not rig.events():
        late_step(rig, "p0")
    rig.step(decode)
    assert decode.load().running == 1
    decode.handle(Preempt(RequestId("r"), 0, Phase.DECODING))
    for _ in range(100):
        late_step(rig, "d0")
    assert not rig.parked
    assert rig.tokens() == plain(request())
    assert prefill.load().running == 0


def late_step(rig: Rig, name: str) -> None:
    loop = rig.worker(name)
    rig.step(loop)
    mover = loop._mover
    assert isinstance(mover, LateMover)
    mover.run_one()


# ── ending early ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("before", range(14))
@pytest.mark.parametrize("why", ["cancelled", "the router is gone"])
def test_what_is_given_up_at_any_step_leaves_nothing(before: int, why: str) -> None:
    rig = Rig()
    loop = rig.decode(chunk_tokens=8)
    rig.send(request(tokens=prompt(30)), prefill="d0", decode="d0")
    for _ in range(before):
        rig.step(loop)
    loop.handle(Cancel(RequestId("r")) if why == "cancelled" else GiveUp())
    said = rig.tokens()
    rig.run()
    assert rig.tokens() == said
    rig.check_idle()


def test_draining_finishes_prompts_and_parks_streams() -> None:
    """What has begun becomes a stream and is parked; what has not goes back as it came."""
    rig = Rig()
    loop = rig.decode(chunk_tokens=8, running_max=2)
    asked = [request(f"r{i}", prompt(length, salt=i)) for i, length in enumerate((5, 20, 9))]
    for one in asked:
        rig.send(one, prefill="d0", decode="d0")
    until_streaming(rig, "r0")
    loop.drain()
    rig.send(request("late"), prefill="d0", decode="d0")
    rig.run()
    assert [handoff.request.request for handoff in rig.parked] == ["r0", "r1"]
    assert rig.events("r1") == ["prefill_done", "adopted"]
    assert (rig.events("r2"), rig.events("late")) == (["preempted"], ["preempted"])
    assert (loop.load().running, loop.load().waiting) == (0, 0)
    rig.decode("d1")
    for handoff in rig.parked:
        rig.resume(handoff, "d1")
    rig.run()
    for one in asked[:2]:
        assert rig.tokens(one.request) == plain(one)
    rig.check_idle()


def test_a_newer_attempt_replaces_the_stream_of_an_older() -> None:
    rig = Rig()
    loop = rig.decode()
    asked = request(tokens=prompt(10), max_tokens=20)
    rig.send(asked, prefill="d0", decode="d0")
    until_streaming(rig, "r", tokens=3)
    rig.deltas.clear()
    rig.send(replace(asked, attempt=1), prefill="d0", decode="d0")
    assert loop.load().running == 0
    rig.send(asked, prefill="d0", decode="d0")  # older: nobody waits for it
    rig.send(replace(asked, attempt=1), prefill="d0", decode="d0")  # told twice
    rig.run()
    assert {delta.attempt for delta in rig.deltas[asked.request]} == {1}
    assert rig.tokens() == plain(asked)
    rig.send(replace(asked, attempt=1), prefill="d0", decode="d0")
    assert rig.events().count("ended") == 1
    rig.run()


def test_a_handoff_replaces_the_prompt_of_an_older_attempt_and_not_of_a_newer() -> None:
    rig = Rig()
    rig.prefill()
    decode = rig.decode("d0", chunk_tokens=4)
    rig.decode("d1")
    older, newer = (request(tokens=prompt(30), attempt=attempt) for attempt in (0, 1))
    rig.send(older, prefill="d0", decode="d1")
    rig.step(decode)
    rig.send(newer)
    rig.run()
    assert {delta.attempt for delta in rig.deltas[RequestId("r")]} == {1}
    rig.check_idle()

    rig.deltas.clear()
    rig.send(replace(newer, attempt=3), prefill="d0", decode="d0")
    rig.send(replace(newer, attempt=2))
    rig.run()
    assert {delta.attempt for delta in rig.deltas[RequestId("r")]} == {3}
    rig.check_idle()


def test_a_lost_store_does_not_stop_what_stays() -> None:
    rig = Rig()
    rig.decode()
    rig.d_store.down = True
    rig.send(request(tokens=prompt(14)), prefill="d0", decode="d0")
    rig.run()
    assert rig.tokens() == plain(request(tokens=prompt(14)))
    assert not rig.told(WorkerFailed)


# ── what the router hears ────────────────────────────────────────────────────────────────────────


def test_how_far_streams_have_come_is_told_once_a_second() -> None:
    rig = Rig()
    loop = rig.decode()
    now_ns = loop._clock()
    loop._clock = lambda: now_ns
    again = request(tokens=prompt(12), prompt_tokens=10, attempt=1, max_tokens=30)
    rig.send(again, prefill="d0", decode="d0")
    for _ in range(6):
        rig.step(loop)
    assert loop.load().attained == ()
    now_ns += S
    generated = 2 + sum(len(delta.tokens) for delta in rig.deltas[again.request])
    assert generated > 2
    assert loop.load().attained == (Attained(again.request, 1, generated),)
    assert loop.load().attained == ()
    rig.run()
    now_ns += S
    assert loop.load().attained == ()


def test_prefill_done_and_adopted_are_said_in_this_order_in_one_step() -> None:
    rig = Rig()
    loop = rig.decode()
    rig.send(request(), prefill="d0", decode="d0")
    while not rig.events():
        outputs = rig.step(loop)
    said = [output.message for output in outputs if isinstance(output, ToRouter)]
    assert [getattr(message, "event", "chunk") for message in said] == [
        "chunk",
        "prefill_done",
        "adopted",
    ]


@pytest.mark.parametrize("prefill", ["d0", "p0"])
def test_the_routers_decisions_travel_to_the_gateway(prefill: str) -> None:
    rig = Rig()
    rig.prefill()
    decode = rig.decode("d0")
    decisions = tuple(
        Decision(at, "shortest key", 5, 0, 1000, 0, WorkerId(prefill), WorkerId("d0"))
        for at in (1, 2)
    )
    dispatch = rig.dispatch(request(max_tokens=9), prefill=prefill)
    dispatch = Dispatch(dispatch.request, dispatch.route, Timing(decisions=decisions))
    rig.worker(prefill).handle(dispatch)
    while len(rig.tokens()) < 3:
        for name in ("p0", "d0"):
            rig.step(rig.worker(name))
    decode.handle(Preempt(RequestId("r"), 0, Phase.DECODING))
    rig.run()
    (handoff,) = rig.parked
    assert isinstance(handoff, Handoff)
    rig.resume(handoff, "d0")
    rig.run()
    timings = [delta.timing for delta in rig.deltas[RequestId("r")] if delta.timing]
    assert [timing.decisions for timing in timings] == [decisions, decisions]


def test_blocks_are_whole_tokens_of_the_budget() -> None:
    """A budget below one block is one block: only full blocks can be kept."""
    rig = Rig(offload=False)
    loop = rig.decode(chunk_tokens=1)
    rig.send(request(tokens=prompt(9), max_tokens=1), prefill="d0", decode="d0")
    rig.run()
    assert rig.runners["d0"].steps == [[BLOCK_TOKENS], [BLOCK_TOKENS], [1]]
    assert not loop.busy()


def test_beside_a_stream_chunks_get_shorter_with_what_a_token_attends_to() -> None:
    rig = Rig()
    loop = rig.decode(chunk_tokens=32, mixed_chunk_tokens=16)
    loop._workplace.attention_like_linear_tokens = round(25 / ATTENTION_RATE)
    rig.send(request("s", tokens=prompt(1), max_tokens=40), prefill="d0", decode="d0")
    until_streaming(rig, "s")
    before = len(rig.runners["d0"].steps)
    rig.send(request("p", tokens=prompt(60), max_tokens=2), prefill="d0", decode="d0")
    rig.run()
    steps = rig.runners["d0"].steps[before:]
    assert [max(step) for step in steps if max(step) > 1] == [16, 8, 8, 8, 8, 4, 4, 4]
