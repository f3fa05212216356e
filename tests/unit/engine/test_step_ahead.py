"""Steps launched before the tokens of the one before are known here, on the latest of devices."""

import pytest

from pdserve.config import PoolConfig
from pdserve.engine import loop as loop_module
from pdserve.errors import ConfigError
from pdserve.messages import Cancel, FinishReason, Sampling, Token
from tests.unit.engine import rig as rig_module
from tests.unit.engine.fakes import ADAPTERS, BLOCK_TOKENS, FakeRunner
from tests.unit.engine.late_device import LateDrawn, LateRunner, wait_for
from tests.unit.engine.rig import GREEDY, SAMPLINGS, Rig, plain, prompt, request


@pytest.fixture(autouse=True)
def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig_module, "FakeRunner", LateRunner)
    monkeypatch.setattr(loop_module, "Drawn", LateDrawn)
    monkeypatch.setattr(loop_module, "wait_for", wait_for)


def ahead(*, blocks: int = 64) -> tuple[Rig, FakeRunner]:
    rig = Rig(step_ahead=True)
    rig.prefill()
    rig.decode(blocks=blocks)
    return rig, rig.runners["d0"]


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig, runner = ahead()
    order: list[str] = []

    class Watched(LateDrawn):
        def tokens(self) -> list[Token]:
            order.append("read")
            return super().tokens()

    def step(*arguments: object, plain_step: object = runner.step) -> object:
        order.append("launch")
        assert callable(plain_step)
        return plain_step(*arguments)

    monkeypatch.setattr(loop_module, "Drawn", Watched)
    monkeypatch.setattr(runner, "step", step)
    asked = request(max_tokens=6)
    rig.send(asked)
    rig.run()
    assert rig.tokens() == plain(asked)
    assert order == ["launch", "launch", *["read", "launch"] * 3, "read", "read"]
    assert runner.fed_steps == 4, "the first of five has its token from the hand-off"
    rig.check_idle()


def test_streams_of_different_lengths_leave_one_by_one() -> None:
    rig, runner = ahead()
    asked = [request(f"r{i}", prompt(5 + i, salt=i), max_tokens=4 + 3 * i) for i in range(4)]
    for one in asked:
        rig.send(one)
    rig.run_prefills()
    rig.run()
    for one in asked:
        assert rig.tokens(one.request) == plain(one)
    assert runner.computed_tokens == sum(one.stop.max_tokens - 1 for one in asked), "none in vain"
    rig.check_idle()


def test_adapters_stay_with_their_streams() -> None:
    rig, runner = ahead()
    asked = [
        request("base", prompt(7), max_tokens=8),
        request("one", prompt(7), max_tokens=9, adapter=ADAPTERS[0]),
        request("two", prompt(7), max_tokens=7, adapter=ADAPTERS[1]),
    ]
    for one in asked:
        rig.send(one)
    rig.run_prefills()
    rig.run()
    for one in asked:
        assert rig.tokens(one.request) == plain(one)
    assert len({tuple(plain(one)[:7]) for one in asked}) == len(asked)
    assert runner.fed_steps > 0
    rig.check_idle()


def test_who_ends_unforeseen_was_computed_one_token_too_far_and_nobody_sees_it() -> None:
    rig, runner = ahead()
    whole = plain(request(max_tokens=12))
    asked = request(max_tokens=12, stop_token_ids=(whole[5],))
    rig.send(asked)
    rig.run()
    count = whole.index(whole[5]) + 1
    assert rig.tokens() == whole[:count]
    assert rig.finish() is FinishReason.STOP
    assert runner.computed_tokens == count, "one less for the first token, one more in vain"
    assert rig.worker("d0").load().counters["tokens_generated"] == count - 1
    rig.check_idle()


def test_what_was_computed_in_vain_harms_nobody_who_has_its_block_by_then() -> None:
    """Room for one: the second stream gets the blocks of the first while a step of the first, which
    has ended, is still to write into one of them."""
    rig, runner = ahead(blocks=6)
    whole = plain(request("r0", prompt(6), max_tokens=12))
    first = request("r0", prompt(6), max_tokens=12, stop_token_ids=(whole[4],))
    second = request("r1", prompt(5 * BLOCK_TOKENS, salt=1), max_tokens=4)
    for one in (first, second):
        rig.send(one)
    rig.run_prefills()
    rig.run()
    assert rig.tokens("r0") == whole[: whole.index(whole[4]) + 1]
    assert rig.tokens("r1") == plain(second)
    assert runner.fed_steps > 0
    rig.check_idle()


def test_who_is_cancelled_in_flight_gets_no_more_and_the_others_go_on() -> None:
    rig, _ = ahead()
    asked = [request(f"r{i}", prompt(6, salt=i), max_tokens=9) for i in range(2)]
    for one in asked:
        rig.send(one)
    rig.run_prefills()
    while len(rig.tokens("r0")) < 4:
        rig.step(rig.worker("d0"))
    rig.worker("d0").handle(Cancel(asked[0].request))
    rig.run()
    assert len(rig.tokens("r0")) == 4
    assert rig.tokens("r1") == plain(asked[1])
    rig.check_idle()


@pytest.mark.parametrize("where", ["p0", "d0"])
def test_who_comes_in_need_not_wait_for_a_stream_to_end(where: str) -> None:
    """By a hand-off, or with a prompt that is computed here."""
    rig, _ = ahead()
    first = request("r0", prompt(6), max_tokens=60)
    rig.send(first)
    rig.run_prefills()
    while len(rig.tokens("r0")) < 5:
        rig.step(rig.worker("d0"))
    second = request("r1", prompt(9, salt=1), max_tokens=8)
    rig.send(second, prefill=where)
    rig.run_prefills()
    while len(rig.tokens("r1")) < 8:
        rig.step(rig.worker("d0"))
    assert len(rig.tokens("r0")) < 25
    rig.run()
    assert (rig.tokens("r0"), rig.tokens("r1")) == (plain(first), plain(second))
    rig.check_idle()


def test_drained_in_flight_its_stream_goes_on_elsewhere_with_the_same_tokens() -> None:
    rig, _ = ahead()
    rig.decode("d1")
    rig.resume_on = "d1"
    asked = request(max_tokens=11)
    rig.send(asked)
    rig.run_prefills()
    while len(rig.tokens()) < 5:
        rig.step(rig.worker("d0"))
    rig.worker("d0").drain()
    rig.run()
    assert rig.tokens() == plain(asked)
    rig.check_idle()


@pytest.mark.parametrize(
    "sampling",
    [SAMPLINGS["seeded"], SAMPLINGS["penalties"], Sampling(temperature=0.0, logprobs=1)],
    ids=["seeded", "penalties", "logprobs"],
)
def test_beside_one_whose_token_the_device_cannot_draw_all_wait(sampling: Sampling) -> None:
    rig, runner = ahead()
    asked = [
        request(f"r{i}", prompt(7, salt=i), sampling=how, max_tokens=8)
        for i, how in enumerate((GREEDY, sampling))
    ]
    for one in asked:
        rig.send(one)
    rig.run_prefills()
    rig.run()
    assert [rig.tokens(one.request) for one in asked] == [plain(one) for one in asked]
    assert runner.fed_steps == 0


def test_short_of_blocks_tokens_come_first_and_somebody_is_parked() -> None:
    rig, runner = ahead(blocks=6)
    rig.resume_on = "d0"
    asked = [
        request(f"r{i}", prompt(2 * BLOCK_TOKENS - 1, salt=i), max_tokens=10) for i in range(2)
    ]
    for one in asked:
        rig.send(one)
    rig.run_prefills()
    rig.run()
    assert [rig.tokens(one.request) for one in asked] == [plain(one) for one in asked]
    assert rig.worker("d0").load().counters["parked"] > 0
    assert runner.fed_steps > 0
    rig.check_idle()


def test_drafts_and_steps_ahead_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="step_ahead is on and speculation prompt_lookup"):
        PoolConfig(step_ahead=True, speculation="prompt_lookup")
