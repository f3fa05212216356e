"""Decisions: the arithmetic of labels by properties, the API as clients speak it."""

import math
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.decisions.labels import (
    Label,
    Tokens,
    UnclearLabels,
    expected,
    labels_of,
    probabilities,
    stems_of,
)
from pdserve.config import GatewayConfig
from pdserve.prompt_tasks import Scoring
from tests.unit.cluster.asgi import get, post
from tests.unit.cluster.fake_session import MODEL, FakeSession

PATH = "/v1/decisions"


def in_bytes(text: str) -> Sequence[int]:
    return list(text.encode())


values = st.lists(
    st.booleans() | st.text("ab", min_size=1, max_size=3) | st.sampled_from(["true", '"a"']),
    min_size=2,
    max_size=6,
    unique_by=lambda value: (type(value), value),
)


@given(values=values)
def test_no_label_is_the_beginning_of_another(values: list[str | bool]) -> None:
    labels = labels_of(values, in_bytes)
    assert len(labels) == len(values)
    for index, one in enumerate(labels):
        for other in labels[index + 1 :]:
            shorter = min(len(one.tokens), len(other.tokens))
            assert one.tokens[:shorter] != other.tokens[:shorter]


@given(values=values, data=st.data())
def test_equal_values_are_refused(values: list[str | bool], data: st.DataObject) -> None:
    twice = [*values, data.draw(st.sampled_from(values))]
    with pytest.raises(UnclearLabels) as refused:
        labels_of(twice, in_bytes)
    assert twice.count(twice[refused.value.index]) > 1


def test_plain_words_stay_as_they_are() -> None:
    assert [label.text for label in labels_of(["yes", "no"], in_bytes)] == ["yes", "no"]
    assert [label.text for label in labels_of(["good", "good enough"], in_bytes)] == [
        '"good"',
        '"good enough"',
    ]
    assert [label.text for label in labels_of([True, "true"], in_bytes)] == ["true", '"true"']


def test_a_label_without_tokens_is_none() -> None:
    with pytest.raises(UnclearLabels):
        labels_of(["a", "b"], lambda _: [])


# A model of three tokens, whose distribution depends on all before.
def after(before: Tokens) -> list[float]:
    weights = [1.0 + (7 * sum(before) + 3 * len(before) + 5 * token) % 11 for token in range(3)]
    return [math.log(weight / math.fsum(weights)) for weight in weights]


prefix_free = st.sets(
    st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=2, max_size=6
).filter(lambda all_of: not any(a != b and b[: len(a)] == a for a in all_of for b in all_of))


@given(sequences=prefix_free)
def test_shares_are_the_models_own_given_one_of_the_labels(sequences: set[Tokens]) -> None:
    labels = [Label("", tokens) for tokens in sorted(sequences)]
    stems = stems_of(labels)
    found = {}
    for stem, behind in stems.items():
        before = math.fsum(after(stem[:at])[stem[at]] for at in range(len(stem)))
        found[stem] = (before, {token: after(stem)[token] for token in behind})
    truth = [
        math.exp(
            math.fsum(after(each.tokens[:at])[each.tokens[at]] for at in range(len(each.tokens)))
        )
        for each in labels
    ]
    shares = probabilities(labels, found)
    assert math.fsum(shares) == pytest.approx(1)
    assert shares == pytest.approx([each / math.fsum(truth) for each in truth])
    assert 0 <= expected(shares) <= len(shares) - 1
    assert sum(map(len, stems.values())) == len(labels)


def test_a_label_that_cannot_be_has_no_share() -> None:
    labels = [Label("a", (0,)), Label("b", (1,))]
    assert probabilities(labels, {(): (0.0, {0: -math.inf, 1: -3.0})}) == [0, 1]
    assert probabilities(labels, {(): (-math.inf, {0: -1.0, 1: -3.0})}) == [0.5, 0.5]


# ── the API ──────────────────────────────────────────────────────────────────────────────────────

ASKED = {"type": "predicate", "instructions": "Is it?"}
CHOICE = {"type": "choice", "instructions": "Which?", "choices": [{"value": "b"}, {"value": "a"}]}
SCORE = {
    "type": "score",
    "instructions": "How much?",
    "levels": [{"label": "low", "description": "hardly"}, {"label": "medium"}, {"label": "high"}],
}


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


def decided(session: FakeSession, **body: Any) -> dict[str, Any]:
    reply = post(create_app(session, config=GatewayConfig()), PATH, body)
    assert reply.status == 200, reply.body
    answer: dict[str, Any] = reply.json()
    return answer


def test_answers_come_in_the_order_of_questions(session: FakeSession) -> None:
    asked = [CHOICE | {"name": "x"}, ASKED, SCORE]
    said = decided(session, input="It is.", questions=asked)
    choice, predicate, score = said["answers"]
    assert said["model"] == MODEL
    assert (choice["type"], choice["name"], choice["choice"]) == ("choice", "x", "b")
    assert [each["value"] for each in choice["probabilities"]] == ["b", "a"]
    assert choice["confidence"] == choice["probabilities"][0]["probability"]
    assert (predicate["type"], predicate["name"]) == ("predicate", None)
    assert 0 < predicate["probability"] < 1
    assert [each["value"] for each in score["probabilities"]] == [0, 1, 2]
    assert [each["label"] for each in score["probabilities"]] == ["low", "medium", "high"]
    assert score["score"] == pytest.approx(
        sum(each["value"] * each["probability"] for each in score["probabilities"])
    )


def test_one_token_labels_are_one_pass_and_none_is_decoded(session: FakeSession) -> None:
    said = decided(session, input="It is.", questions=[CHOICE, CHOICE])
    assert len(session.calls) == 2
    for call in session.calls:
        assert call.stop.max_tokens == 0
        assert call.task == Scoring(first=len(call.prompt), candidates=(ord("b"), ord("a")))
    shares = [each["probability"] for each in said["answers"][0]["probabilities"]]
    # The session's second candidate is half a nat behind the first.
    assert shares[0] / shares[1] == pytest.approx(math.exp(0.5))
    used = said["usage"]
    assert used["input_tokens"] == sum(len(call.prompt) for call in session.calls)
    assert (used["output_tokens"], used["total_tokens"]) == (0, used["input_tokens"])


def test_all_prompts_begin_with_the_input(session: FakeSession) -> None:
    decided(session, input="A long story.", questions=[ASKED, CHOICE, SCORE])
    assert all(bytes(call.prompt).startswith(b"user: A long story.\n\n") for call in session.calls)
    stems = [call.task.first for call in session.calls if isinstance(call.task, Scoring)]
    labels = [bytes(call.prompt[at:]) for call, at in zip(session.calls, stems, strict=True)]
    assert labels == [b"ye", b"n", b"", b"lo", b"mediu", b"hig"]


def test_an_input_may_be_a_conversation(session: FakeSession) -> None:
    conversation = [
        {"role": "system", "content": "Judge."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"role": "user", "content": [{"type": "input_json", "data": {"a": [1]}}]},
        {"role": "assistant", "content": "ho"},
    ]
    question = ASKED | {"instructions": [{"type": "input_text", "text": "Polite?"}]}
    decided(session, input=conversation, questions=[question])
    told = bytes(session.calls[0].prompt).decode()
    assert told.startswith(
        'system: Judge.\nuser: hi\nuser: {"a":[1]}\nassistant: ho\nuser: Polite?'
    )


def question(**fields: Any) -> dict[str, Any]:
    return {"input": "x", "questions": [fields]}


def choices(*given: Any) -> dict[str, Any]:
    return question(type="choice", instructions="?", choices=[{"value": each} for each in given])


def levels(*given: Any) -> dict[str, Any]:
    return question(type="score", instructions="?", levels=[{"label": each} for each in given])


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"questions": [ASKED]}, "input", "missing"),
        ({"input": "x"}, "questions", "missing"),
        ({"input": "x", "questions": []}, "questions", "at least 1"),
        ({"input": "x", "questions": [ASKED] * 201}, "questions", "at most 200"),
        ({"input": "x", "questions": [ASKED], "inptu": 1}, "inptu", "not known"),
        ({"input": "x", "questions": [ASKED], "x" * 9999: 1}, None, "not known"),
        ({"input": "x", "questions": [ASKED], "cache_salt": "a"}, "cache_salt", "not known"),
        ({"input": "x", "questions": [ASKED], "service_tier": "a"}, "service_tier", "one of"),
        ({"input": [], "questions": [ASKED]}, "input", "items"),
        ({"input": [{"role": "x"}], "questions": [ASKED]}, "input.0.role", "one of"),
        ({"input": 3, "questions": [ASKED]}, "input", "text or a list"),
        ({"input": "x", "questions": [3]}, "questions.0.type", "one of predicate"),
        (question(type="oracle", instructions="?"), "questions.0.type", "one of predicate"),
        (question(type="predicate"), "questions.0.instructions", "missing"),
        (question(type="predicate", instructions=""), "questions.0.instructions", "empty"),
        (question(type="predicate", instructions=[3]), "questions.0.instructions.0", "input_text"),
        (question(**ASKED, choices=[]), "questions.0.choices", "not known"),
        (question(**ASKED, name=3), "questions.0.name", "string"),
        (choices("a"), "questions.0.choices", "at least 2"),
        (choices(*map(str, range(256))), "questions.0.choices", "at most 255"),
        (choices("a", ""), "questions.0.choices.1.value", "at least 1"),
        (choices("a", "x" * 257), "questions.0.choices.1.value", "at most 256"),
        (choices("a", 1), "questions.0.choices.1.value", "valid"),
        (choices("a", "b", "a"), "questions.0.choices.2", "no answer of its own"),
        (
            question(type="choice", instructions="?", choices=["a", "b"]),
            "questions.0.choices.0",
            "Input should be an object",
        ),
        (levels("a"), "questions.0.levels", "at least 2"),
        (levels(*map(str, range(11))), "questions.0.levels", "at most 10"),
        (levels("a", "a"), "questions.0.levels.1", "no answer of its own"),
        (
            question(type="score", instructions="?", levels=[{"label": "a", "value": 1}] * 2),
            "questions.0.levels.0.value",
            "not known",
        ),
        ({"input": "x" * 2000, "questions": [ASKED]}, "questions.0", "context"),
    ],
)
def test_what_cannot_be_asked_is_named(
    session: FakeSession, body: dict[str, Any], param: str | None, says: str
) -> None:
    reply = post(create_app(session, config=GatewayConfig()), PATH, body)
    assert reply.status == 400, reply.body
    assert len(reply.body) < 2000
    error = reply.error()
    assert param is None or error["param"] == param, error
    assert says in error["message"], error
    assert session.calls == []


def test_labels_that_begin_in_too_many_ways_are_refused(session: FakeSession) -> None:
    many = CHOICE | {"choices": [{"value": f"{number:03d}"} for number in range(255)]}
    body = {"input": "x", "questions": [many] * 170}
    reply = post(create_app(session, config=GatewayConfig()), PATH, body)
    assert (reply.status, reply.error()["param"]) == (400, "questions")
    assert "at most 4096" in reply.error()["message"]


def test_every_optional_field_may_be_null(session: FakeSession) -> None:
    app = create_app(session, config=GatewayConfig())
    schema = get(app, "/openapi.json").json()["components"]["schemas"]["DecisionRequest"]
    nulls = dict.fromkeys(schema["properties"], None)
    asked = ASKED | {"name": None}
    assert post(app, PATH, nulls | {"input": "x", "questions": [asked]}).status == 200
