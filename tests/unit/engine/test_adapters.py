"""Requests of adapters: on their whole way with their own matrices and their own blocks."""

import pytest

from pdserve.ids import RequestId
from pdserve.lifecycle import Phase
from pdserve.messages import ChunkDone, FinishReason, Preempt, Request
from tests.unit.engine.fakes import ADAPTERS
from tests.unit.engine.rig import Rig, plain, prompt, request

MODELS = ("", *ADAPTERS)


def of_every_model(length: int = 14, *, max_tokens: int = 12) -> list[Request]:
    """The same prompt for each."""
    return [
        request(f"r{index}", prompt(length), adapter=adapter, max_tokens=max_tokens)
        for index, adapter in enumerate(MODELS)
    ]


def assert_all_answered(rig: Rig, asked: list[Request]) -> None:
    assert len({plain(one) for one in asked}) == len(MODELS)
    for one in asked:
        assert rig.tokens(one.request) == plain(one)
    rig.check_idle()


@pytest.mark.parametrize(("prefill", "decode"), [("p0", "d0"), ("d0", "d0")])
@pytest.mark.parametrize("speculation", ["off", "prompt_lookup"])
def test_one_prompt_for_every_model_is_answered_by_each(
    prefill: str, decode: str, speculation: str
) -> None:
    """Apart and in one worker; together in the steps of either."""
    rig = Rig(speculation="prompt_lookup" if speculation == "prompt_lookup" else "off")
    rig.prefill(chunk_tokens=64)
    rig.decode(chunk_tokens=64)
    asked = of_every_model()
    for one in asked:
        rig.send(one, prefill=prefill, decode=decode)
    rig.run()
    assert_all_answered(rig, asked)


@pytest.mark.parametrize("one_host", [True, False])
def test_a_prefix_is_found_by_its_own_model_alone(one_host: bool) -> None:
    """In a worker's pool, and by another worker in the store."""
    rig = Rig(one_host=one_host)
    for name in ("p0", "p1"):
        rig.prefill(name)
    rig.decode()
    for one in of_every_model(20, max_tokens=1):
        rig.send(one)
        rig.run()
    assert rig.runners["p0"].computed_tokens == len(MODELS) * 20

    again = [
        request(f"s{one.request}", one.tokens, adapter=one.adapter) for one in of_every_model(20)
    ]
    for index, one in enumerate(again):
        rig.send(one, prefill=f"p{index % 2}")
        rig.run()
    found = {name: rig.prefills[name].load().counters for name in ("p0", "p1")}
    assert found["p0"]["prompt_tokens_cached_device"] == 2 * 16
    assert found["p1"]["prompt_tokens_cached_store"] == 16
    for one in again:
        assert rig.tokens(one.request) == plain(one)
    rig.check_idle()


def test_preempted_parked_and_resumed_it_keeps_its_adapter() -> None:
    rig = Rig()
    first = rig.prefill("p0")
    rig.prefill("p1")
    decode, other = rig.decode("d0"), rig.decode("d1")
    asked = of_every_model(30)
    for one in asked:
        rig.send(one)
    while len(rig.told(ChunkDone)) < 2:
        rig.step(first)
    for one in asked:
        first.handle(Preempt(one.request, one.attempt, Phase.PREFILLING))
    rig.run()
    assert rig.deltas == {}

    for one in asked:
        rig.send(one, prefill="p1")
    while any(len(rig.tokens(one.request)) < 3 for one in asked):
        for loop in (rig.prefills["p1"], decode):
            rig.step(loop)
    decode.drain()
    rig.resume_on = "d1"
    rig.run()
    assert other.load().counters["resumed"] == len(MODELS)
    assert_all_answered(rig, asked)


def test_a_second_attempt_keeps_it_too() -> None:
    rig = Rig()
    rig.prefill()
    rig.decode()
    expected = plain(request(adapter="bb"))
    again = request(tokens=prompt(10) + expected[:6], prompt_tokens=10, attempt=1, adapter="bb")
    rig.send(again)
    rig.run()
    assert tuple(t.token for d in rig.deltas[again.request] for t in d.tokens) == expected[6:]


@pytest.mark.parametrize("lacks_it", ["p0", "d0"])
def test_a_worker_without_the_adapter_says_so_and_keeps_nothing(lacks_it: str) -> None:
    rig = Rig(lacking=lacks_it)
    rig.prefill()
    rig.decode()
    asked = of_every_model()
    for one in asked:
        rig.send(one)
    rig.run()

    assert rig.tokens("r0") == plain(asked[0])
    for one in asked[1:]:
        last = rig.deltas[RequestId(one.request)][-1]
        assert last.finish is FinishReason.ERROR
        assert last.error is not None
        assert last.error.kind == "adapter_missing"
        assert f"{lacks_it} has not loaded the adapter 'fake-adapter'" in last.error.message
        assert f"(digest {one.adapter})" in last.error.message
        assert rig.events(one.request)[-1] == "ended"
    rig.check_idle()


@pytest.mark.parametrize("model", ["", "bb"])
def test_what_an_adapter_has_written_is_found_by_its_own_next_turn_alone(model: str) -> None:
    """From a prompt of less than a block: every key of the answer is the worker's own making."""
    rig = Rig(one_host=True)
    rig.prefill("p0")
    rig.decode()
    rig.send(request(tokens=prompt(2), max_tokens=12, adapter="bb"))
    rig.run()
    later = request("next", prompt(2) + rig.tokens(), adapter=model)
    rig.prefill("p1")  # another worker: nothing in its own pool
    rig.send(later, prefill="p1")
    rig.run()
    assert rig.tokens("next") == plain(later)
    assert rig.runners["p1"].computed_tokens == (14 if model == "" else 2)
    rig.check_idle()
