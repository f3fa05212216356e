"""Prefill and decode together answer as one loop would, whatever happens on the way."""

import pytest

from pdserve.ids import RequestId
from pdserve.lifecycle import Phase
from pdserve.messages import ChunkDone, FinishReason, Preempt, Sampling
from tests.unit.engine.rig import SAMPLINGS, Rig, plain, prompt, request

samplings = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())


@samplings
@pytest.mark.parametrize("one_host", [True, False])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 17, 40])
def test_tokens_are_those_of_a_single_loop(sampling: Sampling, one_host: bool, length: int) -> None:
    rig = Rig(one_host=one_host)
    rig.prefill()
    rig.decode()
    asked = request(tokens=prompt(length), sampling=sampling, max_tokens=15)
    rig.send(asked)
    rig.run()
    assert rig.tokens() == plain(asked)
    assert rig.finish() is FinishReason.LENGTH
    assert rig.events() == ["prefill_done", "adopted", "ended"]
    rig.check_idle()


@samplings
def test_a_request_answers_the_same_in_company(sampling: Sampling) -> None:
    rig = Rig()
    rig.prefill(chunk_tokens=12)
    rig.decode(running_max=5)
    asked = [
        request(f"r{i}", prompt(3 + 4 * i, salt=i), sampling=sampling, max_tokens=4 + i)
        for i in range(8)
    ]
    for one in asked:
        rig.send(one)
    rig.run()
    for one in asked:
        assert rig.tokens(one.request) == plain(one)
    rig.check_idle()


def test_prefill_generates_one_token_and_decode_computes_no_prompt() -> None:
    rig = Rig()
    prefill, decode = rig.prefill(), rig.decode()
    rig.send(request(tokens=prompt(23), max_tokens=9))
    rig.run()
    prefilled, decoded = prefill.load().counters, decode.load().counters
    assert prefilled["prompt_tokens_computed"] == 23
    assert prefilled["tokens_generated"] == 1
    assert decoded.get("prompt_tokens_computed", 0) == 0
    assert decoded["tokens_generated"] == 8


@samplings
def test_a_preempted_prefill_resumes_elsewhere_and_computes_each_token_once(
    sampling: Sampling,
) -> None:
    rig = Rig()
    first, second = rig.prefill("p0"), rig.prefill("p1")
    rig.decode()
    asked = request(tokens=prompt(30), sampling=sampling)
    rig.send(asked)
    while len(rig.told(ChunkDone)) < 2:
        rig.step(first)
    first.handle(Preempt(asked.request, asked.attempt, Phase.PREFILLING))
    rig.run()
    assert rig.events() == ["preempted"]
    rig.check_idle()

    rig.send(asked, prefill="p1")
    rig.run()
    assert rig.tokens() == plain(asked)
    assert rig.runners["p0"].computed_tokens == 16
    assert rig.runners["p1"].computed_tokens == 14
    assert first.load().counters["preempted"] == 1
    assert second.load().counters["prompt_tokens_cached_store"] == 16
    rig.check_idle()


@samplings
@pytest.mark.parametrize("steps", [1, 3, 4, 9])
def test_a_parked_stream_goes_on_elsewhere(sampling: Sampling, steps: int) -> None:
    rig = Rig()
    rig.prefill()
    decode, other = rig.decode("d0"), rig.decode("d1")
    asked = request(tokens=prompt(14), sampling=sampling, max_tokens=20)
    rig.send(asked)
    while len(rig.tokens()) < steps:
        for loop in (rig.prefills["p0"], decode):
            rig.step(loop)
    decode.drain()
    rig.resume_on = "d1"
    rig.run()
    assert rig.tokens() == plain(asked)
    assert decode.load().counters["parked"] == 1
    assert other.load().counters["resumed"] == 1
    timing = rig.deltas[RequestId("r")][-1].timing
    assert timing is not None
    assert timing.parked_count == 1
    rig.check_idle()


def test_a_second_attempt_continues_where_the_first_was_lost() -> None:
    rig = Rig()
    rig.prefill()
    rig.decode()
    asked = request(tokens=prompt(10), sampling=SAMPLINGS["seeded"], max_tokens=14)
    expected = plain(asked)
    again = request(
        tokens=prompt(10) + expected[:6],
        prompt_tokens=10,
        attempt=1,
        sampling=SAMPLINGS["seeded"],
        max_tokens=14,
    )
    rig.send(again)
    rig.run()
    deltas = rig.deltas[again.request]
    assert deltas[0].offset == 6
    assert tuple(t.token for delta in deltas for t in delta.tokens) == expected[6:]
    rig.check_idle()


def test_the_choices_of_one_call_share_their_prompt() -> None:
    """Arrived together, they compute the prompt's full blocks once and hold them once."""
    rig = Rig()
    prefill, decode = rig.prefill(chunk_tokens=64), rig.decode()
    asked = [
        request(f"r{i}", prompt(18), choice=i, sampling=SAMPLINGS["seeded"], max_tokens=3)
        for i in range(4)
    ]
    for one in asked:
        rig.send(one)
    rig.run()
    assert rig.runners["p0"].computed_tokens == 18 + 3 * 2
    assert {rig.tokens(one.request) for one in asked} == {plain(one) for one in asked}
    assert prefill.load().counters["prompt_tokens_cached_device"] == 3 * 16
    assert rig.d_store.counters["blocks_restored"] == 4 + 4  # the prompt once, four tails
    assert decode.load().counters["tokens_generated"] == 4 * 2
    rig.check_idle()


def test_what_decode_generated_is_found_by_the_next_turn() -> None:
    rig = Rig(one_host=True)
    rig.prefill("p0")
    rig.decode()
    asked = request(tokens=prompt(10), max_tokens=12)
    rig.send(asked)
    rig.run()
    later = prompt(10) + rig.tokens() + prompt(5, salt=3)
    rig.prefill("p1")  # another worker: nothing in its own pool
    rig.send(request("next", later), prefill="p1")
    rig.run()
    assert rig.tokens("next") == plain(request("next", later))
    assert rig.runners["p1"].computed_tokens == len(later) - 20  # 21 tokens had KV: 5 full blocks
    rig.check_idle()
