"""What is asked of prompts over HTTP: vectors, echoes with logprobs, prompt logprobs."""

import base64
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI

from pdserve.cluster.gateway.calls import Piece
from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from pdserve.errors import QueueFull
from pdserve.messages import FinishReason, Token, TokenLogprob
from pdserve.prompt_tasks import Pooling, PoolingKind, Scoring
from tests.unit.cluster.asgi import Reply, post
from tests.unit.cluster.fake_session import MODEL, TIMING, VECTOR, FakeSession, said, steps

CHAT, COMPLETION, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture(scope="module")
def app(session: FakeSession) -> FastAPI:
    return create_app(session, config=GatewayConfig())


@pytest.fixture(autouse=True)
def fresh(session: FakeSession) -> None:
    session.calls.clear()
    session.script = said("Hello", " world")


def whole(reply: Reply) -> dict[str, Any]:
    assert reply.status == 200, reply.body
    answer: dict[str, Any] = reply.json()
    return answer


# ── vectors ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ],
)
def test_each_input_is_a_call_of_its_own(
    app: FastAPI, session: FakeSession, given: Any, prompts: list[bytes]
) -> None:
    answer = whole(post(app, EMBEDDINGS, {"input": given, "user": "ann", "model": None}))
    assert sorted(bytes(call.prompt) for call in session.calls) == sorted(prompts)
    assert {call.task for call in session.calls} == {Pooling()}
    assert {call.tenant for call in session.calls} == {"ann"}
    assert (answer["object"], answer["model"]) == ("list", MODEL)
    assert answer["data"] == [
        {"object": "embedding", "index": index, "embedding": VECTOR.tolist()}
        for index in range(len(prompts))
    ]
    count = sum(map(len, prompts))
    assert answer["usage"] == {
        "prompt_tokens": count,
        "total_tokens": count,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": TIMING.cached_tokens * len(prompts)},
    }


def test_more_inputs_than_run_at_once_come_in_order(app: FastAPI, session: FakeSession) -> None:
    answer = whole(post(app, EMBEDDINGS, {"input": ["a" * n for n in range(1, 101)]}))
    assert [each["index"] for each in answer["data"]] == list(range(100))
    assert len(session.calls) == 100


def test_formats_of_a_vector(app: FastAPI) -> None:
    body = {"input": "a", "encoding_format": "base64", "dimensions": 2}
    (data,) = whole(post(app, EMBEDDINGS, body))["data"]
    vector = np.frombuffer(base64.b64decode(data["embedding"]), "<f4")
    np.testing.assert_allclose(vector, [0.5**0.5, -(0.5**0.5)], rtol=1e-6)
    (raw,) = whole(post(app, EMBEDDINGS, {"input": "a", "dimensions": 2, "normalize": False}))[
        "data"
    ]
    assert raw["embedding"] == [0.5, -0.5]


def test_null_says_nothing(app: FastAPI) -> None:
    names = ("encoding_format", "dimensions", "user", "truncate_prompt_tokens", "normalize")
    assert whole(post(app, EMBEDDINGS, {"input": "a", **dict.fromkeys(names)}))


def test_the_configuration_says_what_is_pooled(session: FakeSession) -> None:
    app = create_app(session, config=GatewayConfig(pooling="mean"))
    whole(post(app, EMBEDDINGS, {"input": "abc", "truncate_prompt_tokens": 2}))
    (call,) = session.calls
    assert (call.task, bytes(call.prompt)) == (Pooling(PoolingKind.MEAN), b"bc")


def test_a_full_context_has_a_vector(app: FastAPI) -> None:
    """Nothing has to fit behind it."""
    assert whole(post(app, EMBEDDINGS, {"input": "a" * 1000}))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [""]}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": 5}, "input"),
        ({"input": {}}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1, -1]}, "input.1"),
        ({"input": [[1], [1 << 40]]}, "input.1.0"),
        ({"input": ["a", 1]}, "input.1"),
        ({"input": "a" * 1001}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "encoding_format": "bytes"}, "encoding_format"),
        ({"input": "a", "encoding_format": 1}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 5}, "dimensions"),
        ({"input": "a", "dimensions": 1 << 70}, "dimensions"),
        ({"input": "a", "dimensions": True}, "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "user": "x" * 257}, "user"),
        ({"input": "a", "service_tier": "soon"}, "service_tier"),
        ({"input": "a", "embed_dtype": "float16"}, "embed_dtype"),
        ({"input": "a", "normalize": 1}, "normalize"),
    ],
)
def test_a_bad_field_is_named(app: FastAPI, fields: dict[str, Any], param: str) -> None:
    reply = post(app, EMBEDDINGS, fields)
    assert reply.status == 400, reply.body
    assert reply.error()["param"] == param


def test_an_unknown_model_is_404_and_a_refusal_says_when(
    app: FastAPI, session: FakeSession
) -> None:
    assert post(app, EMBEDDINGS, {"input": "a", "model": "other"}).status == 404
    session.fails = QueueFull("full", retry_after_ms=1500)
    try:
        reply = post(app, EMBEDDINGS, {"input": ["a", "b"]})
    finally:
        session.fails = None
    assert (reply.status, reply.headers["retry-after"]) == (503, "2")
    assert session.open == set()


# ── echoes and prompt logprobs ───────────────────────────────────────────────────────────────────


def test_an_echo_with_logprobs_begins_with_the_prompts(app: FastAPI, session: FakeSession) -> None:
    body = {"prompt": ["abc", [100]], "echo": True, "logprobs": 1, "n": 2}
    answer = whole(post(app, COMPLETION, body))
    assert {call.task for call in session.calls} == {Scoring(1)}
    choices = answer["choices"]
    assert [choice["text"] for choice in choices] == ["abcHello world"] * 2 + ["dHello world"] * 2
    for choice in choices[:2]:
        told = choice["logprobs"]
        assert told["tokens"] == list("abcHello world")
        assert told["text_offset"] == list(range(14))
        assert told["token_logprobs"][:4] == [None, -0.25, -0.5, -0.5]
        assert told["top_logprobs"][:3] == [None, {"b": -0.25}, {"c": -0.5}]
    assert choices[2]["logprobs"]["token_logprobs"][:2] == [None, -0.5]
    assert choices[0].get("prompt_logprobs") is None


def test_a_streamed_echo_says_the_same(app: FastAPI) -> None:
    body = {"prompt": "abc", "echo": True, "logprobs": 1}
    (choice,) = whole(post(app, COMPLETION, body))["choices"]
    events = post(app, COMPLETION, body | {"stream": True}).events()
    chunks = [chunk for event in events for chunk in event["choices"]]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    for name, values in choice["logprobs"].items():
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == values


def test_an_echo_may_be_all(app: FastAPI, session: FakeSession) -> None:
    body = {"prompt": "abc", "echo": True, "max_tokens": 0}
    (choice,) = whole(post(app, COMPLETION, body))["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("abc", "length", None)
    scored = whole(post(app, COMPLETION, body | {"logprobs": 0}))
    assert scored["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.25, -0.5]
    assert scored["usage"]["completion_tokens"] == 0
    assert [call.task for call in session.calls] == [None, Scoring(0)]


def test_prompt_logprobs_are_vllms(app: FastAPI) -> None:
    (choice,) = whole(post(app, COMPLETION, {"prompt": "abc", "prompt_logprobs": 2}))["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -0.25, "rank": 2, "decoded_token": "b"},
            "97": {"logprob": -0.75, "rank": 2, "decoded_token": "a"},
        },
        {
            "99": {"logprob": -0.5, "rank": 2, "decoded_token": "c"},
            "98": {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
        },
    ]
    assert choice["logprobs"] is None
    chat = whole(post(app, CHAT, {"messages": MESSAGES, "prompt_logprobs": 0}))
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in whole(post(app, CHAT, {"messages": MESSAGES}))


def test_more_best_are_scored_than_an_echo_shows(app: FastAPI, session: FakeSession) -> None:
    body = {"prompt": "ab", "echo": True, "logprobs": 1, "prompt_logprobs": 3}
    (choice,) = whole(post(app, COMPLETION, body))["choices"]
    assert session.calls[0].task == Scoring(3)
    assert len(choice["logprobs"]["top_logprobs"][1]) == 1
    assert len(choice["prompt_logprobs"][1]) == 3


def test_the_best_of_several_has_its_prompts_scores(app: FastAPI, session: FakeSession) -> None:
    """Not the first one, with which they came."""
    session.script = steps(
        *(
            Piece(choice, "x", (Token(120, TokenLogprob(-9.0 + choice)),), FinishReason.STOP)
            for choice in range(3)
        )
    )
    body = {"prompt": "abc", "best_of": 3, "echo": True, "logprobs": 0}
    (choice,) = whole(post(app, COMPLETION, body))["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.5, -7.0]


def test_a_truncated_prompt_is_its_end(app: FastAPI, session: FakeSession) -> None:
    body = {"prompt": "abcdef", "truncate_prompt_tokens": 2, "echo": True}
    (choice,) = whole(post(app, COMPLETION, body))["choices"]
    assert (bytes(session.calls[0].prompt), choice["text"]) == (b"ef", "efHello world")
    whole(post(app, CHAT, {"messages": MESSAGES, "truncate_prompt_tokens": 3}))
    assert bytes(session.calls[1].prompt) == b"t: "
    whole(post(app, COMPLETION, {"prompt": "a" * 1500, "truncate_prompt_tokens": -1}))
    assert len(session.calls[2].prompt) == 999
