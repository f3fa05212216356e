"""Exactly-once delivery over attempts and workers: every token once, in order, whatever arrives."""

import random
from dataclasses import replace
from typing import Any

import pytest

from pdserve.cluster.gateway.delivery import HELD_MAX, BeamDelivery, Delivery
from pdserve.errors import ErrorInfo, OutOfBlocks
from pdserve.ids import BlockKey, HostId, RequestId
from pdserve.messages import (
    Address,
    Beams,
    FinishReason,
    Request,
    Sampling,
    ServiceClass,
    Stop,
    Token,
    TokenDelta,
)
from pdserve.text.detokenizer import Detokenizer

PROMPT = (7, 8, 9)


class Letters:
    """A tokeniser of one letter a token, as far as a detokeniser asks."""

    special_ids: frozenset[int] = frozenset()

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def without_first_space(self, data: bytes) -> bytes:
        return data


def _delivery(*, stop: tuple[str, ...] = (), include_stop_string: bool = False) -> Delivery:
    request = Request(
        request=RequestId("r"),
        attempt=0,
        choice=2,
        model="m",
        tokens=PROMPT,
        prompt_tokens=len(PROMPT),
        block_keys=(),
        tenant="",
        service_class=ServiceClass.STANDARD,
        sampling=Sampling(),
        stop=Stop(max_tokens=100, strings=stop),
        seed=0,
        deadline_unix_ms=0,
        reply_to=Address(HostId("h"), "", ""),
    )
    return Delivery(
        request,
        Detokenizer(Letters()),  # type: ignore[arg-type]
        include_stop_string=include_stop_string,
    )


def _delta(
    offset: int,
    text: str,
    *,
    attempt: int = 0,
    finish: FinishReason | None = None,
    error: ErrorInfo | None = None,
) -> TokenDelta:
    tokens = tuple(Token(byte) for byte in text.encode())
    return TokenDelta(RequestId("r"), attempt, offset, tokens, finish=finish, error=error)


def _text(delivery: Delivery, *deltas: TokenDelta) -> str:
    return "".join(piece.text for delta in deltas for piece in delivery.on_delta(delta))


def test_overlapping_and_repeated_deltas_deliver_each_token_once() -> None:
    delivery = _delivery()
    text = _text(delivery, _delta(0, "abc"), _delta(1, "bcde"), _delta(0, "abc"), _delta(5, "f"))
    assert text == "abcdef"
    assert bytes(delivery.tokens) == b"abcdef"


def test_a_delta_from_the_future_waits_for_the_gap_to_close() -> None:
    delivery = _delivery()
    assert _text(delivery, _delta(2, "c"), _delta(3, "d")) == ""
    assert _text(delivery, _delta(0, "ab")) == "abcd"


def test_an_older_attempt_is_not_heard_any_more() -> None:
    delivery = _delivery()
    _text(delivery, _delta(0, "ab"))
    again = delivery.next_attempt([BlockKey(b"k" * 16)])
    assert again.tokens == (*PROMPT, *b"ab")
    assert (again.attempt, again.prompt_tokens, again.emitted_count) == (1, 3, 2)
    assert _text(delivery, _delta(2, "X")) == ""
    assert _text(delivery, _delta(2, "c", attempt=1)) == "c"


def test_what_was_held_for_a_lost_attempt_is_dropped_with_it() -> None:
    delivery = _delivery()
    _text(delivery, _delta(3, "X"))
    delivery.next_attempt([])
    assert _text(delivery, _delta(0, "abc", attempt=1)) == "abc"


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_any_pieces_gives_the_same_text(seed: int) -> None:
    chance = random.Random(seed)
    whole = "the quick brown fox jumps over the lazy dog"
    deltas = [_delta(index, letter) for index, letter in enumerate(whole)]
    deltas += [
        _delta(start, whole[start : start + 4]) for start in chance.sample(range(len(whole)), 10)
    ]
    chance.shuffle(deltas)
    assert _text(_delivery(), *deltas) == whole


@pytest.mark.parametrize(("include", "shown"), [(False, "one "), (True, "one END")])
def test_a_stop_string_cuts_the_text_and_ends_the_request(include: bool, shown: str) -> None:
    delivery = _delivery(stop=("END",), include_stop_string=include)
    pieces = [
        piece
        for delta in (_delta(0, "one E"), _delta(5, "ND more"))
        for piece in delivery.on_delta(delta)
    ]
    assert "".join(piece.text for piece in pieces) == shown
    assert pieces[-1].finish is FinishReason.STOP
    assert pieces[-1].stop_reason == "END"
    assert delivery.finished
    assert delivery.on_delta(_delta(12, "x")) == []


def test_half_a_stop_string_is_shown_once_the_request_ends() -> None:
    delivery = _delivery(stop=("END",))
    assert _text(delivery, _delta(0, "abEN")) == "ab"
    assert _text(delivery, _delta(4, "", finish=FinishReason.LENGTH)) == "EN"
    assert delivery.finished


def test_a_worker_s_error_is_raised_as_itself() -> None:
    error = ErrorInfo.of(OutOfBlocks(9, 3, retry_after_ms=50))
    with pytest.raises(OutOfBlocks, match="9 blocks wanted, 3 free"):
        _delivery().on_delta(_delta(0, "", finish=FinishReason.ERROR, error=error))


def test_what_waits_for_earlier_tokens_is_bounded_and_leaves_a_gap_until_the_next_attempt() -> None:
    delivery = _delivery()
    assert not delivery.has_gap
    for index in range(HELD_MAX + 1):
        assert not delivery.on_delta(_delta(index + 1, "x"))
    assert delivery.has_gap
    assert _text(delivery, _delta(0, "a")) == "a" + HELD_MAX * "x"
    assert delivery.has_gap, "the last one was left out, and nobody says it again"
    delivery.next_attempt(())
    assert not delivery.has_gap


# ── beam searches ────────────────────────────────────────────────────────────────────────────────


def _beam_delivery() -> BeamDelivery:
    request = replace(_delivery().request, choice=0, beams=Beams(3, 2))
    return BeamDelivery(request, Detokenizer(Letters()))  # type: ignore[arg-type]


def _hypothesis(index: int, text: str, **fields: Any) -> TokenDelta:
    told: dict[str, Any] = {"attempt": 0, "offset": 0, "finish": FinishReason.STOP, **fields}
    tokens = tuple(Token(byte) for byte in text.encode())
    return TokenDelta(RequestId("r"), tokens=tokens, hypothesis=index, **told)


def test_each_hypothesis_is_a_choice() -> None:
    delivery = _beam_delivery()
    choices = [delivery.open_choices]
    (second,) = delivery.on_delta(_hypothesis(1, "be"))
    assert (second.choice, second.text, second.finish) == (1, "be", FinishReason.STOP)
    choices.append(delivery.open_choices)
    assert not delivery.finished
    begun = delivery.on_delta(_hypothesis(0, "sea", finish=None))
    ended = delivery.on_delta(_hypothesis(0, "ch", offset=3))
    assert [piece.text for piece in begun + ended] == ["sea", "ch"]
    assert delivery.finished
    assert [*choices, delivery.open_choices] == [(0, 1), (0,), ()]


def test_a_search_s_next_attempt_begins_at_the_prompt_and_repeats_nothing() -> None:
    delivery = _beam_delivery()
    delivery.on_delta(_hypothesis(0, "sea"))
    again = delivery.next_attempt(())
    assert (again.attempt, again.tokens, again.choice) == (1, PROMPT, 0)
    assert delivery.on_delta(_hypothesis(1, "be")) == []  # of the attempt that was lost
    assert delivery.on_delta(_hypothesis(0, "sea", attempt=1)) == []
    (piece,) = delivery.on_delta(_hypothesis(1, "be", attempt=1))
    assert piece.text == "be"
    assert delivery.finished


def test_an_error_of_a_search_ends_all_its_choices() -> None:
    delivery = _beam_delivery()
    error = ErrorInfo.of(OutOfBlocks(9, 8, retry_after_ms=1))
    with pytest.raises(OutOfBlocks):
        delivery.on_delta(_hypothesis(0, "", finish=FinishReason.ERROR, error=error))
    assert delivery.finished
    assert delivery.on_delta(_hypothesis(1, "be")) == []
