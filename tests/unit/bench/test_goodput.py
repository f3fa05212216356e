"""``bench.goodput``: which requests are good, and the search for the highest rate."""

import argparse
import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import goodput, runs
from bench.frame import Options, Row
from bench.goodput import TRIES_MAX, Targets, highest_rate, unseen
from bench.peers.mixed_load import Outcome, mixed
from bench.runs import Work
from bench.servers import Form, Ours
from tests.unit.bench.outcomes import outcome

TARGETS = Targets(ttft_ms=1000, long_ttft_ms=5000, tpot_ms=62.5)


@pytest.mark.parametrize(
    ("seen", "good"),
    [
        (outcome(ttft_s=1.0, gaps_s=[0.0625] * 63), True),
        (outcome(ttft_s=1.1, gaps_s=[0.0625] * 63), False),
        (outcome(ttft_s=1.0, gaps_s=[0.07] * 63), False),
        (outcome(ttft_s=1.0, gaps_s=[2.0, *[0.02] * 62]), True),  # on average
        (outcome(ttft_s=0.1, gaps_s=[0.12] * 31), True),  # two tokens a chunk are two tokens
        (outcome("long", ttft_s=5.0, tokens=1), True),
        (outcome("long", ttft_s=5.1, tokens=1), False),
        (outcome(ttft_s=None), False),
        (outcome(error="429: full"), False),
    ],
)
def test_a_request_is_good_when_it_meets_both_targets(seen: Outcome, good: bool) -> None:
    assert TARGETS.good(seen) == good


def test_the_good_ratio_counts_refused_requests() -> None:
    assert TARGETS.good_ratio([outcome(), outcome(), outcome(error="429"), outcome()]) == 0.75


@pytest.mark.parametrize("limit", [0.13, 0.9, 1.0, 1.01, 2.3, 7.77, 30.0])
def test_the_search_ends_close_below_the_limit(limit: float) -> None:
    asked: list[float] = []

    def holds(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    found = highest_rate(holds)
    assert limit / 1.05 <= found <= limit
    assert len(asked) == len(set(asked)) <= TRIES_MAX


def test_a_server_that_never_holds_has_no_goodput() -> None:
    assert highest_rate(lambda rate: False) == 0


def test_a_server_that_always_holds_ends_the_search_too() -> None:
    assert highest_rate(lambda rate: True) == 2 ** (TRIES_MAX - 1)


RATES = {"disaggregated": 2.0, "aggregated": 1.0, "auto": 3.0, "vLLM 256/64/fcfs": 4.0}


def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *argv: str) -> list[Row]:
    def rate(work: Work, targets: Targets, share: float, options: Options, form: Form) -> float:
        found = RATES[form.mode if isinstance(form, Ours) else form.name]
        return 1.0 if isinstance(form, Ours) and share == 0 else found

    monkeypatch.setattr(goodput, "goodput", rate)
    parser = argparse.ArgumentParser()
    goodput.add_arguments(parser)
    given = parser.parse_args([*argv, "--work", str(tmp_path)])
    return list(goodput.measure(Options(quick=False, arguments=given)))


def test_every_mode_stands_beside_the_peer_and_it_is_said_where_apart_does_not_pay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(goodput, "vllm_missing", lambda: "")
    rows = table(monkeypatch, tmp_path, "--vllm", "256,64,fcfs")
    assert [(made.name, made.ratio) for made in rows] == [
        ("goodput, 0% long, disaggregated", 0.25),
        ("goodput, 0% long, aggregated", 0.25),
        ("goodput, 0% long, auto", 0.25),
        ("goodput, 0% long, apart: does not pay here", 1.0),
        ("goodput, 20% long, disaggregated", 0.5),
        ("goodput, 20% long, aggregated", 0.25),
        ("goodput, 20% long, auto", 0.75),
        ("goodput, 20% long, apart: pays here", 2.0),
    ]


def test_without_a_peer_the_modes_are_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(goodput, "vllm_missing", lambda: "no vLLM here")
    rows = table(monkeypatch, tmp_path, "--long-shares", "0.2")
    assert [made.value for made in rows] == [2.0, 1.0, 3.0, 2.0, None]
    assert rows[-1].skipped == "no vLLM here"


def test_no_try_has_prompts_of_another() -> None:
    """Ours keeps prefixes: what came again would cost it nothing."""
    arrivals = mixed(rate_per_s=5.0, seconds=10, seed=1, long_share=0.2)
    tries = [unseen(arrivals, number) for number in range(3)]
    seeds = {arrival.seed for one in (arrivals, *tries) for arrival in one}
    assert len(seeds) == 4 * len(arrivals)
    for one in tries:
        assert [a.lengths for a in one] == [a.lengths for a in arrivals]
        assert [a.due_s for a in one] == [a.due_s for a in arrivals]


@pytest.mark.parametrize(("failing", "found"), [({0}, 1.0), ({0, 1}, 0.5), (set(range(6)), 0.125)])
def test_a_rate_is_given_up_when_it_fails_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: set[int], found: float
) -> None:
    """Of the tries in turn these fail, and all at more than one request per second."""
    loads: list[int] = []

    def drive(_: object, arrivals: list[object], **_limits: object) -> list[Outcome]:
        loads.append(len(arrivals))
        is_bad = len(loads) - 1 in failing or len(arrivals) > len(at_one)
        return [outcome(error="full" if is_bad else "")]

    @contextlib.contextmanager
    def serving(*_: object) -> Iterator[None]:
        yield

    at_one = mixed(rate_per_s=1.0, seconds=60, seed=goodput.SEED, long_share=0.2)
    monkeypatch.setattr(goodput, "drive", drive)
    monkeypatch.setattr(asyncio, "run", lambda outcomes: outcomes)
    monkeypatch.setattr(runs, "commit", lambda: "none")
    monkeypatch.setattr(goodput, "serving", serving)
    parser = argparse.ArgumentParser()
    goodput.add_arguments(parser)
    options = Options(quick=False, arguments=parser.parse_args([]))
    rate = goodput.goodput(Work(tmp_path), TARGETS, 0.2, options, Ours("auto", "skip_join"))
    assert found <= rate < 2 * found
    assert len(loads) <= goodput.ATTEMPTS * TRIES_MAX
    assert min(loads) >= 0.7 * goodput.REQUESTS_MIN, "a try at a low rate says little"
