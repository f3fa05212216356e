"""Streams: which events there are, in which order, and how many writes they take."""

from typing import Any, cast

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.gateway.calls import Piece
from pdserve.cluster.http.answers import Chat, Choice, Completion
from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.asking import Asked
from pdserve.cluster.http.speech import Manner
from pdserve.cluster.http.streaming import Events
from pdserve.config import GatewayConfig
from pdserve.errors import WorkerLost
from pdserve.messages import FinishReason
from pdserve.text.tokenizer import Tokenizer
from tests.unit.cluster.asgi import post
from tests.unit.cluster.fake_session import FakeSession, FakeTokenizer, piece, said, steps

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


@pytest.fixture(scope="module")
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture(scope="module")
def app(session: FakeSession) -> FastAPI:
    return create_app(session, config=GatewayConfig())


@pytest.fixture(autouse=True)
def fresh(session: FakeSession) -> None:
    session.script = said("Hello", " world")


def deltas(events: list[Any], index: int = 0) -> list[Any]:
    return [
        choice["delta"]
        for event in events
        for choice in event["choices"]
        if choice["index"] == index
    ]


def test_a_chat_begins_with_the_role_and_ends_with_a_reason(app: FastAPI) -> None:
    reply = post(app, CHAT, ASK)
    events = reply.events()
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert deltas(events) == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": " world"},
    ]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "stop"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event and "pdserve" not in event for event in events)


def test_every_choice_has_a_role_of_its_own(app: FastAPI) -> None:
    events = post(app, CHAT, ASK | {"n": 3}).events()
    for index in range(3):
        said_ = deltas(events, index)
        assert said_[0] == {"role": "assistant", "content": ""}
        assert "".join(delta["content"] for delta in said_) == "Hello world"


def test_a_piece_without_text_says_nothing(app: FastAPI, session: FakeSession) -> None:
    session.script = steps(piece("a"), piece(""), piece("", finish=FinishReason.LENGTH))
    events = post(app, CHAT, ASK).events()
    assert deltas(events) == [{"role": "assistant", "content": ""}, {"content": "a"}, {}]
    session.script = steps(piece("a"), piece(""), piece("", finish=FinishReason.LENGTH))
    texts = [
        event["choices"][0]["text"]
        for event in post(app, COMPLETION, {"prompt": "x", "stream": True}).events()
    ]
    assert texts == ["a", ""]


def test_usage_and_timing_are_a_last_chunk_without_choices(app: FastAPI) -> None:
    *before, last = post(
        app, CHAT, ASK | {"stream_options": {"include_usage": True}, "include_timing": True}
    ).events()
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 11
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert last["pdserve"]["decode_worker"] == "decode-1"
    assert all(event["choices"] and event["usage"] is None for event in before)


def test_continuous_usage_counts_up(app: FastAPI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = post(app, CHAT, ASK | {"stream_options": options}).events()
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 11


def test_completion_chunks_and_their_logprobs(app: FastAPI) -> None:
    body = {"prompt": "x", "stream": True, "echo": True}
    events = post(app, COMPLETION, body).events()
    assert [event["choices"][0]["text"] for event in events] == ["xHello", " world"]
    scored = post(app, COMPLETION, {"prompt": "x", "stream": True, "logprobs": 0}).events()
    offsets = [o for e in scored for o in e["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == list(range(11))


def test_chat_logprobs_travel_with_their_chunk(app: FastAPI, session: FakeSession) -> None:
    events = post(app, CHAT, ASK | {"logprobs": True}).events()
    tokens = [
        score["token"]
        for event in events
        for score in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert "".join(tokens) == "Hello world"


def test_text_that_json_must_escape_arrives(app: FastAPI, session: FakeSession) -> None:
    text = 'quote " newline \n data: [DONE]\n\n emoji 🙂 line\u2028separator \x00'
    session.script = steps(piece(text), piece("", finish=FinishReason.STOP))
    assert deltas(post(app, CHAT, ASK).events())[1] == {"content": text}


def test_pieces_that_are_ready_together_leave_in_one_write(
    app: FastAPI, session: FakeSession
) -> None:
    session.script = said(*"abcdefgh")
    reply = post(app, CHAT, ASK)
    assert len(reply.events()) == 9
    assert len(reply.writes) == 2  # all pieces, then the end


def test_a_stream_begins_with_where_the_time_to_its_first_token_went(app: FastAPI) -> None:
    said = post(app, CHAT, ASK).headers["server-timing"]
    parts = [part.partition(";dur=") for part in said.split(", ")]
    assert [name for name, _, _ in parts] == ["queue", "prefill", "handoff", "first-token"]
    assert [float(length) for _, _, length in parts[:3]] == [1.5, 20.0, 0.7]
    whole = post(app, CHAT, ASK | {"stream": False}).headers["server-timing"]
    assert whole.startswith("queue;dur=1.500, prefill;dur=20.000, handoff;dur=0.700, first-token;")
    assert ", total;dur=" in whole


def test_an_error_in_mid_stream_is_an_event(app: FastAPI, session: FakeSession) -> None:
    session.script = steps(piece("Hel"), WorkerLost("they keep dying"))
    reply = post(app, CHAT, ASK)
    events = reply.events()
    assert reply.status == 200
    assert deltas(events[:-1])[-1] == {"content": "Hel"}
    assert events[-1]["error"]["message"] == "they keep dying"
    assert events[-1]["error"]["code"] == "worker_lost"


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("include_usage", [True, False])
@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=3), index=st.integers(0, 3))
def test_the_short_way_to_an_event_gives_the_same_bytes(
    texts: list[str], index: int, chat: bool, include_usage: bool
) -> None:
    dialect = (Chat if chat else Completion)(cast(Tokenizer, FakeTokenizer()), logprobs=False)
    events = Events(
        Asked("id-1", "m", (), 4, dialect, True, include_usage, False, False, False), created=7
    )
    choices = [Choice(each, started=True) for each in (0, index)]
    for text in texts:
        for choice in choices:
            said_ = Piece(choice.index, text, ())
            assert dialect.is_text(choice, said_)
            (chunk,) = dialect.chunks(choice, said_)
            assert events.text(choice, said_) == events.chunk(chunk)


def test_only_text_goes_the_short_way() -> None:
    tokenizer = cast(Tokenizer, FakeTokenizer())
    plain = Piece(0, "a", ())
    for make in (Chat, Completion):
        dialect = make(tokenizer, logprobs=False)
        started = Choice(0, started=True)
        assert dialect.is_text(started, plain)
        assert not dialect.is_text(Choice(0), plain)  # who speaks, or an echo, comes first
        assert not dialect.is_text(started, Piece(0, "", ()))
        assert not dialect.is_text(started, Piece(0, "a", (), FinishReason.LENGTH))
        assert not make(tokenizer, logprobs=True).is_text(started, plain)
        assert not make(tokenizer, logprobs=False, token_ids=True).is_text(started, plain)
    thinking = Chat(tokenizer, logprobs=False, manner=Manner(reasoning="deepseek_r1"))
    assert not thinking.is_text(Choice(0, started=True), plain)
