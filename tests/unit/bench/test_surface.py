"""``bench.surface``: the workers' clock and their streams, what clients count, what rows say."""

from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.surface import added, last_of_each_step_ms
from bench.surface_clients import EventCounter, Stream, bare_request
from bench.surface_fleet import Pace, Talk, next_end_us
from bench.surface_places import HOST
from pdserve.messages import Address, FinishReason, Timing

NOWHERE = Address(HOST, "/nowhere", "")
PACE = Pace(5_000, 20_000)

times_us = st.integers(0, 2**31 - 1)


@given(times_us, times_us)
def test_a_pace_comes_back_from_its_seed(prefill_us: int, step_us: int) -> None:
    pace = Pace(prefill_us, step_us)
    assert Pace.of_seed(pace.as_seed()) == pace
    assert 0 <= pace.as_seed() < 2**63  # what a client may send


@given(st.integers(0, 2**40), st.integers(1, 10**6))
def test_a_step_ends_at_the_next_multiple_and_not_now(now_us: int, step_us: int) -> None:
    end_us = next_end_us(now_us, step_us)
    assert end_us % step_us == 0
    assert now_us < end_us <= now_us + step_us


def test_a_stream_says_each_token_once_and_its_end_with_the_last() -> None:
    request = bare_request("r", PACE, 3, NOWHERE)
    talk = Talk(request, Timing(level=2), cast(Any, None))
    deltas = []
    while not talk.is_over:
        deltas.append(talk.say())
    assert [delta.offset for delta in deltas] == [0, 1, 2]
    assert [len(delta.tokens) for delta in deltas] == [1, 1, 1]
    assert [delta.finish for delta in deltas] == [None, None, FinishReason.LENGTH]
    assert [delta.timing is not None for delta in deltas] == [True, False, True]


def test_a_second_attempt_goes_on_behind_what_was_delivered() -> None:
    first = bare_request("r", PACE, 9, NOWHERE)
    again = replace(first, attempt=1, tokens=(*first.tokens, 1, 2))
    delta = Talk(again, Timing(), cast(Any, None)).say()
    assert (delta.attempt, delta.offset) == (1, 2)


@given(st.integers(0, 20), st.data())
def test_events_are_counted_however_the_bytes_are_cut(count: int, data: st.DataObject) -> None:
    text = b"1c2\r\n" + b'data: {"choices":[{"delta":{}}]}\n\n' * count + b"data: [DONE]\n\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    counter = EventCounter()
    found = 0
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += counter.push(text[begin:end])
    assert found == count
    assert counter.is_done


def test_two_requests_share_no_block() -> None:
    one, other = (bare_request(name, PACE, 1, NOWHERE) for name in ("bare-1", "bare-2"))
    assert len({*one.block_keys, *other.block_keys}) == 2 * len(one.block_keys)


def test_the_last_token_of_a_step_is_what_counts() -> None:
    """Steps of 100 ms; the first token belongs to none, and a step that one of them missed is
    left out."""
    one = Stream(0.0, [0.99, 1.103, 1.205, 1.301])
    other = Stream(0.0, [0.99, 1.107, 1.202])
    found = last_of_each_step_ms([one, other], 100_000)
    assert found == pytest.approx([7, 5])


def test_what_is_added_is_the_difference_of_the_medians() -> None:
    samples = {"bare": [1.0, 2.0, 9.0], "HTTP": [3.0, 4.0, 5.0]}
    made = added("first token", samples, "HTTP", 3.0)
    assert (made.value, made.reference_value, made.holds) == (2.0, 2.0, True)
    assert added("first token", samples, "HTTP", 1.9).holds is False
