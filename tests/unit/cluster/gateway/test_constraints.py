"""Every field that can ask for a constraint, over HTTP and gRPC, and what the call carries then."""

import asyncio
import json
import threading
from typing import Any

import pytest
from fastapi import FastAPI

from pdserve.cluster.gateway import constraints
from pdserve.cluster.gateway.parameters import Parameters
from pdserve.cluster.http.app import create_app
from pdserve.cluster.rpc.requests import chat_call, generate_call
from pdserve.config import GatewayConfig
from pdserve.errors import InvalidField
from pdserve.messages import Constraint, ConstraintKind
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.text.grammar import Grammars
from tests.unit.cluster.asgi import post
from tests.unit.cluster.fake_session import FakeSession

SCHEMA = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "integer"}}}
SCHEMA_TEXT = json.dumps(SCHEMA, separators=(",", ":"))
CONFIG = GatewayConfig()

BY_SCHEMA = Constraint(ConstraintKind.JSON_SCHEMA, SCHEMA_TEXT)
ANY_OBJECT = Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "object"}')
REGEX = Constraint(ConstraintKind.REGEX, "[ab]+")
CHOICE = Constraint(ConstraintKind.CHOICE, '["yes", "n\\u00f6"]')
LARK = Constraint(ConstraintKind.LARK, 'start: "a" start?')


@pytest.fixture(scope="module")
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture(scope="module")
def app(session: FakeSession) -> FastAPI:
    return create_app(session, config=CONFIG)


def openai_schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, **fields}}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": None, "guided_json": None, "structured_outputs": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        ({"response_format": openai_schema()}, BY_SCHEMA),
        ({"response_format": openai_schema(strict=True, description="d")}, BY_SCHEMA),
        ({"response_format": {"type": "text"}, "guided_regex": "[ab]+"}, REGEX),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, BY_SCHEMA),
        ({"structured_outputs": {"json": SCHEMA_TEXT, "disable_fallback": False}}, BY_SCHEMA),
        ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
        ({"structured_outputs": {"regex": "[ab]+"}}, REGEX),
        ({"structured_outputs": {"choice": ["yes", "nö"]}}, CHOICE),
        ({"structured_outputs": {"grammar": LARK.text}}, LARK),
        ({"guided_json": SCHEMA}, BY_SCHEMA),
        ({"guided_json": SCHEMA_TEXT}, BY_SCHEMA),
        ({"guided_regex": "[ab]+"}, REGEX),
        ({"guided_choice": ["yes", "nö"]}, CHOICE),
        ({"guided_grammar": LARK.text}, LARK),
    ],
)
def test_each_field_becomes_the_calls_constraint(
    app: FastAPI,
    session: FakeSession,
    path: str,
    fields: dict[str, Any],
    expected: Constraint | None,
) -> None:
    session.calls.clear()
    prompt = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi"}
    reply = post(app, path, prompt | fields)
    assert reply.status == 200, reply.body
    (call,) = session.calls
    assert call.sampling.constraint == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (pb.Constraint(json=SCHEMA_TEXT), BY_SCHEMA),
        (pb.Constraint(json_object=True), ANY_OBJECT),
        (pb.Constraint(regex="[ab]+"), REGEX),
        (pb.Constraint(choice=pb.Choice(texts=["yes", "nö"])), CHOICE),
        (pb.Constraint(grammar=LARK.text), LARK),
    ],
)
def test_each_kind_over_grpc(asked: pb.Constraint, expected: Constraint) -> None:
    session, parameters = FakeSession(), pb.Parameters(constraint=asked)
    message = pb.ChatMessage(role="user", content="hi")
    chat = pb.ChatRequest(messages=[message], parameters=parameters)
    text = pb.GenerateRequest(text="x", parameters=parameters)
    calls = (
        chat_call(session, CONFIG, chat, 1.0, None),
        generate_call(session, CONFIG, text, 1.0, None),
    )
    assert {asyncio.run(call).sampling.constraint for call in calls} == {expected}


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (pb.Constraint(), "constraint"),
        (pb.Constraint(json_object=False), "constraint"),
        (pb.Constraint(json="{"), "constraint.json"),
        (pb.Constraint(regex="(a"), "constraint.regex"),
        (pb.Constraint(choice=pb.Choice()), "constraint.choice"),
    ],
)
def test_a_bad_constraint_over_grpc_is_named(asked: pb.Constraint, field: str) -> None:
    request = pb.GenerateRequest(text="x", parameters=pb.Parameters(constraint=asked))
    with pytest.raises(InvalidField) as refused:
        asyncio.run(generate_call(FakeSession(), CONFIG, request, 1.0, None))
    assert refused.value.field == field


def test_a_refusal_says_what_the_compiler_says(app: FastAPI) -> None:
    body = {"prompt": "x", "guided_json": {"type": "array", "uniqueItems": True}}
    error = post(app, "/v1/completions", body).error()
    assert error["param"] == "guided_json"
    assert "uniqueItems" in error["message"]


def test_what_takes_too_long_to_compile_is_refused_and_others_are_served_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constraints, "CHECK_S_MAX", 0.05)
    given_up = threading.Event()

    class Slow(Grammars):
        def check(self, constraint: Constraint) -> None:
            assert given_up.wait(30)

    async def both() -> list[str]:
        order: list[str] = []

        async def slow() -> None:
            asked = Parameters(constraint=REGEX, constraint_field="guided_regex")
            with pytest.raises(InvalidField, match="takes more than") as refused:
                await constraints.check(Slow(FakeSession().tokenizer), asked)
            assert refused.value.field == "guided_regex"
            order.append("refused")
            given_up.set()

        async def other() -> None:
            order.append("other")

        await asyncio.gather(slow(), other())
        return order

    assert asyncio.run(both()) == ["other", "refused"]
