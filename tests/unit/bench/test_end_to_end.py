"""The arithmetic of ``bench.end_to_end``; that it measures, its own runs show."""

import json

import pytest

from bench.end_to_end import FIRST_TOKEN, steady_gaps_ms
from bench.http_load import Answer, random_tokens, read_events


def answered(*token_s: float) -> Answer:
    return Answer(0.0, token_s[0], list(token_s), [], {}, 0)


def test_gaps_count_only_while_all_streams_run() -> None:
    early, late = answered(0.0, 1.0, 2.0, 3.0), answered(0.5, 1.5, 2.5, 9.0)
    assert steady_gaps_ms([early, late]) == [1000, 1000, 1000, 1000]


def test_one_stream_counts_all_its_gaps() -> None:
    assert steady_gaps_ms([answered(1.0, 1.5, 3.5)]) == [500, 2000]


def event(**fields: object) -> bytes:
    return f"data: {json.dumps({'choices': [], **fields})}\n".encode()


def test_an_answer_has_a_time_for_every_token() -> None:
    lines = [
        (1.0, event(choices=[{"token_ids": [5]}])),
        (2.0, b"\n"),
        (3.0, event(choices=[{"token_ids": [6, 7]}])),
        (4.0, event(usage={"prompt_tokens_details": {"cached_tokens": 16}})),
        (5.0, event(pdserve={"step_ms": 2.5})),
        (6.0, b"data: [DONE]\n"),
    ]
    answer = read_events(0.5, 0.9, lines, generated_tokens=3)
    assert answer == Answer(0.5, 0.9, [1.0, 3.0, 3.0], [5, 6, 7], {"step_ms": 2.5}, 16)


def test_a_missing_token_is_noticed() -> None:
    with pytest.raises(AssertionError, match="1 tokens of 2"):
        read_events(0, 0, [(1.0, event(choices=[{"token_ids": [5]}]))], generated_tokens=2)


def test_an_error_in_the_stream_is_noticed() -> None:
    with pytest.raises(AssertionError, match="worker"):
        read_events(0, 0, [(1.0, event(error={"message": "no worker"}))], generated_tokens=0)


def test_prompts_differ_by_seed_and_repeat_with_it() -> None:
    assert random_tokens(50, 1) == random_tokens(50, 1) != random_tokens(50, 2)


@pytest.mark.parametrize(
    ("said", "begun"),
    [(b"\nmodel    ", False), (b"\nmodel    Par", True), (b"loading the model ...", False)],
)
def test_the_first_token_is_seen_in_what_serve_prints(said: bytes, begun: bool) -> None:
    assert (FIRST_TOKEN.search(said) is not None) == begun
