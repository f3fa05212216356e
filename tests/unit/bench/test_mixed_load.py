"""``bench.mixed_load`` on outcomes that are made up: its rows, its bars, its choice of a peer."""

import argparse
from collections.abc import Sequence
from functools import partial

import pytest

from bench import mixed_load
from bench.frame import Options, Row
from bench.intervals import ratio_interval
from bench.mixed_load import MEASURES, OURS, Runs, compared, rows_of, throughput, vllm_setting
from bench.peers.mixed_load import Arrival, Outcome
from bench.servers import Form, ServerFailed, Vllm
from bench.tuning import ALL_SETTINGS, Tried, chat_ttft_s_p90
from tests.unit.bench.outcomes import outcome

PEER = Vllm(512, 128, chats_first=False)
FORM = next(form for form in OURS if form.name == mixed_load.HEADLINE)
CHAT_TTFT_P90, CHAT_GAPS_P99, LONG_TTFT_P90 = (
    next(one for one in MEASURES if one.name == name)
    for name in ("chat TTFT p90", "chat gaps p99", "long TTFT p90")
)


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_load, "ratio_interval", partial(ratio_interval, draws=5))


def served(
    *, chat_ttft_s: float, gap_s: float, long_ttft_s: float, ended_s: float
) -> list[Outcome]:
    """Ten chats over 100 s, the last of them three times slower, and two long prompts."""
    chats = [
        outcome(
            ttft_s=chat_ttft_s * (3 if index == 9 else 1),
            gaps_s=[gap_s] * 3,
            due_s=index * 10,
            ended_s=ended_s,
        )
        for index in range(10)
    ]
    long = [outcome("long", ttft_s=long_ttft_s, due_s=due_s, tokens=16) for due_s in (5.0, 50.0)]
    return [*chats, *long]


FAST = served(chat_ttft_s=0.1, gap_s=0.02, long_ttft_s=2.0, ended_s=100)
SLOW = served(chat_ttft_s=0.2, gap_s=0.05, long_ttft_s=1.6, ended_s=101)


def test_a_measure_stands_beside_the_peers_with_its_interval_and_bar() -> None:
    runs: Runs = {FORM: [FAST, FAST], PEER: [SLOW, SLOW]}
    made = compared(CHAT_TTFT_P90, FORM, runs, PEER, with_bar=True)
    assert (made.value, made.reference_value, made.ratio) == (100, 200, 0.5)
    assert made.reference == "vLLM 512/128/fcfs"
    assert made.ratio_interval == pytest.approx((0.5, 0.5))
    assert (made.bar, made.holds) == ("≤ 0.6×", True)
    gaps = compared(CHAT_GAPS_P99, FORM, runs, PEER, with_bar=True)
    assert gaps.ratio == pytest.approx(0.4)
    assert gaps.holds is False
    long = compared(LONG_TTFT_P90, FORM, runs, PEER, with_bar=True)
    assert long.ratio == pytest.approx(1.25)
    assert long.holds is False


def test_seeds_are_pooled_and_not_averaged() -> None:
    quick, late = ([outcome(ttft_s=ttft_s)] * count for ttft_s, count in ((0.1, 18), (9.0, 2)))
    made = compared(CHAT_TTFT_P90, FORM, {FORM: [quick, late]}, None, with_bar=False)
    assert (made.value, made.ratio, made.bar) == (100, None, "")


@pytest.mark.parametrize(("ended_s", "holds"), [(99.0, True), (101.4, True), (102.0, False)])
def test_throughput_is_compared_at_two_digits(ended_s: float, holds: bool) -> None:
    ours = served(chat_ttft_s=0.1, gap_s=0.02, long_ttft_s=2.0, ended_s=ended_s)
    made = throughput(FORM, {FORM: [ours], PEER: [SLOW]}, PEER, with_bar=True)
    assert (made.bar, made.holds) == ("≥ 1×", holds)


def test_every_form_has_the_same_rows_and_only_the_headline_has_bars() -> None:
    runs: Runs = {OURS[0]: [FAST], FORM: [FAST], PEER: [SLOW]}
    plain = list(rows_of(OURS[0], runs, PEER, with_bars=False))
    headline = list(rows_of(FORM, runs, PEER, with_bars=True))
    assert [made.bar for made in plain] == [""] * 6
    assert [made.bar for made in headline] == ["", "≤ 0.6×", "", "≤ 0.35×", "≤ 1.2×", "≥ 1×"]
    assert all(made.ratio is not None for made in (*plain, *headline))


def test_the_peer_alone_is_compared_with_nobody() -> None:
    assert {made.reference for made in rows_of(PEER, {PEER: [SLOW]}, PEER, with_bars=False)} == {""}


def test_all_settings_are_tried() -> None:
    assert len(set(ALL_SETTINGS)) == 18
    assert {setting.name for setting in ALL_SETTINGS} >= {
        "vLLM default/0/fcfs",
        "vLLM 256/64/priority",
        "vLLM 512/128/fcfs",
    }


def test_the_best_setting_is_that_whose_chats_wait_least_and_the_first_of_equal_ones() -> None:
    others = [Vllm(None, 0, False), Vllm(256, 64, True)]
    tried = Tried({others[0]: SLOW, PEER: FAST, others[1]: FAST}, {})
    assert tried.best(lambda outcomes: (chat_ttft_s_p90(outcomes),)) == PEER


def test_without_any_setting_that_works_there_is_no_best() -> None:
    with pytest.raises(ServerFailed, match="no setting; it ended with 1"):
        Tried({}, {PEER: "it ended with 1"}).best(lambda outcomes: (0.0,))


@pytest.mark.parametrize("setting", ALL_SETTINGS, ids=lambda setting: setting.name)
def test_a_setting_can_be_given_as_its_name_says_it(setting: Vllm) -> None:
    assert vllm_setting(setting.name.removeprefix("vLLM ")) == setting


@pytest.mark.parametrize("text", ["", "512,128", "512,x,fcfs", "512,128,lifo", "1,2,fcfs,4"])
def test_what_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="512,128,fcfs"):
        vllm_setting(text)


class MadeUp:
    """A folder of results in which every server is as fast as its name says."""

    def __init__(self, directory: object) -> None:
        self.measured: list[str] = []

    def outcomes(self, form: Form, arrivals: Sequence[Arrival]) -> list[Outcome]:
        self.measured.append(form.name)
        if form == Vllm(None, 0, chats_first=False):
            raise ServerFailed("it ended with 1\nand more")
        return FAST if "skip_join" in form.name or "priority" in form.name else SLOW


def table(
    monkeypatch: pytest.MonkeyPatch, *argv: str, quick: bool = True, missing: str = ""
) -> list[Row]:
    monkeypatch.setattr(mixed_load, "Work", MadeUp)
    monkeypatch.setattr(mixed_load, "vllm_missing", lambda: missing)
    parser = argparse.ArgumentParser()
    mixed_load.add_arguments(parser)
    return list(mixed_load.measure(Options(quick, parser.parse_args(argv))))


def test_a_run_chooses_the_peer_and_sets_every_form_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = table(monkeypatch)
    choice = [made for made in rows if made.name.startswith("choice")]
    assert [made.skipped for made in choice] == ["", "", "", "it ended with 1"]
    compared_rows = [made for made in rows if made.ratio is not None]
    assert {made.reference for made in compared_rows} == {"vLLM 512/128/priority"}
    assert len(compared_rows) == len(OURS) * 6
    assert {made.name.split(", ")[1] for made in rows if made.bar} == {FORM.name}
    assert any("weights: file" in made.name for made in compared_rows)


def test_a_setting_that_is_given_is_compared_with_and_none_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = table(monkeypatch, "--vllm", "256,64,fcfs", "--headline", OURS[0].name, quick=False)
    assert not [made for made in rows if made.name.startswith("choice")]
    assert {made.reference for made in rows if made.ratio} == {"vLLM 256/64/fcfs"}
    assert {made.name.split(", ")[1] for made in rows if made.bar} == {OURS[0].name}


@pytest.mark.parametrize(
    ("argv", "missing", "reason"),
    [((), "no vLLM here", "no vLLM here"), (("--only", "ours"), "", "--only ours")],
)
def test_without_a_peer_ours_is_measured_and_nothing_is_promised(
    monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], missing: str, reason: str
) -> None:
    rows = table(monkeypatch, *argv, missing=missing)
    assert [made.skipped for made in rows if made.name == "all of it beside vLLM"] == [reason]
    assert len([made for made in rows if made.value is not None]) == len(OURS) * 6
    assert {made.holds for made in rows} == {None}


def test_the_peer_alone_is_its_choice_and_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(monkeypatch, "--only", "vllm")
    measured = [made.name for made in rows if made.value is not None]
    assert len(measured) == 3 + 6
    assert not [name for name in measured if "skip_join" in name]


def test_the_headline_alone_stands_beside_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(monkeypatch, "--only", "headline", "--vllm", "256,64,fcfs")
    assert {made.name.split(", ")[1] for made in rows} == {FORM.name}
    assert len([made for made in rows if made.bar]) == 4
