"""Streams that another gateway goes on with: whatever was told before, and however both gateways
happen to gather their tokens, the client has the whole answer once."""

import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.resuming import EventId, Told, parse_event_id
from pdserve.config import GatewayConfig
from pdserve.errors import InvalidField
from pdserve.messages import FinishReason
from tests.unit.cluster.asgi import Reply, post
from tests.unit.cluster.fake_session import FakeSession, Step, piece, steps

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}
CALL = '<tool_call>{"name": "f", "arguments": {"a": [1, 2]}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

ASKED: dict[str, tuple[str, dict[str, Any], str]] = {
    "chat": (CHAT, MESSAGES, "Hello, äöü 世界!"),
    "chat, logprobs": (CHAT, MESSAGES | {"logprobs": True, "top_logprobs": 2}, "Hello"),
    "chat, n": (CHAT, MESSAGES | {"n": 3, "return_token_ids": True}, "Hello"),
    "chat, thoughts": (CHAT, MESSAGES, "<think>why not</think>so be it"),
    "chat, tools": (CHAT, MESSAGES | {"tools": [TOOL]}, f"I call. {CALL}"),
    "completion, logprobs": (COMPLETION, {"prompt": "ab", "logprobs": 2}, "Hello"),
    "completion, echo": (COMPLETION, {"prompt": ["a", "b"], "echo": True, "n": 2}, "Hello"),
}


def said_in_pieces(text: str, n: int, cuts: Sequence[int], *, logprobs: bool) -> list[Step]:
    """``text`` by every choice; pieces end where ``cuts`` say, and the finish may come alone."""
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    found: list[Step] = []
    parts = [text[begin:end] for begin, end in itertools.pairwise(borders)]
    for index, part in enumerate(parts):
        for choice in range(n):
            finish = FinishReason.STOP if index == len(parts) - 1 else None
            found.append(
                piece(part, choice=choice, finish=finish, logprobs=2 if logprobs else None)
            )
    return found


@functools.cache
def app_of(reasoning: bool) -> tuple[FakeSession, FastAPI]:
    session = FakeSession()
    config = GatewayConfig(
        reasoning_parser="qwen3" if reasoning else None, tool_call_parser="hermes"
    )
    return session, create_app(session, config=config)


def ask(name: str, cuts: Sequence[int], **headers: str) -> Reply:
    path, fields, text = ASKED[name]
    session, app = app_of("thoughts" in name)
    pieces = said_in_pieces(text, fields.get("n", 1), cuts, logprobs="logprobs" in fields)
    session.script = steps(*pieces)
    return post(app, path, fields | {"stream": True, "temperature": 0.7}, **headers)


def events_of(reply: Reply) -> list[tuple[str | None, dict[str, Any]]]:
    """Each with its id."""
    assert reply.status == 200, reply.body
    parts = reply.body.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    events = []
    for part in parts[:-2]:
        data, _, event_id = part.partition("\nid: ")
        events.append((event_id or None, json.loads(data.removeprefix("data: "))))
    return events


def folded(events: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What a client puts together, by choice: texts joined, lists appended, the rest in order."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            _fold(choices.setdefault(choice["index"], {}), choice)
    return choices


def _fold(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if name in ("index", "type", "id") or value is None:
            continue
        if isinstance(value, dict):
            _fold(whole.setdefault(name, {}), value)
        elif name == "tool_calls":
            for call in value:
                _fold(whole.setdefault(name, {}).setdefault(call["index"], {}), call)
        elif isinstance(value, list | str):
            whole[name] = whole.get(name, type(value)()) + value
        else:
            whole.setdefault(name, []).append(value)


cuts = st.lists(st.integers(0, 1000), max_size=8)


@pytest.mark.parametrize("name", ASKED)
@settings(max_examples=40)
@given(first=cuts, second=cuts, at=st.integers(0, 1000))
def test_whatever_was_told_the_rest_follows_and_nothing_twice(
    name: str, first: list[int], second: list[int], at: int
) -> None:
    events = events_of(ask(name, first, x_pdserve_resumable="1"))
    event_id, _ = events[at % len(events)]
    assert event_id is not None
    told = events[: at % len(events) + 1]
    rest = events_of(ask(name, second, last_event_id=event_id))
    assert folded([event for _, event in [*told, *rest]]) == folded([event for _, event in events])
    assert {event["id"] for _, event in rest} <= {event["id"] for _, event in told}
    assert {event["created"] for _, event in rest} <= {event["created"] for _, event in told}


def test_a_resumed_stream_draws_with_the_seed_of_its_id() -> None:
    session = FakeSession()
    app = create_app(session, config=GatewayConfig())
    body = MESSAGES | {"stream": True}
    event_id, _ = events_of(post(app, CHAT, body, x_pdserve_resumable="1"))[0]
    assert event_id is not None
    post(app, CHAT, body, last_event_id=event_id)
    first, second = session.calls
    assert first.seed == second.seed == parse_event_id(event_id).seed
    assert first.call == second.call
    assert session.cancelled[-1] == first.call, "should it still run here, for a client that left"


def test_ids_are_for_those_who_ask_for_them() -> None:
    app = create_app(FakeSession(), config=GatewayConfig())
    assert b"id: " not in post(app, CHAT, MESSAGES | {"stream": True}).body.replace(b'"id":', b"")


@pytest.mark.parametrize(
    ("change", "headers", "problem"),
    [
        ({"temperature": 0.5}, {}, "belongs to another request"),
        ({"user": "somebody else"}, {}, "belongs to another request"),
        ({"n": 2}, {}, "belongs to another request"),
        ({}, {"last_event_id": "1.2.3"}, "is no id of an event of ours"),
        ({"stream": False}, {}, "only a stream"),
        ({"n": 17}, {}, "a resumable stream has 16"),
    ],
)
def test_what_cannot_be_resumed_is_refused_by_name(
    change: dict[str, Any], headers: dict[str, str], problem: str
) -> None:
    app = create_app(FakeSession(), config=GatewayConfig(n_max=32))
    body = MESSAGES | {"stream": True}
    event_id, _ = events_of(post(app, CHAT, body, x_pdserve_resumable="1"))[0]
    assert event_id is not None
    reply = post(app, CHAT, body | change, **({"last_event_id": event_id} | headers))
    assert reply.status == 400
    assert problem in reply.error()["message"]


def test_an_id_of_another_model_is_refused() -> None:
    body = MESSAGES | {"stream": True}
    app = create_app(FakeSession(), config=GatewayConfig())
    event_id, _ = events_of(post(app, CHAT, body, x_pdserve_resumable="1"))[0]
    other = FakeSession()
    other.identity = "other weights"
    reply = post(create_app(other, config=GatewayConfig()), CHAT, body, last_event_id=str(event_id))
    assert "belongs to another request, API key or model" in reply.error()["message"]


told = st.none() | st.builds(Told, st.integers(0, 2**31), st.integers(0, 2**31), st.booleans())


@given(
    st.builds(
        EventId,
        st.just("0" * 24),
        st.integers(0, 2**40),
        st.integers(0, 2**63 - 1),
        st.just("a" * 20),
        st.lists(told, min_size=1, max_size=16).map(tuple),
    )
)
def test_an_id_says_what_it_was_made_of(event_id: EventId) -> None:
    assert parse_event_id(str(event_id)) == event_id


@given(st.text())
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidField):
        parse_event_id(text)
