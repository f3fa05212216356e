"""Drafts change when tokens come and never which: whole workers with and without them.

The fake model goes round in circles (``habit``) and leaves them where a hash of all KV says so:
many drafts hold, some do not, and what a wrong one leaves behind would change everything after it.
A clock that stands still makes every row free, so that whatever is offered is drafted.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from torch import Tensor

from pdserve.config import PoolConfig
from pdserve.decode.drafting import PromptLookup
from pdserve.decode.speculation import Speculation
from pdserve.decode.streams import Streams
from pdserve.engine.blocks import blocks_for
from pdserve.engine.loop import EngineLoop, StepTime
from pdserve.errors import ConfigError
from pdserve.ids import RequestId
from pdserve.lifecycle import Phase
from pdserve.messages import Preempt, Request, Sampling, Token
from pdserve.model.ops import LayersTold
from pdserve.model.runner import Run
from tests.unit.engine.fakes import BLOCK_TOKENS
from tests.unit.engine.rig import SAMPLINGS, Rig, plain, prompt, request

HABIT = 3.0
CIRCLE = (3, 4, 1, 0)  # what the model likes best
RUNS = [
    *(pytest.param(sampling, id=name) for name, sampling in SAMPLINGS.items()),
    pytest.param(Sampling(temperature=0.0, logprobs=3), id="logprobs"),
    pytest.param(Sampling(temperature=0.0, frequency_penalty=0.3), id="frequency"),
    pytest.param(
        Sampling(temperature=0.7, logprobs=1, logit_bias=((3, -2.0), (8, 1.0))), id="bias"
    ),
]
samplings = pytest.mark.parametrize("sampling", RUNS)


def rig_of(*, drafts: bool) -> Rig:
    return Rig(habit=HABIT, speculation="prompt_lookup" if drafts else "off", clock=lambda: 0)


def answer(asked: Request, *, drafts: bool) -> Rig:
    rig = rig_of(drafts=drafts)
    rig.prefill(blocks=120)
    rig.decode(blocks=120)
    rig.send(asked)
    rig.run()
    rig.check_idle()
    return rig


def said(rig: Rig, name: str = "r") -> list[Token]:
    return [token for delta in rig.deltas[RequestId(name)] for token in delta.tokens]


def counters(rig: Rig, worker: str = "d0") -> dict[str, int]:
    return dict(rig.worker(worker).load().counters)


# ── the same tokens ──────────────────────────────────────────────────────────────────────────────


@samplings
@pytest.mark.parametrize("length", [1, 4, 11])
def test_the_same_tokens_and_logprobs_in_fewer_steps(sampling: Sampling, length: int) -> None:
    asked = request(tokens=prompt(length), sampling=sampling, max_tokens=80)
    without, with_drafts = (answer(asked, drafts=drafts) for drafts in (False, True))
    assert said(with_drafts) == said(without)
    assert with_drafts.tokens() == plain(asked, habit=HABIT)
    counted = counters(with_drafts)
    assert counted["tokens_generated"] == 79
    assert counted["steps"] + counted["tokens_accepted"] == 79
    assert counters(without)["tokens_drafted"] == 0


def test_drafts_are_accepted_where_a_text_repeats_itself() -> None:
    counted = counters(answer(request(max_tokens=80), drafts=True))
    assert 20 < counted["tokens_accepted"] < counted["tokens_drafted"]
    assert counted["steps"] < 60


def test_a_step_says_its_tokens_at_once_and_timing_with_the_last() -> None:
    rig = answer(request(max_tokens=80), drafts=True)
    deltas = rig.deltas[RequestId("r")]
    assert max(len(delta.tokens) for delta in deltas) > 1
    assert [delta.timing is not None for delta in deltas].count(True) == 2
    assert deltas[-1].finish is not None


# ── endings ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("max_tokens", range(1, 40))
def test_the_last_token_is_where_it_was(max_tokens: int) -> None:
    asked = request(max_tokens=max_tokens)
    rig = answer(asked, drafts=True)
    assert rig.tokens() == plain(asked, habit=HABIT)
    # Beyond the last token nothing is computed: KV is there for all before it at the most.
    counted = counters(rig)
    drafted, accepted = counted.get("tokens_drafted", 0), counted.get("tokens_accepted", 0)
    computed = rig.runners["d0"].computed_tokens - (drafted - accepted)
    assert computed == len(rig.tokens()) - 1


@samplings
@pytest.mark.parametrize("place", range(12, 60, 7))
@pytest.mark.parametrize("kind", ["token", "string", "late token"])
def test_nothing_is_said_after_a_stop(sampling: Sampling, place: int, kind: str) -> None:
    """The stop is what plain decoding says at some place, drafted or not; with ``min_tokens`` it
    is forbidden for some more."""
    asked = request(sampling=sampling, max_tokens=80)
    tokens = plain(asked, habit=HABIT)
    letters = "".join(chr(ord("a") + token) for token in tokens)
    stop = {
        "token": replace(asked.stop, token_ids=(tokens[place],), min_tokens=5),
        "late token": replace(asked.stop, token_ids=(tokens[place],), min_tokens=place),
        "string": replace(asked.stop, strings=(letters[place : place + 3],)),
    }[kind]
    asked = replace(asked, stop=stop)
    without, with_drafts = (answer(asked, drafts=drafts) for drafts in (False, True))
    assert said(with_drafts) == said(without)
    assert with_drafts.deltas[RequestId("r")][-1].finish == without.finish()
    assert (
        with_drafts.deltas[RequestId("r")][-1].stop_reason
        == without.deltas[RequestId("r")][-1].stop_reason
    )


@samplings
@pytest.mark.parametrize("stop", range(5))
@pytest.mark.parametrize("kind", ["token", "string"])
def test_a_stop_among_drafts_that_hold_ends_it_there(
    sampling: Sampling, stop: int, kind: str
) -> None:
    """The prompt goes round and round, and so the drafts have the stop in them."""
    asked = request(tokens=CIRCLE * 4, sampling=sampling, max_tokens=80)
    token, then = stop, (7 * stop + 3) % 5
    letters = chr(ord("a") + token) + chr(ord("a") + then)
    stops = {
        "token": replace(asked.stop, token_ids=(token,), min_tokens=6),
        "string": replace(asked.stop, strings=(letters,)),
    }
    asked = replace(asked, stop=stops[kind])
    without, with_drafts = (answer(asked, drafts=drafts) for drafts in (False, True))
    assert said(with_drafts) == said(without)
    assert with_drafts.finish() == without.finish()


def test_the_context_ends_no_sooner_and_no_later() -> None:
    asked = request(tokens=prompt(340), max_tokens=1000)  # of a context of 400
    with_drafts = answer(asked, drafts=True)
    assert len(with_drafts.tokens()) == 60
    assert with_drafts.tokens() == answer(asked, drafts=False).tokens()


def test_no_draft_stands_beyond_the_last_token() -> None:
    """Five in a step at the most, and fewer where fewer are left."""
    asked = request(max_tokens=80)
    rig = rig_of(drafts=True)
    loop = rig.decode()
    rig.send(asked, prefill="d0", decode="d0")
    while loop.busy():
        left = asked.stop.max_tokens - len(rig.tokens())
        rig.runners["d0"].steps.clear()
        rig.step(loop)
        if rig.tokens() and rig.runners["d0"].steps and left < asked.stop.max_tokens:
            assert rig.runners["d0"].computed_tokens <= min(5, left)
    assert len(rig.tokens()) == 80


# ── room ─────────────────────────────────────────────────────────────────────────────────────────


def kept_alone(*, blocks: int, names: int, drafts: bool, max_tokens: int = 40) -> Rig:
    """``names`` requests on one worker that does both and has so many blocks."""
    rig = rig_of(drafts=drafts)
    rig.decode(blocks=blocks)
    rig.resume_on = "d0"
    for index in range(names):
        rig.send(asked_of(index, max_tokens), prefill="d0", decode="d0")
    rig.run()
    rig.check_idle()
    return rig


def asked_of(index: int, max_tokens: int) -> Request:
    return request(
        f"r{index}",
        prompt(6, salt=index),
        sampling=list(SAMPLINGS.values())[index % 3],
        max_tokens=max_tokens,
        choice=index,
    )


def test_drafts_have_nobody_parked() -> None:
    """Three of 46 tokens each and blocks for just these."""
    rig = kept_alone(blocks=3 * 12, names=3, drafts=True)
    assert counters(rig)["tokens_accepted"] > 0
    assert counters(rig).get("parked", 0) == 0
    for index in range(3):
        assert rig.tokens(f"r{index}") == plain(asked_of(index, 40), habit=HABIT)


def test_without_a_block_to_spare_drafts_keep_to_those_they_have() -> None:
    """One stream and its last block: 11 blocks hold 44 tokens, of which KV for 43 is written."""
    rig = kept_alone(blocks=11, names=1, drafts=True, max_tokens=38)
    assert counters(rig)["tokens_accepted"] > 0
    assert rig.tokens("r0") == plain(asked_of(0, 38), habit=HABIT)


@pytest.mark.parametrize("blocks", range(14, 30, 3))
def test_parked_in_mid_answer_and_resumed_it_goes_on_the_same(blocks: int) -> None:
    rig = kept_alone(blocks=blocks, names=4, drafts=True)
    assert counters(rig)["parked"] >= 1
    assert counters(rig)["tokens_accepted"] > 0
    for index in range(4):
        assert rig.tokens(f"r{index}") == plain(asked_of(index, 40), habit=HABIT)


@pytest.mark.parametrize("blocks", range(20, 40, 2))
def test_a_draft_takes_a_block_only_if_everybody_finds_one_in_the_next_step(blocks: int) -> None:
    """Four streams in phase, which want their blocks at the same time; while the last prompts are
    computed, they count already."""
    rig = rig_of(drafts=True)
    loop = rig.decode(blocks=blocks)
    rig.resume_on = "d0"
    runner = rig.runners["d0"]
    compute, held, early = runner.step, Counter[int](), 0

    def step(
        runs: Sequence[Run], drawn_R: Tensor | None = None, told: LayersTold | None = None
    ) -> Tensor:
        nonlocal early
        for run in runs:
            first, needed = run.blocks[0], blocks_for(run.start + 1, BLOCK_TOKENS)
            if run.draft_count and len(run.blocks) > max(needed, held[first]):
                early += 1
                assert loop.pool.free_count >= len(runs)
            held[first] = len(run.blocks)
        return compute(runs, drawn_R, told)

    runner.step = step  # type: ignore[method-assign]
    asked = [
        request(f"r{index}", (5 + index, *CIRCLE * 2), max_tokens=40, choice=index)
        for index in range(4)
    ]
    for one in asked:
        rig.send(one, prefill="d0", decode="d0")
    rig.run()
    rig.check_idle()
    for one in asked:
        assert rig.tokens(one.request) == plain(one, habit=HABIT)
    assert early > 0


@pytest.mark.parametrize("before", range(2, 30, 3))
def test_preempted_after_any_step_another_worker_goes_on(before: int) -> None:
    rig = rig_of(drafts=True)
    rig.prefill()
    first = rig.decode("d0")
    rig.decode("d1")
    rig.resume_on = "d1"
    asked = request(sampling=SAMPLINGS["seeded"], max_tokens=60)
    rig.send(asked)
    rig.run_prefills()
    for _ in range(before):
        rig.step(first)
    first.handle(Preempt(asked.request, asked.attempt, Phase.DECODING))
    rig.run()
    assert rig.tokens() == plain(asked, habit=HABIT)
    rig.check_idle()


def test_beside_a_prompts_chunks_it_holds_too() -> None:
    rig = rig_of(drafts=True)
    loop = rig.decode()
    asked = request(max_tokens=80)
    rig.send(asked, prefill="d0", decode="d0")
    while len(rig.tokens()) < 30:
        rig.step(loop)
    late = request("late", prompt(60, salt=4), sampling=SAMPLINGS["penalties"], max_tokens=30)
    rig.runners["d0"].steps.clear()
    rig.send(late, prefill="d0", decode="d0")
    rig.run()
    assert any(step[0] > 1 and len(step) == 2 for step in rig.runners["d0"].steps)
    assert rig.tokens() == plain(asked, habit=HABIT)
    assert rig.tokens("late") == plain(late, habit=HABIT)
    rig.check_idle()


def test_a_step_that_a_prompt_shared_says_nothing_about_rows() -> None:
    speculation = Speculation(PromptLookup, 4)
    streams = Streams(rig_of(drafts=False).decode()._workplace, speculation)
    for shared in (True, False):
        assert speculation._times.estimate()(1) is None
        streams._on_step([], [Token(1)], StepTime(100, shared=shared))
    assert speculation._times.estimate()(1) == 100


# ── nobody sees what a wrong draft left ──────────────────────────────────────────────────────────


def watched(loop: EngineLoop, asked: Request, rig: Rig) -> Callable[[], None]:
    """Checks that KV counts for the tokens that are sent, and for no draft."""

    def check() -> None:
        for stream in loop._streams._streams.values():  # type: ignore[attr-defined]
            sequence = stream.sequence
            assert sequence.kv_count == len(sequence.tokens) - 1
            sent = (*asked.tokens, *rig.tokens())
            assert tuple(sequence.tokens) == sent
            published = loop.pool.published(sequence.keys(sequence.full_blocks + 1))
            assert published <= sequence.full_blocks

    return check


def test_kv_counts_for_tokens_that_were_sent_and_for_no_draft() -> None:
    rig = rig_of(drafts=True)
    loop = rig.decode()
    asked = request(max_tokens=80)
    rig.send(asked, prefill="d0", decode="d0")
    check = watched(loop, asked, rig)
    while loop.busy():
        rig.step(loop)
        if rig.tokens():
            check()
    assert counters(rig)["tokens_drafted"] > counters(rig)["tokens_accepted"] > 0


def test_the_next_turn_finds_blocks_that_are_right() -> None:
    rig = rig_of(drafts=True)
    rig.decode()
    first = request("first", max_tokens=60)
    rig.send(first, prefill="d0", decode="d0")
    rig.run()
    turn = request("turn", (*first.tokens, *rig.tokens("first"), 4, 9), max_tokens=30)
    rig.send(turn, prefill="d0", decode="d0")
    rig.run()
    assert counters(rig)["prompt_tokens_cached_device"] >= 64
    assert rig.tokens("turn") == plain(turn, habit=HABIT)


# ── settings ─────────────────────────────────────────────────────────────────────────────────────


def test_no_drafts_at_all_is_said_by_turning_it_off() -> None:
    with pytest.raises(ConfigError, match="draft_tokens_max is 0, must be positive"):
        PoolConfig(speculation="prompt_lookup", draft_tokens_max=0)
