"""The load that servers get: planned before the clock starts, read after it stopped."""

import itertools
import json
import statistics

import pytest

from bench.peers.mixed_load import (
    CHAT,
    LONG,
    Arrival,
    Lengths,
    Target,
    body_of,
    mixed,
    outcome_of,
    percentiles_ms,
    tokens_per_s,
    ttfts_s,
)
from tests.unit.bench.outcomes import outcome

TWO_TOKENS = Arrival(3.0, "chat", Lengths(4, 2), seed=1)


def test_the_same_seed_gives_the_same_load_and_another_another() -> None:
    one, same, other = (mixed(rate_per_s=1.6, seconds=60, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


def test_a_load_has_the_rate_and_the_share_that_were_asked_for() -> None:
    arrivals = mixed(rate_per_s=2, seconds=2000, seed=1, long_share=0.2)
    assert len(arrivals) == pytest.approx(4_000, rel=0.05)
    assert sum(a.kind == "long" for a in arrivals) == pytest.approx(800, rel=0.1)
    assert {a.lengths for a in arrivals if a.kind == "long"} == {LONG}
    assert {a.lengths for a in arrivals if a.kind == "chat"} == {CHAT}
    waits_s = [after.due_s - before.due_s for before, after in itertools.pairwise(arrivals)]
    assert statistics.stdev(waits_s) == pytest.approx(0.5, rel=0.05)  # Poisson: as the mean
    assert arrivals[0].due_s == 0
    assert arrivals[-1].due_s < 2000


def test_twice_the_rate_is_the_same_load_twice_as_fast() -> None:
    slow = mixed(rate_per_s=1, seconds=100, seed=3)
    fast = mixed(rate_per_s=2, seconds=50, seed=3)
    assert [a.kind for a in slow] == [a.kind for a in fast]
    assert [a.seed for a in slow] == [a.seed for a in fast]
    assert [a.due_s for a in slow] == pytest.approx([2 * a.due_s for a in fast])


def test_prompts_are_ordinary_tokens_that_their_seed_decides() -> None:
    target = Target("http://x", "m", vocabulary=200)
    arrivals = [Arrival(0.0, "chat", Lengths(2000, 1), seed) for seed in (1, 1, 2)]
    one, same, other = (json.loads(body_of(arrival, target))["prompt"] for arrival in arrivals)
    assert one == same != other
    assert set(one) == set(range(100, 200))


@pytest.mark.parametrize(
    ("kind", "chats_first", "priority"),
    [("chat", True, 0), ("long", True, 1), ("chat", False, None), ("long", False, None)],
)
def test_a_priority_is_named_only_where_the_server_goes_by_it(
    kind: str, chats_first: bool, priority: int | None
) -> None:
    target = Target("http://x", "m", chats_first=chats_first)
    assert json.loads(body_of(Arrival(0.0, kind, CHAT, 1), target)).get("priority") == priority


def chunk(text: str = "", **fields: object) -> bytes:
    return f"data: {json.dumps({'choices': [{'text': text}], **fields})}\n".encode()


def usage(tokens: int) -> bytes:
    return f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': tokens}})}\n".encode()


def test_times_are_those_of_text_and_tokens_those_of_usage() -> None:
    lines = [
        (10.25, chunk("")),  # no text: not the first token
        (10.5, chunk("a")),
        (10.5, b"\n"),
        (11.0, chunk("b")),
        (11.5, usage(2)),
        (11.75, b"data: [DONE]\n"),
    ]
    seen = outcome_of(TWO_TOKENS, lines, sent_s=10.0, begun_s=7.0)
    assert seen == outcome(
        ttft_s=0.5, gaps_s=[0.5], due_s=3.0, prompt_tokens=4, ended_s=4.75, tokens=2
    )


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([(1.0, chunk("ab"))], "asked for 2 tokens, usage says 0"),
        ([(1.0, chunk("a")), (1.1, usage(1))], "asked for 2 tokens, usage says 1"),
        ([(1.0, chunk(error={"message": "no worker"}))], '{"message": "no worker"}'),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(
    lines: list[tuple[float, bytes]], error: str
) -> None:
    assert outcome_of(TWO_TOKENS, lines, sent_s=0.5, begun_s=0.0).error == error


def test_an_answer_in_special_tokens_alone_has_no_time_to_its_first_text() -> None:
    silent = outcome_of(TWO_TOKENS, [(1.0, usage(2))], sent_s=0.5, begun_s=0.0)
    assert (silent.error, silent.ttft_s, silent.tokens) == ("", None, 2)
    assert ttfts_s([silent, outcome(ttft_s=0.5)]) == [0.5]


def test_a_refusal_keeps_the_servers_words() -> None:
    lines = [(1.0, b'{"error": "full"}')]
    seen = outcome_of(TWO_TOKENS, lines, sent_s=0.5, begun_s=0.0, trouble="429: full")
    assert (seen.error, seen.ttft_s, seen.tokens) == ("429: full", None, 0)


def test_throughput_counts_until_the_last_answer_ends() -> None:
    assert tokens_per_s([outcome(ended_s=4, tokens=10), outcome(ended_s=5, tokens=30)]) == 8


def test_percentiles_of_nothing_are_none() -> None:
    assert percentiles_ms([]) == {}
    assert percentiles_ms([0.001 * n for n in range(1, 101)]) == {"p50": 51, "p90": 91, "p99": 100}
