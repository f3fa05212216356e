"""``best_of`` and ``use_beam_search`` over HTTP: what is asked of the session, and what is told."""

from typing import Any

import pytest
from fastapi import FastAPI

from pdserve.cluster.gateway.calls import Call
from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from pdserve.messages import Beams, FinishReason, Token, TokenLogprob
from tests.unit.cluster.asgi import Reply, post
from tests.unit.cluster.fake_session import FakeSession, Step, piece, steps

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ASK: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    COMPLETION: {"prompt": "hi"},
}
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETION])


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture
def app(session: FakeSession) -> FastAPI:
    return create_app(session, config=GatewayConfig())


def only_call(session: FakeSession) -> Call:
    (call,) = session.calls
    return call


def choices(reply: Reply) -> list[dict[str, Any]]:
    assert reply.status == 200, reply.body
    found: list[dict[str, Any]] = reply.json()["choices"]
    return found


def drawn(*mean_logprobs: float) -> list[Step]:
    """Choices whose texts are "a", "bb", …, each token with the choice's logprob."""
    found: list[Step] = []
    for choice, logprob in enumerate(mean_logprobs):
        text = chr(ord("a") + choice) * (choice + 1)
        tokens = tuple(Token(byte, TokenLogprob(logprob)) for byte in text.encode())
        whole = piece(text, choice=choice, finish=FinishReason.STOP)
        found.append(type(whole)(choice, text, tokens, whole.finish, None, whole.timing))
    return found


@PATHS
def test_the_likeliest_per_token_are_given_best_first(
    app: FastAPI, session: FakeSession, path: str
) -> None:
    """The sums would say otherwise: the third has the lowest, and the second best mean."""
    session.script = steps(*drawn(-2.0, -0.1, -1.0, -3.0))
    found = choices(post(app, path, ASK[path] | {"n": 2, "best_of": 4}))
    texts = [c["text"] if path == COMPLETION else c["message"]["content"] for c in found]
    assert texts == ["bb", "ccc"]
    assert [choice["index"] for choice in found] == [0, 1]
    assert all(choice["logprobs"] is None for choice in found)
    call = only_call(session)
    assert (call.n, call.best_of, call.sampling.logprobs) == (4, None, 0)


def test_equally_likely_ones_stay_in_order(app: FastAPI, session: FakeSession) -> None:
    session.script = steps(*drawn(-1.0, -1.0, -1.0))
    found = choices(post(app, COMPLETION, ASK[COMPLETION] | {"n": 2, "best_of": 3}))
    assert [choice["text"] for choice in found] == ["a", "bb"]


def test_logprobs_that_were_asked_for_are_told(app: FastAPI, session: FakeSession) -> None:
    session.script = steps(*drawn(-2.0, -0.5))
    body = ASK[COMPLETION] | {"best_of": 2, "logprobs": 1}
    (choice,) = choices(post(app, COMPLETION, body))
    assert choice["logprobs"]["token_logprobs"] == [-0.5, -0.5]
    assert only_call(session).sampling.logprobs == 1


@PATHS
def test_as_many_as_are_given_are_only_drawn(app: FastAPI, session: FakeSession, path: str) -> None:
    post(app, path, ASK[path] | {"n": 2, "best_of": 2, "stream": True})
    call = only_call(session)
    assert (call.n, call.best_of, call.sampling.logprobs) == (2, None, None)


@pytest.mark.parametrize(
    ("fields", "beams"),
    [
        ({"n": 3}, Beams(3, 3)),
        ({"n": 2, "best_of": 5, "temperature": 0}, Beams(5, 2)),
        ({}, Beams(1, 1)),
        ({"n": 2, "length_penalty": 0.5, "early_stopping": True}, Beams(2, 2, 0.5, True)),
        ({"n": 2, "early_stopping": "never", "top_k": -1, "top_p": 1}, Beams(2, 2)),
    ],
)
@PATHS
def test_a_beam_search_is_asked_for(
    app: FastAPI, session: FakeSession, path: str, fields: dict[str, Any], beams: Beams
) -> None:
    found = choices(post(app, path, ASK[path] | {"use_beam_search": True} | fields))
    assert len(found) == beams.n
    call = only_call(session)
    assert (call.beams, call.best_of, call.n) == (beams, None, beams.n)
    assert call.request_count == 1
    assert call.sampling.temperature == 0.0
