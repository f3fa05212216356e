"""The Messages API over HTTP: its answers, its errors, and what it shares with chats."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from pdserve.cluster.gateway.access import Doorkeeper, Key, KeyFile, digest_of, write_keys
from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from pdserve.errors import (
    DeadlineExceeded,
    Forbidden,
    GatewayLeaving,
    PdserveError,
    PoisonRequest,
    QueueFull,
    RateLimited,
    StepFailed,
    WorkerLost,
)
from pdserve.messages import FinishReason, ServiceClass
from tests.unit.cluster.asgi import Reply, ask, post
from tests.unit.cluster.fake_session import MODEL, FakeSession, piece, said, steps

PATH = "/v1/messages"
COUNT = f"{PATH}/count_tokens"
HI = [{"role": "user", "content": "hi"}]
BODY = {"model": MODEL, "max_tokens": 20, "messages": HI}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
BODY_BYTES_MAX = 1 << 20


@pytest.fixture
def session() -> FakeSession:
    return FakeSession(said("Hello", " world"))


@pytest.fixture
def app(session: FakeSession) -> FastAPI:
    config = GatewayConfig(
        body_bytes_max=BODY_BYTES_MAX, tool_call_parser="hermes", reasoning_parser="qwen3"
    )
    return create_app(session, config=config)


def events_of(reply: Reply) -> list[dict[str, Any]]:
    """The events of a stream, whose names are their types."""
    events = []
    *frames, rest = reply.body.decode().split("\n\n")
    assert rest == ""
    for frame in frames:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def refused(reply: Reply, status: int, kind: str) -> dict[str, Any]:
    assert reply.status == status, reply.body
    tree: dict[str, Any] = reply.json()
    assert set(tree) == {"type", "error", "request_id"}
    assert tree["type"] == "error"
    error: dict[str, Any] = tree["error"]
    assert error["type"] == kind
    assert error["message"]
    assert tree["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]
    assert len(reply.body) < 2000  # whatever was sent, little of it comes back
    return error


def test_a_message_whole(app: FastAPI) -> None:
    reply = post(app, PATH, BODY)
    message = reply.json()
    assert reply.status == 200
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "Hello world"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len("user: hi\nassistant: ") - 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": len("Hello world"),
            "output_tokens_details": {"thinking_tokens": 0},
            "service_tier": "standard",
        },
    }
    assert reply.headers["request-id"] == reply.headers["x-request-id"]
    assert "x-pdserve-timing" in reply.headers


def test_a_message_streamed_is_the_same(app: FastAPI) -> None:
    whole = post(app, PATH, BODY).json()
    reply = post(app, PATH, BODY | {"stream": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["request-id"]
    events = events_of(reply)
    assert [event["type"] for event in events] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    message = events[0]["message"]
    assert message["stop_reason"] is None
    assert message["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert message["usage"]["service_tier"] == "standard"
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"].items() <= whole["usage"].items()


def test_the_call_is_a_chats(app: FastAPI, session: FakeSession) -> None:
    own = {
        "system": "brief",
        "stop_sequences": ["x"],
        "metadata": {"user_id": "ann"},
        "service_tier": "flex",
    }
    same = {"temperature": 0.5, "top_k": 7, "top_p": 0.5, "seed": 3, "min_p": 0.25}
    post(app, PATH, BODY | same | own)
    messages = [{"role": "system", "content": "brief"}, *HI]
    chat = {"messages": messages, "stop": ["x"], "user": "ann", "service_tier": "flex"}
    post(app, "/v1/chat/completions", BODY | same | chat)
    ours, chats = session.calls
    assert ours.tenant == "ann"
    assert ours.service_class is ServiceClass.BATCH
    for name in ("prompt", "sampling", "stop", "seed", "tenant", "service_class", "n"):
        assert getattr(ours, name) == getattr(chats, name), name


def test_a_tool_is_called(app: FastAPI, session: FakeSession) -> None:
    session.script = said('[{"name": "f", "argu', 'ments": {"x": 1}}]')
    body = BODY | {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}
    message = post(app, PATH, body).json()
    (block,) = message["content"]
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "f", {"x": 1})
    assert message["stop_reason"] == "tool_use"
    constraint = session.calls[0].sampling.constraint
    assert constraint is not None
    assert '"maxItems":1' in constraint.text


def test_a_format_is_followed(app: FastAPI, session: FakeSession) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    config = {"format": {"type": "json_schema", "schema": schema}}
    assert post(app, PATH, BODY | {"output_config": config}).status == 200
    constraint = session.calls[0].sampling.constraint
    assert constraint is not None
    assert json.loads(constraint.text) == schema


def test_thoughts_are_blocks(app: FastAPI, session: FakeSession) -> None:
    session.script = said("<think>", "hm", "</think>", "so")
    thinking = {"type": "adaptive", "display": "omitted"}
    for more, thought in (({}, "hm"), ({"thinking": thinking}, "")):
        content = post(app, PATH, BODY | more).json()["content"]
        assert [block["type"] for block in content] == ["thinking", "text"]
        assert content[0]["thinking"] == thought
        streamed = events_of(post(app, PATH, BODY | more | {"stream": True}))
        deltas = [event["delta"] for event in streamed if event["type"] == "content_block_delta"]
        assert "".join(delta.get("thinking", "") for delta in deltas) == thought


def test_the_context_ends_before_the_answer(app: FastAPI, session: FakeSession) -> None:
    session.script = said("Hello", finish=FinishReason.LENGTH)
    assert post(app, PATH, BODY).json()["stop_reason"] == "max_tokens"
    full = post(app, PATH, BODY | {"max_tokens": session.context_tokens}).json()
    assert full["stop_reason"] == "model_context_window_exceeded"


def test_why_is_said_where_it_is_asked_for(app: FastAPI) -> None:
    whole = post(app, PATH, BODY, x_pdserve_why="1").json()
    assert whole["pdserve"]["prefill_worker"] == "prefill-1"
    streamed = events_of(post(app, PATH, BODY | {"stream": True, "include_timing": True}))
    assert streamed[-2]["pdserve"]["prefill_worker"] == "prefill-1"


def test_tokens_are_counted_also_where_they_are_too_many(
    app: FastAPI, session: FakeSession
) -> None:
    body = {"model": MODEL, "messages": HI, "system": "brief", "tools": [TOOL]}
    counted = post(app, COUNT, body).json()
    used = post(app, PATH, body | {"max_tokens": 5}).json()["usage"]
    total = used["input_tokens"] + used["cache_read_input_tokens"]
    assert counted == {"input_tokens": total}
    long = [{"role": "user", "content": "x" * 5000}]
    assert post(app, COUNT, {"messages": long}).json()["input_tokens"] > session.context_tokens
    error = refused(post(app, PATH, BODY | {"messages": long}), 400, "invalid_request_error")
    assert error["details"] == {"error_code": "context_length_exceeded", "field": "messages"}


# ── errors ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [*HI, {"role": "assistant", "content": "I"}]}, "messages.1"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences.1"),
        ({"stop_sequences": ["x"] * 1000}, "stop_sequences"),
        ({"stop_sequences": [5]}, "stop_sequences.0"),
        ({"metadata": {"user_id": "x" * 300}}, "metadata.user_id"),
        ({"metadata": "ann"}, "metadata"),
        ({"system": 5}, "system"),
        ({"stream": 1}, "stream"),
        ({"model": 5}, "model"),
        ({"service_tier": ""}, "service_tier"),
        ({"tools": "f"}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools.1.name"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name"),
        ({"tools": [{**TOOL, "description": 5}]}, "tools.0.description"),
        ({"tools": [{**TOOL, "input_schema": []}]}, "tools.0.input_schema"),
        ({"tools": [TOOL] * 200}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
        (
            {
                "tools": [{**TOOL, "input_schema": {"type": "objekt"}}],
                "tool_choice": {"type": "any"},
            },
            "tools",
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
            "output_config.format.schema",
        ),
        ({"seed": 2**63}, "seed"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"container": "c"}, "container"),
    ],
)
def test_a_bad_field_is_named(
    app: FastAPI, session: FakeSession, fields: dict[str, Any], field: str
) -> None:
    error = refused(post(app, PATH, BODY | fields), 400, "invalid_request_error")
    assert error["details"]["field"] == field, error
    assert session.calls == []


@pytest.mark.parametrize("path", [PATH, COUNT])
def test_what_is_no_request_is_refused_in_this_shape(app: FastAPI, path: str) -> None:
    unknown = refused(post(app, path, BODY | {"model": "x"}), 404, "not_found_error")
    assert unknown["details"] == {"error_code": "model_not_found", "field": "model"}
    refused(post(app, path, b"{"), 400, "invalid_request_error")
    refused(post(app, path, [1]), 400, "invalid_request_error")
    refused(post(app, path, b" " * (BODY_BYTES_MAX + 1)), 413, "request_too_large")
    text = ask(app, "POST", path, b"{}", headers={"content-type": "text/plain"})
    refused(text, 415, "invalid_request_error")
    got = ask(app, "GET", path, b"")
    refused(got, 405, "invalid_request_error")
    assert got.headers["allow"] == "POST"
    deep = b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}"
    refused(post(app, path, deep), 400, "invalid_request_error")


def test_another_path_below_is_not_found_in_this_shape(app: FastAPI) -> None:
    refused(post(app, f"{PATH}/batches", BODY), 404, "not_found_error")
    assert "param" in post(app, "/v1/messagesome", BODY).error()


ERRORS: list[tuple[PdserveError, int, str, dict[str, str]]] = [
    (
        QueueFull("full", retry_after_ms=1500),
        529,
        "overloaded_error",
        {"retry-after": "2", "retry-after-ms": "1500"},
    ),
    (GatewayLeaving("bye", retry_after_ms=10), 529, "overloaded_error", {"retry-after": "1"}),
    (RateLimited("often", retry_after_ms=2000), 429, "rate_limit_error", {"retry-after": "2"}),
    (DeadlineExceeded("late"), 504, "timeout_error", {"x-should-retry": "false"}),
    (WorkerLost("gone"), 500, "api_error", {}),
    (StepFailed("failed"), 500, "api_error", {}),
    (PoisonRequest("r1", 2), 500, "api_error", {"x-should-retry": "false"}),
    (Forbidden("no"), 403, "permission_error", {}),
]


@pytest.mark.parametrize(("raised", "status", "kind", "headers"), ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_answer_has_its_status(
    app: FastAPI,
    session: FakeSession,
    raised: PdserveError,
    status: int,
    kind: str,
    headers: dict[str, str],
    stream: bool,
) -> None:
    session.fails = raised
    reply = post(app, PATH, BODY | {"stream": stream})
    error = refused(reply, status, kind)
    assert error["message"] == str(raised)
    assert error["details"]["error_code"] == raised.kind
    assert headers.items() <= reply.headers.items()
    counted = f'pdserve_requests_total{{front="http",operation="messages",status="{status}"}} 1.0'
    assert counted in app.state.metrics.render().decode()


@pytest.mark.parametrize(("raised", "status", "kind", "_"), ERRORS)
def test_an_error_in_mid_stream_is_its_last_event(
    app: FastAPI, session: FakeSession, raised: PdserveError, status: int, kind: str, _: Any
) -> None:
    session.script = steps(piece("Hel"), raised)
    events = events_of(post(app, PATH, BODY | {"stream": True}))
    assert [event["type"] for event in events[-2:]] == ["content_block_delta", "error"]
    assert events[-1]["error"]["type"] == kind
    assert events[-1]["error"]["message"] == str(raised)
    assert f'status="{status}"' in app.state.metrics.render().decode()


def test_who_is_cancelled_is_told_so(app: FastAPI, session: FakeSession) -> None:
    session.script = steps(piece("Hel"), piece("", finish=FinishReason.CANCELLED))
    refused(post(app, PATH, BODY), 499, "invalid_request_error")
    *_, delta, error = events_of(post(app, PATH, BODY | {"stream": True}))
    assert delta["delta"] == {"type": "text_delta", "text": "Hel"}
    assert error["error"]["details"]["error_code"] == "cancelled"
    assert 'status="499"' in app.state.metrics.render().decode()


def test_event_ids_are_for_completions(app: FastAPI) -> None:
    body = BODY | {"stream": True}
    for name in ("x_pdserve_resumable", "last_event_id"):
        error = refused(post(app, PATH, body, **{name: "1"}), 400, "invalid_request_error")
        assert error["details"]["field"] == name.replace("_", "-")
    assert post(app, PATH, body, x_pdserve_resumable="0").status == 200


# ── access ───────────────────────────────────────────────────────────────────────────────────────


def test_a_key_in_either_header_names_the_tenant(tmp_path: Path, session: FakeSession) -> None:
    path = tmp_path / "keys.json"
    write_keys(
        path,
        KeyFile(
            (
                Key("ann", "team", digest_of("secret")),
                Key("bob", "crew", digest_of("seldom"), requests_per_min=1),
            )
        ),
    )
    app = create_app(session, config=GatewayConfig(), doorkeeper=Doorkeeper(path))
    body = BODY | {"metadata": {"user_id": "somebody"}}
    assert post(app, PATH, body, x_api_key="secret").status == 200
    assert post(app, PATH, body, authorization="Bearer secret").status == 200
    assert [call.tenant for call in session.calls] == ["team", "team"]
    for path_ in (PATH, COUNT):
        refused(post(app, path_, body), 401, "authentication_error")
        refused(post(app, path_, body, x_api_key="wrong"), 401, "authentication_error")
    assert post(app, PATH, body, x_api_key="seldom").status == 200
    reply = post(app, PATH, body, x_api_key="seldom")
    refused(reply, 429, "rate_limit_error")
    assert int(reply.headers["retry-after"]) >= 1
