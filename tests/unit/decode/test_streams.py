"""The decode loop: taking over, ending, running out of blocks, parking, letting go."""

from dataclasses import replace

import pytest

from pdserve.decode.stream import Stage, Stream
from pdserve.engine.moves import Park
from pdserve.engine.outputs import GiveUp, ToGateway
from pdserve.errors import IllegalTransition
from pdserve.ids import TicketId
from pdserve.messages import Cancel, FinishReason, Handoff, Request, WorkerFailed
from tests.unit.engine import rig as rig_module
from tests.unit.engine.fakes import EOS, FakeStore
from tests.unit.engine.rig import SAMPLINGS, LateMover, Rig, plain, prompt, request


class Inbox:
    def __init__(self) -> None:
        self.handoffs: list[Handoff] = []

    def handle(self, handoff: Handoff) -> None:
        self.handoffs.append(handoff)


def handoffs(rig: Rig, asked: list[Request]) -> list[Handoff]:
    """What prefill hands over for each, not yet delivered to the decode worker ``d0``."""
    inbox = Inbox()
    rig.decodes["d0"] = inbox  # type: ignore[assignment]
    rig.prefill()
    for one in asked:
        rig.send(one)
    rig.run_prefills()
    del rig.decodes["d0"]
    return inbox.handoffs


def failures(rig: Rig) -> list[str]:
    return [failed.error.kind for failed in rig.told(WorkerFailed)]  # type: ignore[attr-defined]


def test_the_first_token_is_out_before_the_blocks_are_in() -> None:
    rig = Rig()
    (handoff,) = handoffs(rig, [request(tokens=prompt(10))])
    decode = rig.decode()
    decode.handle(handoff)
    outputs = rig.step(decode)
    assert [type(output) for output in outputs] == [ToGateway]
    assert rig.tokens() == plain(request())[:1]
    assert decode.load().counters.get("steps", 0) == 0


def test_timing_comes_with_the_first_tokens_and_with_the_last() -> None:
    rig = Rig()
    rig.prefill()
    rig.decode()
    rig.send(request(max_tokens=5))
    rig.run()
    deltas = rig.deltas[request().request]
    assert [delta.timing is not None for delta in deltas] == [True, False, False, False, True]
    last = deltas[-1].timing
    assert last is not None
    assert (last.prefill, last.decode) == ("p0", "d0")


def test_handoff_time_runs_from_the_first_token_to_the_takeover(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig()
    monkeypatch.setattr("pdserve.prefill.prompt.steady_unix_us", lambda: 1000)
    (handoff,) = handoffs(rig, [request(max_tokens=3)])
    decode = rig.decode()
    instants = iter((1700, 1900))  # it arrives, its blocks have arrived
    monkeypatch.setattr("pdserve.decode.streams.steady_unix_us", lambda: next(instants))
    decode.handle(handoff)
    rig.run()
    timings = [delta.timing for delta in rig.deltas[request().request] if delta.timing]
    assert [timing.handoff_us for timing in timings] == [700, 900]


def test_sequences_join_and_leave_a_running_batch() -> None:
    rig = Rig()
    asked = [request(f"r{i}", prompt(6, salt=i), max_tokens=4 + 3 * i) for i in range(3)]
    given = handoffs(rig, asked)
    decode = rig.decode()
    for handoff in given:
        decode.handle(handoff)
        rig.step(decode)
        rig.step(decode)
    rig.run()
    assert {len(step) for step in rig.runners["d0"].steps} >= {1, 2}
    for one in asked:
        assert rig.tokens(one.request) == plain(one)
    rig.check_idle()


def test_no_more_than_running_max_run() -> None:
    rig = Rig()
    asked = [request(f"r{i}", prompt(6, salt=i), max_tokens=5) for i in range(5)]
    given = handoffs(rig, asked)
    decode = rig.decode(running_max=2)
    for handoff in given:
        decode.handle(handoff)
    rig.step(decode)
    assert (decode.load().running, decode.load().waiting) == (2, 3)
    rig.run()
    assert max(len(step) for step in rig.runners["d0"].steps) == 2
    rig.check_idle()


@pytest.mark.parametrize("stop", ["strings", "tokens", "eos"])
def test_a_request_ends_where_a_stop_says(stop: str) -> None:
    free = request(tokens=prompt(9), sampling=SAMPLINGS["seeded"], max_tokens=60)
    tokens = plain(free)
    letters = "".join(chr(ord("a") + token) for token in tokens)
    reason: str | int | None
    if stop == "strings":
        asked = replace(free, stop=replace(free.stop, strings=(letters[5:8],)))
        length, reason = letters.index(letters[5:8]) + 3, letters[5:8]
    elif stop == "tokens":
        asked = replace(free, stop=replace(free.stop, token_ids=(tokens[6],)))
        length, reason = tokens.index(tokens[6]) + 1, tokens[6]
    else:
        asked = replace(free, stop=replace(free.stop, ignore_eos=False))
        assert EOS in tokens, "the seed must draw an end-of-sequence token"
        length, reason = tokens.index(EOS) + 1, None
    rig = Rig()
    rig.prefill()
    rig.decode()
    rig.send(asked)
    rig.run()
    assert rig.tokens() == tokens[:length]
    assert rig.finish() is FinishReason.STOP
    assert rig.deltas[asked.request][-1].stop_reason == reason
    rig.check_idle()


def test_out_of_blocks_the_latest_are_parked_and_go_on_elsewhere() -> None:
    """Six streams of up to 11 blocks where there are 40: some leave, all answer as if alone."""
    rig = Rig()
    rig.prefill()
    decode = rig.decode("d0", blocks=40)
    other = rig.decode("d1", blocks=64)
    asked = [
        request(f"r{i}", prompt(14, salt=i), sampling=SAMPLINGS["penalties"], max_tokens=30)
        for i in range(6)
    ]
    rig.resume_on = "d1"
    for one in asked:
        rig.send(one)
    rig.run()
    for one in asked:
        assert rig.tokens(one.request) == plain(one)
    parked = decode.load().counters["parked"]
    assert parked >= 2
    assert other.load().counters["resumed"] == parked
    assert rig.events("r0") == ["prefill_done", "adopted", "ended"]  # the oldest stays
    rig.check_idle()


def test_while_one_is_on_its_way_out_no_more_leave_than_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four streams of three blocks where there are 15: three get a fourth block and the last
    leaves. While its bytes are on their way the others wait for its three blocks."""
    monkeypatch.setattr(rig_module, "Mover", LateMover)
    rig = Rig()
    asked = [request(f"r{i}", prompt(9, salt=i), max_tokens=20) for i in range(4)]
    given = handoffs_late(rig, asked)
    decode = rig.decode(blocks=15)
    mover = decode._mover
    assert isinstance(mover, LateMover)
    for handoff in given:
        decode.handle(handoff)
    while mover.run_one() or decode.busy():
        rig.step(decode)
        if any(isinstance(move, Park) for move, _ in mover.late):
            break
    for _ in range(10):
        rig.step(decode)
    assert decode.pool.free_count == 0
    assert sum(isinstance(move, Park) for move, _ in mover.late) == 1
    assert not decode.busy()


def handoffs_late(rig: Rig, asked: list[Request]) -> list[Handoff]:
    inbox = Inbox()
    rig.decodes["d0"] = inbox  # type: ignore[assignment]
    prefill = rig.prefill()
    mover = prefill._mover
    assert isinstance(mover, LateMover)
    for one in asked:
        rig.send(one)
    while prefill.busy() or mover.run_one():
        rig.step(prefill)
    del rig.decodes["d0"]
    return inbox.handoffs


def test_who_comes_in_leaves_a_block_to_each_that_runs() -> None:
    """Five of eight blocks are free after the first; the second needs four and would leave one,
    the third would leave none for the two that run."""
    rig = Rig()
    asked = [request(f"r{i}", prompt(length, salt=i)) for i, length in enumerate((9, 13, 3))]
    given = handoffs(rig, asked)
    decode = rig.decode(blocks=8)
    for handoff in given:
        decode.handle(handoff)
    rig.step(decode)
    assert (decode.load().running, decode.load().waiting) == (2, 1)
    rig.resume_on = "d0"
    rig.run()
    for one in asked:
        assert rig.tokens(one.request) == plain(one)


def test_parked_on_the_only_worker_everybody_still_ends() -> None:
    rig = Rig()
    rig.prefill()
    decode = rig.decode(blocks=16)
    rig.resume_on = "d0"
    asked = [request(f"r{i}", prompt(14, salt=i), max_tokens=30) for i in range(4)]
    for one in asked:
        rig.send(one)
    rig.run()
    for one in asked:
        assert rig.tokens(one.request) == plain(one)
    assert decode.load().counters["parked"] >= 1
    rig.check_idle()


def test_a_stream_that_outgrows_the_whole_pool_fails() -> None:
    rig = Rig()
    rig.prefill()
    rig.decode(blocks=4)
    rig.send(request(tokens=prompt(10), max_tokens=30))
    rig.run()
    assert failures(rig) == ["out_of_blocks"]
    assert len(rig.tokens()) == 7  # 16 tokens fill the pool; the 17th has none to be drawn from
    rig.check_idle()


def test_a_handoff_that_never_fits_fails_at_once() -> None:
    rig = Rig()
    (handoff,) = handoffs(rig, [request(tokens=prompt(30))])
    decode = rig.decode(blocks=5)
    decode.handle(handoff)
    rig.run()
    assert failures(rig) == ["out_of_blocks"]
    rig.check_idle()


def test_too_many_waiting_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.decode.streams.WAITING_MAX", 2)
    rig = Rig()
    given = handoffs(rig, [request(f"r{i}", prompt(5, salt=i)) for i in range(3)])
    decode = rig.decode()
    for handoff in given:
        decode.handle(handoff)
    rig.run()
    assert failures(rig) == ["queue_full"]
    rig.check_idle()


def test_a_handoff_of_another_version_fails_and_leaks_nothing() -> None:
    """Its blocks have the right shape, and are of another model."""
    rig = Rig()
    (handoff,) = handoffs(rig, [request(tokens=prompt(10))])
    decode = rig.decode()
    decode.handle(replace(handoff, namespace="00" * 16))
    rig.run()
    assert failures(rig) == ["store"]
    rig.check_idle()


@pytest.mark.parametrize("damage", ["ticket", "block", "checksum", "store"])
def test_a_handoff_that_cannot_be_read_fails_and_leaks_nothing(damage: str) -> None:
    rig = Rig()
    (handoff,) = handoffs(rig, [request(tokens=prompt(10))])
    kinds = {
        "ticket": "ticket_gone",
        "block": "block_missing",
        "checksum": "checksum_mismatch",
        "store": "store_unavailable",
    }
    decode = rig.decode()
    if damage == "ticket":
        handoff = replace(handoff, ticket=TicketId("other"))
    elif damage == "block":
        del rig.d_store.blocks[handoff.block_keys[1]]
    elif damage == "checksum":
        rig.d_store.bad.add(handoff.block_keys[1])
    else:
        rig.d_store.down = True
    decode.handle(handoff)
    rig.run()
    assert failures(rig) == [kinds[damage]]
    rig.d_store.tickets.clear()  # what the damage left
    rig.check_idle()


def test_a_full_arena_fails_the_park_and_leaks_nothing() -> None:
    rig = Rig()
    rig.prefill()
    decode = rig.decode()
    rig.send(request(max_tokens=30))
    while len(rig.tokens()) < 4:
        for loop in (rig.prefills["p0"], decode):
            rig.step(loop)
    rig.d_store.full = True
    decode.drain()
    rig.run()
    assert failures(rig) == ["out_of_blocks"]
    rig.check_idle()


def test_draining_parks_what_runs_and_what_still_arrives() -> None:
    rig = Rig()
    given = handoffs(rig, [request(f"r{i}", prompt(9, salt=i), max_tokens=20) for i in range(3)])
    decode = rig.decode()
    decode.handle(given[0])
    for _ in range(4):
        rig.step(decode)
    decode.handle(given[1])
    decode.drain()
    decode.handle(given[2])
    rig.run()
    assert [handoff.request.request for handoff in rig.parked] == ["r0", "r1", "r2"]
    assert (decode.load().running, decode.load().waiting) == (0, 0)
    assert all(handoff.unsent == () for handoff in rig.parked)
    rig.decode("d1")
    while rig.parked:
        rig.resume(rig.parked.pop(), "d1")
    rig.run()
    for handoff in given:
        assert rig.tokens(handoff.request.request) == plain(handoff.request)
    rig.check_idle()


@pytest.mark.parametrize("before", range(30))
def test_cancel_at_any_step_gives_everything_back(before: int) -> None:
    """Four streams where three fit, so that one or another is waiting, adopting or parking."""
    rig = Rig()
    asked = [request(f"r{i}", prompt(14, salt=i), max_tokens=20) for i in range(4)]
    given = handoffs(rig, asked)
    decode = rig.decode(blocks=18)
    rig.resume_on = "d0"
    for handoff in given:
        decode.handle(handoff)
    for _ in range(before):
        rig.step(decode)
    for one in asked[1:]:
        decode.handle(Cancel(one.request))
    rig.step(decode)
    said = {name: len(deltas) for name, deltas in rig.deltas.items() if name != "r0"}
    rig.resume_on = None
    rig.run()
    assert {name: len(rig.deltas[name]) for name in said} == said, "a cancelled stream spoke"
    assert rig.tokens("r0") == plain(asked[0])
    for handoff in rig.parked:  # nobody cancelled these: the router has them
        rig.d_store.abort(handoff.ticket)
    rig.check_idle()


def test_a_cancel_frees_the_blocks_of_a_handoff_that_never_came() -> None:
    rig = Rig()
    asked = request("r", prompt(14))
    handoffs(rig, [asked])  # and its word gets lost
    assert rig.d_store.tickets
    decode = rig.decode()
    decode.handle(Cancel(asked.request, asked.attempt))
    rig.run()
    rig.check_idle()
    assert not rig.d_store.tickets


@pytest.mark.parametrize("before", range(0, 30, 3))
def test_when_the_router_is_gone_everything_ends_and_comes_back_cheaply(before: int) -> None:
    """Running, waiting, parked, on its way in or out: nothing of it is wanted any more."""
    rig = Rig()
    asked = [request(f"r{i}", prompt(14, salt=i), max_tokens=20) for i in range(4)]
    given = handoffs(rig, asked)
    decode = rig.decode(blocks=18)
    for handoff in given:
        decode.handle(handoff)
    for _ in range(before):
        rig.step(decode)
    decode.handle(GiveUp())
    rig.step(decode)
    said = {name: len(deltas) for name, deltas in rig.deltas.items()}
    rig.run()
    assert {name: len(deltas) for name, deltas in rig.deltas.items()} == said
    assert (decode.load().running, decode.load().waiting) == (0, 0)
    rig.check_idle()


def test_an_older_attempt_is_dropped_and_a_newer_replaces() -> None:
    rig = Rig()
    asked = request(tokens=prompt(10), max_tokens=20)
    (handoff,) = handoffs(rig, [asked])
    (newer,) = handoffs(rig, [replace(asked, attempt=1)])
    (oldest,) = handoffs(rig, [asked])
    decode = rig.decode()
    decode.handle(handoff)
    for _ in range(4):
        rig.step(decode)
    decode.handle(newer)
    decode.handle(oldest)
    decode.handle(newer)  # told twice
    rig.run()
    assert rig.events().count("ended") == 1
    assert rig.deltas[asked.request][-1].attempt == 1
    rig.check_idle()


def test_under_pressure_what_was_offered_is_dropped_and_counted() -> None:
    rig = Rig()
    decode = rig.decode(blocks=4)
    device = decode._device
    blocks = decode.pool.take(4)
    kept: list[object] = []
    decode._mover.offer = lambda move, owner=None: bool(kept.append(move)) or True  # type: ignore
    decode._mover.take_back_offered = lambda: [kept.pop()] if kept else []  # type: ignore
    from pdserve.engine.moves import Put

    device.offer(Put(rig.d_address, (), tuple(blocks)))
    decode.pool.release(blocks)
    assert decode.pool.free_count == 0
    assert device.room(4)
    assert decode.load().counters["offers_dropped"] == 1
    assert not device.room(5)


def test_without_offload_nothing_is_left_in_the_store() -> None:
    rig = Rig(offload=False)
    rig.prefill()
    rig.decode()
    rig.send(request(tokens=prompt(9), max_tokens=20))
    rig.run()
    assert "put" not in rig.d_store.calls
    rig.check_idle()


def test_stages_follow_the_table() -> None:
    (handoff,) = handoffs(Rig(), [request()])
    stream = Stream(sequence=FakeSequence(), handoff=handoff)  # type: ignore[arg-type]
    with pytest.raises(IllegalTransition, match="r: running while waiting"):
        stream.move_to(Stage.RUNNING)


class FakeSequence:
    id = "r"


def test_a_lost_store_connection_is_made_again() -> None:
    rig = Rig()
    given = handoffs(rig, [request(f"r{i}", prompt(9, salt=i)) for i in range(2)])
    decode = rig.decode()
    rig.d_store.down = True
    decode.handle(given[0])
    rig.run()
    rig.d_store.down = False
    decode.handle(given[1])
    rig.run()
    assert failures(rig) == ["store_unavailable"]
    assert rig.tokens("r1") == plain(given[1].request)
    assert isinstance(rig.d_store, FakeStore)
