"""Beam search on whole workers: the answers of a plain search, and every block back.

The fake model's logits are a hash of all KV as it lies in the pool, so a block that two beams share
and one of them writes to changes every answer after it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from pdserve.engine.outputs import GiveUp
from pdserve.ids import BlockId, RequestId
from pdserve.lifecycle import Event, Phase
from pdserve.messages import (
    Cancel,
    FinishReason,
    Preempt,
    Progress,
    Request,
    WorkerFailed,
)
from pdserve.model.runner import Run
from tests.unit.engine.beam_searches import answers, deltas, expected, search
from tests.unit.engine.fakes import BLOCK_TOKENS, EOS, FakeRunner
from tests.unit.engine.rig import Rig, prompt, request


def assert_answered(rig: Rig, asked: Request) -> None:
    wanted = expected(asked)
    assert answers(rig, asked.request) == [answer.tokens for answer in wanted]
    assert [delta.finish for delta in deltas(rig, asked.request)] == [
        FinishReason.STOP
        if answer.tokens[-1] == EOS and not asked.stop.ignore_eos
        else FinishReason.LENGTH
        for answer in wanted
    ]


def served(*asked: Request, decode: str = "d0", blocks: int = 100) -> Rig:
    """On ``d0`` alone, or prefilled on ``p0`` and handed over to it."""
    rig = Rig()
    rig.prefill()
    rig.decode(blocks=blocks)
    for one in asked:
        rig.send(one, prefill="p0" if decode == "d0" else "d0")
    rig.run()
    rig.check_idle()
    return rig


@pytest.mark.parametrize("length", [1, 4, 10])
@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("where", ["d0", "aggregated"])
def test_the_answers_are_those_of_a_plain_search(length: int, width: int, where: str) -> None:
    asked = search(tokens=prompt(length), width=width, max_tokens=14)
    assert_answered(served(asked, decode=where), asked)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 3.0])
def test_the_length_penalty_is_heeded(length_penalty: float) -> None:
    asked = search(width=4, n=3, max_tokens=30, length_penalty=length_penalty)
    rig = served(asked)
    assert_answered(rig, asked)
    assert len(answers(rig)) == 3


def test_a_search_stops_when_nothing_better_can_come() -> None:
    asked = search(width=3, max_tokens=300, length_penalty=0.0)
    assert len(served(asked).runners["d0"].steps) < 100


def test_several_searches_and_plain_streams_share_steps() -> None:
    asked = [search(f"b{i}", prompt(7 + i, salt=i % 2), width=2 + i) for i in range(3)]
    others = [request(f"r{i}", prompt(9, salt=i), max_tokens=15) for i in range(2)]
    rig = served(*asked, *others)
    for one in asked:
        assert_answered(rig, one)
    alone = served(*others)
    for other in others:
        assert rig.tokens(other.request) == alone.tokens(other.request)
    assert max(len(step) for step in rig.runners["d0"].steps) >= 2 + 3 + 4 + 1


def test_beams_share_their_prompt_s_blocks() -> None:
    """Ten full blocks of prompt and five beams: the steps never hold half of what five copies
    would."""
    asked = search(tokens=prompt(41), width=5, max_tokens=8, ignore_eos=True)
    rig = Rig()
    rig.prefill()
    decode = rig.decode(blocks=100)
    rig.send(asked)
    least = 100
    for _ in range(100):
        rig.run_prefills()
        rig.step(decode)
        decode.pool.check()
        least = min(least, decode.pool.free_count)
    assert len(answers(rig)) == 5
    assert 100 - least <= 10 + 1 + 5 * 3  # the root's tail; two blocks of each beam, one to come
    rig.check_idle()


def test_a_block_written_by_two_beams_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake model would answer otherwise if tails were shared and not copied."""
    asked = search(width=4, max_tokens=14)
    monkeypatch.setattr(
        "tests.unit.engine.fakes.FakePool.copy_block", lambda pool, source, target: None
    )
    assert answers(served(asked)) != [answer.tokens for answer in expected(asked)]


def test_no_step_writes_to_a_block_that_is_shared_or_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig()
    rig.prefill()
    decode = rig.decode()
    written = 0
    step = FakeRunner.step

    def watched(runner: FakeRunner, runs: Sequence[Run], *rest: Any) -> Tensor:
        nonlocal written
        if runner is rig.runners["d0"]:
            for run in runs:
                block = BlockId(run.blocks[run.start // BLOCK_TOKENS])
                assert decode.pool._holders[block] == 1
                assert block not in decode.pool._key_of
                written += 1
        return step(runner, runs, *rest)

    monkeypatch.setattr(FakeRunner, "step", watched)
    for index in range(2):
        rig.send(search(f"b{index}", prompt(9 + index), width=4, ignore_eos=True))
    rig.run()
    assert written == 2 * 4 * 11


# ── what it is told ──────────────────────────────────────────────────────────────────────────────


def test_a_stop_string_ends_the_answers_that_say_it() -> None:
    free = answers(served(search(width=3, max_tokens=10, ignore_eos=True)))
    text = "".join(chr(ord("a") + token) for token in free[0])
    asked = search(width=3, max_tokens=10, ignore_eos=True, length_penalty=0.0)
    asked = replace(asked, stop=replace(asked.stop, strings=(text[2:4],)))
    rig = served(asked)
    assert answers(rig)[0] == free[0][:4]
    first = deltas(rig)[0]
    assert (first.finish, first.stop_reason) == (FinishReason.STOP, text[2:4])


def test_a_stop_token_is_the_reason() -> None:
    (free,) = answers(served(search(n=1, max_tokens=10, ignore_eos=True)))
    asked = search(max_tokens=10, ignore_eos=True, length_penalty=0.0)
    asked = replace(asked, stop=replace(asked.stop, token_ids=(free[3],)))
    rig = served(asked)
    assert answers(rig) == [answer.tokens for answer in expected(asked)]
    assert (deltas(rig)[0].finish, deltas(rig)[0].stop_reason) == (FinishReason.STOP, free[3])


def test_no_answer_is_shorter_than_min_tokens() -> None:
    asked = search(width=4, max_tokens=12, length_penalty=-3.0)
    assert min(map(len, answers(served(asked)))) < 6
    late = replace(asked, stop=replace(asked.stop, min_tokens=5))
    lengths = [len(tokens) for tokens in answers(served(late))]
    assert min(lengths) == 6, "five tokens and the end of sequence"


def test_bias_and_penalties_change_what_is_searched() -> None:
    banned = answers(served(search()))[0][0]
    rig = served(search(logit_bias=((banned, -100.0),)))
    assert all(banned not in tokens for tokens in answers(rig))
    free = answers(served(search(max_tokens=20)))
    assert answers(served(search(max_tokens=20, no_repeat_ngram_size=1))) != free


def test_logprobs_add_up_to_the_score() -> None:
    asked = search(width=4, max_tokens=9, logprobs=2)
    rig = served(asked)
    for delta, answer in zip(deltas(rig), expected(asked), strict=True):
        logprobs = [token.logprob for token in delta.tokens if token.logprob]
        assert sum(logprob.logprob for logprob in logprobs) == pytest.approx(answer.logprob)
        assert [len(logprob.top) for logprob in logprobs] == [2] * len(delta.tokens)
    assert all(token.logprob is None for token in deltas(served(search()))[0].tokens)


def test_more_logprobs_than_candidates_change_no_answer() -> None:
    assert answers(served(search(width=2, logprobs=20))) == answers(served(search(width=2)))


def test_one_token_needs_no_step_at_decode() -> None:
    asked = search(width=3, max_tokens=1)
    rig = served(asked)
    assert_answered(rig, asked)
    assert rig.runners["d0"].steps == []


def test_more_answers_than_exist_are_refused() -> None:
    asked = search(width=5, n=5, max_tokens=1)
    forbidden = tuple(range(23))
    asked = replace(asked, stop=replace(asked.stop, min_tokens=1, token_ids=forbidden))
    (delta,) = deltas(served(asked))
    assert delta.finish is FinishReason.ERROR
    assert delta.error is not None
    assert "only 2 answers exist" in delta.error.message


def test_the_router_learns_how_long_the_answers_were() -> None:
    rig = served(search(max_tokens=9, ignore_eos=True))
    ended = [m for m in rig.told(Progress) if m.event is Event.ENDED]  # type: ignore[attr-defined]
    assert [message.total_tokens for message in ended] == [10 + 9]  # type: ignore[attr-defined]


# ── leaving ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("steps", range(0, 12, 2))
@pytest.mark.parametrize("how", ["cancel", "give up"])
def test_leaving_after_any_step_frees_every_block(steps: int, how: str) -> None:
    rig = Rig()
    rig.prefill()
    decode = rig.decode()
    rig.send(search(width=4, max_tokens=40, ignore_eos=True))
    rig.run_prefills()
    for _ in range(steps):
        rig.step(decode)
    decode.handle(Cancel(RequestId("r")) if how == "cancel" else GiveUp())
    rig.run()
    assert deltas(rig) == []
    rig.check_idle()


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_a_parked_search_begins_again_elsewhere_and_answers_the_same(steps: int) -> None:
    asked = search(width=4, max_tokens=14)
    rig = Rig()
    rig.prefill()
    first = rig.decode("d0")
    rig.send(asked)
    rig.run_prefills()
    for _ in range(steps):
        rig.step(first)
    first.drain()
    rig.decode("d1")
    rig.resume_on = "d1"
    rig.run()
    assert_answered(rig, asked)
    assert first.load().counters["parked"] == 1
    rig.check_idle()


def test_short_of_blocks_the_later_search_is_parked_and_the_earlier_goes_on() -> None:
    asked = [
        search(f"b{i}", prompt(8, salt=i), width=6, max_tokens=24, ignore_eos=True)
        for i in range(2)
    ]
    rig = Rig()
    rig.prefill()
    rig.decode(blocks=26)
    rig.resume_on = "d0"
    for one in asked:
        rig.send(one)
    rig.run()
    assert rig.decodes["d0"].load().counters["parked"] > 0
    for one in asked:
        assert_answered(rig, one)
    rig.check_idle()


def test_a_search_that_outgrows_the_pool_is_an_error_and_not_another_attempt() -> None:
    asked = search(width=4, max_tokens=60, ignore_eos=True)
    rig = served(asked, blocks=20)
    (delta,) = deltas(rig)
    assert delta.error is not None
    assert delta.error.kind == "out_of_blocks"
    assert rig.told(WorkerFailed) == []


def test_a_search_is_not_parked_for_others() -> None:
    asked = search(width=3, max_tokens=14)
    rig = Rig()
    rig.prefill()
    decode = rig.decode()
    rig.send(asked)
    rig.run_prefills()
    for _ in range(4):
        rig.step(decode)
    decode.handle(Preempt(asked.request, 0, Phase.DECODING))
    rig.run()
    assert "parked" not in decode.load().counters
    assert_answered(rig, asked)


def test_a_search_counts_as_many_sequences_as_it_is_wide() -> None:
    rig = Rig()
    rig.prefill()
    decode = rig.decode(running_max=4)
    rig.send(request("first", prompt(5), max_tokens=6))
    rig.send(search("wide", width=4, max_tokens=8, ignore_eos=True))
    rig.send(request("last", prompt(7), max_tokens=6))
    rig.run_prefills()
    rig.step(decode)
    assert (decode.load().running, decode.load().waiting) == (1, 4 + 1)
    rig.run()
    assert max(len(step) for step in rig.runners["d0"].steps) == 4
    rig.check_idle()


def test_a_search_waits_until_each_beam_finds_a_block() -> None:
    """Beside the first, which grows, seven blocks are left: enough for its prompt, not for it."""
    rig = Rig()
    rig.prefill()
    decode = rig.decode(blocks=10)
    rig.send(request("first", prompt(9), max_tokens=8))
    asked = search("wide", prompt(8, salt=1), width=4, max_tokens=4)
    rig.send(asked)
    rig.run_prefills()
    rig.step(decode)
    assert (decode.load().running, decode.load().waiting) == (1, 4)
    rig.run()
    assert_answered(rig, asked)
    rig.check_idle()


def test_a_search_wider_than_the_worker_runs_alone() -> None:
    asked = search(width=5, max_tokens=8)
    rig = Rig()
    rig.prefill()
    rig.decode(running_max=2)
    rig.send(asked)
    rig.run()
    assert_answered(rig, asked)


def test_a_search_is_not_drafted_for() -> None:
    asked = search(tokens=(3, 4, 1, 0) * 4, width=3)
    rig = Rig(speculation="prompt_lookup", clock=lambda: 0)
    rig.prefill()
    rig.decode()
    rig.send(asked)
    rig.run()
    assert_answered(rig, asked)
    assert "tokens_drafted" not in rig.decodes["d0"].load().counters
