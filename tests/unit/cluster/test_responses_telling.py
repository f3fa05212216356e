"""Whatever a model says, its events are those of OpenAI's client, and add up to the response."""

from collections.abc import Iterable
from typing import Any, cast

import hypothesis.strategies as st
import pytest
from hypothesis import given
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from pdserve.cluster.gateway.calls import Piece
from pdserve.cluster.http.answers import Chat
from pdserve.cluster.http.responses.asking import ResponsesBody
from pdserve.cluster.http.responses.routes import new_response
from pdserve.cluster.http.responses.telling import Event, Teller
from pdserve.cluster.http.speech import Manner
from pdserve.errors import InvalidField, PdserveError, QueueFull, WorkerLost
from pdserve.messages import FinishReason
from pdserve.text.tokenizer import Tokenizer
from tests.unit.cluster.fake_session import MODEL, FakeTokenizer, piece

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def teller(*, background: bool = False, logprobs: bool = False) -> Teller:
    body = ResponsesBody(input="hi", model=MODEL, background=background)
    dialect = Chat(
        cast(Tokenizer, FakeTokenizer()),
        logprobs=logprobs,
        manner=Manner(reasoning="deepseek_r1", calls="hermes"),
    )
    return Teller(new_response(body, MODEL), dialect=dialect, prompt_tokens=5, logprobs=logprobs)


def told(teller: Teller, pieces: Iterable[Piece]) -> list[Event]:
    events = teller.begin()
    for one in pieces:
        events += teller.tell(one, now_s=7)
    return events


def folded(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The output as a client knows it that adds up deltas: kind and text of each item."""
    items: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "response.output_item.added":
            assert event["output_index"] == len(items)
            items.append({"id": event["item"]["id"], "type": event["item"]["type"], "text": ""})
        elif event["type"].endswith(".delta"):
            assert event["item_id"] == items[event["output_index"]]["id"]
            assert event["output_index"] == len(items) - 1, "an item that has ended goes on"
            items[-1]["text"] += event["delta"]
    return items


def text_of(item: dict[str, Any]) -> str:
    if item["type"] == "function_call":
        return str(item["arguments"])
    return "".join(part["text"] for part in item["content"])


def check(events: list[Event]) -> dict[str, Any]:
    """What holds for every response that has ended; the response."""
    for event in events:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    response: dict[str, Any] = events[-1]["response"]
    Response.model_validate(response)
    output = response["output"]
    items = folded(events)
    assert [(item["id"], item["type"]) for item in output] == [(i["id"], i["type"]) for i in items]
    assert [text_of(item) for item in output] == [item["text"] for item in items]
    opened = [e for e in events if e["type"].endswith(".added")]
    closed = [e for e in events if e["type"] in CLOSING]
    assert len(opened) == len(closed)
    assert all(item["status"] != "in_progress" for item in output)
    return response


CLOSING = ("response.output_item.done", "response.content_part.done")


@given(
    parts=st.lists(st.sampled_from(["a", "hm", "</think>", "é", CALL, " ", "<tool"]), max_size=8),
    cuts=st.lists(st.integers(1, 9), max_size=8),
    finish=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED]),
    background=st.booleans(),
    logprobs=st.booleans(),
)
def test_events_add_up_to_the_response(
    parts: list[str], cuts: list[int], finish: FinishReason, background: bool, logprobs: bool
) -> None:
    text, pieces = "".join(parts), []
    for cut in cuts:
        pieces.append(piece(text[:cut], logprobs=1 if logprobs else None))
        text = text[cut:]
    pieces.append(piece(text, finish=finish, logprobs=1 if logprobs else None))
    response = check(told(teller(background=background, logprobs=logprobs), pieces))
    statuses = {
        FinishReason.STOP: "completed",
        FinishReason.LENGTH: "incomplete",
        FinishReason.CANCELLED: "cancelled",
    }
    assert response["status"] == statuses[finish]
    counted = sum(len(one.tokens) for one in pieces)
    assert response["usage"]["output_tokens"] == counted
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] <= counted


def test_thoughts_text_and_calls_are_items_of_their_own() -> None:
    events = told(
        teller(),
        [piece("hm"), piece("</think>so: "), piece(CALL + CALL, finish=FinishReason.STOP)],
    )
    kinds = [item["type"] for item in check(events)["output"]]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert [event["type"] for event in events[:5]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
    ]
    assert events[-1]["type"] == "response.completed"


def test_who_says_nothing_has_said_an_empty_message() -> None:
    response = check(told(teller(), [piece("", finish=FinishReason.STOP)]))
    assert [text_of(item) for item in response["output"]] == [""]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WorkerLost("they keep dying"), "server_error"),
        (QueueFull("full", retry_after_ms=1), "rate_limit_exceeded"),
        (InvalidField("input", "is bad"), "invalid_prompt"),
    ],
)
def test_an_error_ends_it_with_what_was_said(error: PdserveError, code: str) -> None:
    teller_ = teller()
    events = told(teller_, [piece("</think>Hel")])
    events += teller_.fail(error)
    response = check(events)
    assert response["status"] == "failed"
    assert response["error"] == {"code": code, "message": str(error)}
    assert text_of(response["output"][-1]) == "Hel"


def test_logprobs_of_a_token_without_text_are_told_with_the_next() -> None:
    """Half of a character has no text yet; its logprob must not get lost."""
    body = ResponsesBody(input="hi", model=MODEL)
    dialect = Chat(cast(Tokenizer, FakeTokenizer()), logprobs=True)
    teller_ = Teller(new_response(body, MODEL), dialect=dialect, prompt_tokens=5, logprobs=True)
    whole = piece("é", finish=FinishReason.STOP, logprobs=1)
    first = Piece(0, "", whole.tokens[:1])
    second = Piece(0, "é", whole.tokens[1:], FinishReason.STOP)
    response = check(told(teller_, [first, second]))
    assert len(response["output"][0]["content"][0]["logprobs"]) == 2
