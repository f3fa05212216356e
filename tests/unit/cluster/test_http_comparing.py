"""Scores of pairs and reranking: the arithmetic by properties, the bodies as clients send them."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.comparing.similarity import cosine, ranked, scores_of_pairs
from pdserve.config import GatewayConfig
from pdserve.prompt_tasks import Pooling
from tests.unit.cluster.asgi import get, post
from tests.unit.cluster.fake_session import MODEL, FakeSession

number = st.floats(-1e3, 1e3, width=32)
vector = st.lists(number, min_size=3, max_size=3).map(lambda each: np.array(each, np.float32))


@given(one=vector, other=vector, factor=st.sampled_from([0.5, 2.0, 1024.0]))
def test_a_cosine_knows_directions_only(
    one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], factor: float
) -> None:
    score = cosine(one, other)
    assert -1 <= score <= 1
    assert score == cosine(other, one)
    # Lengths so small that float32 loses them are no lengths to scale.
    if min(np.linalg.norm(one), np.linalg.norm(other)) > 1e-3:
        assert cosine(one * np.float32(factor), other) == pytest.approx(score, abs=1e-6)
        assert cosine(-one, other) == pytest.approx(-score, abs=1e-12)
        assert cosine(one, one) == pytest.approx(1)


def test_what_has_no_length_is_like_nothing() -> None:
    assert cosine(np.zeros(3, np.float32), np.ones(3, np.float32)) == 0


@given(scores=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0])), top=st.integers(1, 9) | st.none())
def test_the_best_come_first_and_equals_as_they_came(scores: list[float], top: int | None) -> None:
    order = ranked(scores, top)
    assert len(order) == (len(scores) if top is None else min(top, len(scores)))
    assert order == sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: len(order)]
    assert set(order) <= set(range(len(scores)))


@given(left=st.lists(vector, min_size=1, max_size=4), right=st.lists(vector, min_size=1))
def test_one_text_is_compared_with_each(
    left: list[np.ndarray[Any, Any]], right: list[np.ndarray[Any, Any]]
) -> None:
    assert scores_of_pairs(left[:1], right) == [cosine(left[0], each) for each in right]
    pairs = list(zip(left, right, strict=False))
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    if len(pairs) > 1:
        assert scores_of_pairs(ours, theirs) == [cosine(a, b) for a, b in pairs]


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


def asked(session: FakeSession, path: str, **body: Any) -> dict[str, Any]:
    reply = post(create_app(session, config=GatewayConfig()), path, body)
    assert reply.status == 200, reply.body
    answer: dict[str, Any] = reply.json()
    return answer


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents")])
def test_each_text_is_embedded_once(
    session: FakeSession, path: str, names: tuple[str, str]
) -> None:
    answer = asked(session, path, **dict(zip(names, ("ab", ["c", "de", "f"]), strict=True)))
    assert [each["index"] for each in answer["data"]] == [0, 1, 2]
    assert [each["score"] for each in answer["data"]] == pytest.approx([1, 1, 1])
    assert (answer["object"], answer["model"]) == ("list", MODEL)
    assert answer["usage"]["prompt_tokens"] == 6
    assert [bytes(call.prompt) for call in session.calls] == [b"ab", b"c", b"de", b"f"]
    assert all(isinstance(call.task, Pooling) for call in session.calls)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_documents_come_in_order(session: FakeSession, path: str) -> None:
    documents: list[Any] = ["one", {"text": "two"}, "three"]
    answer = asked(session, path, query="q", documents=documents, top_n=2)
    assert [each["index"] for each in answer["results"]] == [0, 1]
    assert [each["document"]["text"] for each in answer["results"]] == ["one", "two"]
    assert answer["usage"]["total_tokens"] == len("qonetwothree")
    bare = asked(session, path, query="q", documents=documents, top_n=0, return_documents=False)
    assert len(bare["results"]) == 3
    assert all("document" not in each for each in bare["results"])


def test_the_first_tokens_of_a_document_count(session: FakeSession) -> None:
    limits = {"max_tokens_per_doc": 2, "max_tokens_per_query": 3}
    asked(session, "/rerank", query="query", documents=["document"], **limits)
    assert [bytes(call.prompt) for call in session.calls] == [b"que", b"do"]


DOCUMENTS = ["a", "b"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/score", {}, "text_1"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_2": "a"}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "queries": "c"}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": ["c"] * 2048}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": ["c", 1]}, "text_2.1"),
        ("/v1/score", {"text_1": "a", "text_2": ["c", ""]}, "text_2.1"),
        ("/rerank", {"query": "q"}, "documents"),
        ("/rerank", {"documents": DOCUMENTS}, "query"),
        ("/rerank", {"query": "q", "documents": []}, "documents"),
        ("/rerank", {"query": "q", "documents": "a"}, "documents"),
        ("/rerank", {"query": "q", "documents": ["a", {"title": "b"}]}, "documents.1.text"),
        ("/rerank", {"query": "q", "documents": ["a"] * 2048}, "documents"),
        ("/rerank", {"query": "", "documents": DOCUMENTS}, "query"),
        ("/rerank", {"query": "q", "documents": DOCUMENTS, "top_n": -1}, "top_n"),
        ("/rerank", {"query": "q", "documents": DOCUMENTS, "rank_fields": ["a"]}, "rank_fields"),
        ("/rerank", {"query": "q", "documents": DOCUMENTS, "instruction": "x"}, "instruction"),
        (
            "/rerank",
            {"query": "q", "documents": DOCUMENTS, "max_tokens_per_doc": 0},
            "max_tokens_per_doc",
        ),
        ("/rerank", {"query": "q", "documents": DOCUMENTS, "service_tier": "x"}, "service_tier"),
        ("/rerank", {"query": "q", "documents": ["x" * 2000]}, "documents.0"),
    ],
)
def test_what_cannot_be_compared_is_named(
    session: FakeSession, path: str, body: dict[str, Any], param: str
) -> None:
    reply = post(create_app(session, config=GatewayConfig()), path, body)
    assert reply.status == 400, reply.body
    assert reply.error()["param"] == param
    assert session.calls == []


def test_every_optional_field_may_be_null(session: FakeSession) -> None:
    app = create_app(session, config=GatewayConfig())
    schemas = get(app, "/openapi.json").json()["components"]["schemas"]
    for path, name, body in (
        ("/v1/score", "ScoreRequest", {"text_1": "a", "text_2": "b"}),
        ("/v1/rerank", "RerankRequest", {"query": "a", "documents": ["b"]}),
    ):
        nulls = dict.fromkeys(schemas[name]["properties"], None)
        assert post(app, path, nulls | body).status == 200
