"""What a client must not send: each a 4xx in OpenAI's shape that names the field, and no call."""

import json
from typing import Any

import pytest
from fastapi import FastAPI

from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from tests.unit.cluster.asgi import Reply, ask, post
from tests.unit.cluster.fake_session import VOCAB_SIZE, FakeSession

BODY_BYTES_MAX = 1 << 20
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture(scope="module")
def app(session: FakeSession) -> FastAPI:
    return create_app(session, config=GatewayConfig(body_bytes_max=BODY_BYTES_MAX))


@pytest.fixture(autouse=True)
def nothing_is_called(session: FakeSession) -> Any:
    session.calls.clear()
    yield
    assert session.calls == []


def refused(reply: Reply, status: int, param: str | None) -> dict[str, Any]:
    assert reply.status == status, reply.body
    error = reply.error()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"]
    assert len(reply.body) < 2000  # whatever was sent, little of it comes back
    return error


BOTH = [
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": True}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 1.5}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"max_tokens": 2**64}, "max_tokens"),
    ({"max_tokens": int("9" * 4000)}, "max_tokens"),
    ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**40}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
    ({"no_repeat_ngram_size": 65}, "no_repeat_ngram_size"),
    ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": ""}, "stop.0"),
    ({"stop": ["a", ""]}, "stop.1"),
    ({"stop": ["a", None]}, "stop.1"),
    ({"stop": 5}, "stop"),
    ({"stop": ["x"] * 100_000}, "stop"),
    ({"stop": [1] * 100_000}, "stop.0"),
    ({"stop": "x" * 5000}, "stop.0"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids.0"),
    ({"stop_token_ids": [1, -1]}, "stop_token_ids.1"),
    ({"stop_token_ids": [True]}, "stop_token_ids.0"),
    ({"stop_token_ids": [1] * 1000}, "stop_token_ids"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": "x"}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"user": "x" * 300}, "user"),
    ({"user": 5}, "user"),
    ({"service_tier": "best"}, "service_tier"),
    ({"prompt_cache_retention": "25h"}, "prompt_cache_retention"),
    ({"prompt_cache_retention": "hard"}, "prompt_cache_retention"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"model": 5}, "model"),
    ({"model": "x" * 5000}, "model"),
    ({"best_of": 0}, "best_of"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"best_of": 17}, "best_of"),
    ({"best_of": 3, "stream": True}, "best_of"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "strict": 1, "schema": {}},
            }
        },
        "response_format.json_schema.strict",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "objekt"}},
            }
        },
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": "json"}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"enum": ["x" * 70_000]}}}, "structured_outputs.json"),
    ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
    ({"structured_outputs": {"grammar": "rule: x"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice.1"),
    ({"structured_outputs": {"choice": ["a"] * 2000}}, "structured_outputs.choice"),
    ({"guided_json": "["}, "guided_json"),
    ({"guided_regex": "(a"}, "guided_regex"),
    ({"guided_regex": 5}, "guided_regex"),
    ({"guided_choice": "a"}, "guided_choice"),
    ({"guided_grammar": ["a"]}, "guided_grammar"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    ({"guided_regex": "a", "use_beam_search": True, "temperature": 0}, "guided_regex"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"early_stopping": True}, "early_stopping"),
    ({"use_beam_search": "yes"}, "use_beam_search"),
    ({"use_beam_search": True, "stream": True}, "use_beam_search"),
    ({"use_beam_search": True, "temperature": 0.5}, "temperature"),
    ({"use_beam_search": True, "top_p": 0.5}, "top_p"),
    ({"use_beam_search": True, "top_k": 5}, "top_k"),
    ({"use_beam_search": True, "min_p": 0.5}, "min_p"),
    ({"use_beam_search": True, "n": 3, "best_of": 2}, "best_of"),
    ({"use_beam_search": True, "best_of": 17}, "best_of"),
    ({"use_beam_search": True, "length_penalty": 11}, "length_penalty"),
    ({"use_beam_search": True, "early_stopping": "soon"}, "early_stopping"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": True}, "prompt_logprobs"),
    ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 1000}, "truncate_prompt_tokens"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"bad_words": ["no"]}, "bad_words"),
    ({"cache_salt": "s"}, "cache_salt"),
    ({"kv_transfer_params": {"block": 1}}, "kv_transfer_params"),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize(("fields", "param"), BOTH)
def test_a_bad_field_is_named(app: FastAPI, path: str, fields: dict[str, Any], param: str) -> None:
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
    refused(post(app, path, {**prompt, **fields}), 400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0"),
        (
            {"messages": [*MESSAGES, {"role": "user", "content": ["a", {"type": "image_url"}]}]},
            "messages.1.content.1",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages.0.content.0.text",
        ),
        ({"messages": MESSAGES, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": MESSAGES, "logprobs": 1}, "logprobs"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": MESSAGES, "logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"messages": MESSAGES, "echo": True}, "echo"),
        ({"messages": MESSAGES, "tools": [5]}, "tools.0"),
        ({"messages": MESSAGES, "tools": [{}]}, "tools.0.type"),
        ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
        ({"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": MESSAGES, "continue_final_message": True}, "continue_final_message"),
        ({"messages": MESSAGES, "modalities": ["text", "audio"]}, "modalities"),
    ],
)
def test_a_bad_chat_is_refused(app: FastAPI, fields: dict[str, Any], param: str) -> None:
    refused(post(app, CHAT, fields), 400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt.1"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, VOCAB_SIZE]}, "prompt.1"),
        ({"prompt": [1, -1]}, "prompt.1"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": [1, True]}, "prompt.1"),
        ({"prompt": ["a", 1]}, "prompt.1"),
        ({"prompt": [[1], [VOCAB_SIZE]]}, "prompt.1.0"),
        ({"prompt": [[1, 2**70]]}, "prompt.1"),
        ({"prompt": [True]}, "prompt.0"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": 21, "echo": True}, "logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1, "echo": True}, "max_tokens"),
        ({"prompt": ["a" * 900] * 128, "prompt_logprobs": 20}, "prompt_logprobs"),
    ],
)
def test_a_bad_completion_is_refused(app: FastAPI, fields: dict[str, Any], param: str) -> None:
    refused(post(app, COMPLETION, fields), 400, param)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not JSON"),
        (b"   ", "not JSON"),
        (b'{"messages": [', "not JSON"),
        (b'{"messages": []}}', "not JSON"),
        (b"{'messages': []}", "not JSON"),
        (b"null", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": Infinity}', "Infinity"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"temperature": 1e400}', "1e400"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"user": "\xff"}', "UTF-8"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'{"a":' * 10_000, "nests deeper"),
        (b"[" * 500_000, "nests deeper"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(app: FastAPI, data: bytes, says: str) -> None:
    error = refused(post(app, CHAT, data), 400, None)
    assert says in error["message"]


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b'{"model": "a", "model": "b"}', "model"),
        (b'{"messages": [{"role": "user", "role": "system"}]}', "role"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages"),
        (b'{"messages": [{"role": "user", "content": "\\udc00\\ud800"}]}', "messages"),
        (b'{"messages": [{"\\udfff": 1}]}', "messages"),
        (b'{"metadata": ' + b"[" * 100 + b"]" * 100 + b"}", "metadata"),
    ],
)
def test_json_that_readers_understand_differently_is_refused(
    app: FastAPI, data: bytes, param: str
) -> None:
    refused(post(app, CHAT, data), 400, param)


def test_an_unknown_model_is_not_found(app: FastAPI) -> None:
    error = refused(post(app, CHAT, {"messages": MESSAGES, "model": "gpt-9"}), 404, "model")
    assert error["code"] == "model_not_found"
    assert "fake-model" in error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
        (COMPLETION, {"prompt": "x" * 1000}, "prompt"),
        (COMPLETION, {"prompt": ["x", [1] * 1000]}, "prompt.1"),
        (COMPLETION, {"prompt": "x" * 20_000}, "prompt"),  # long enough for a thread
    ],
)
def test_a_prompt_beyond_the_context_says_what_clients_look_for(
    app: FastAPI, path: str, fields: dict[str, Any], param: str
) -> None:
    error = refused(post(app, path, fields), 400, param)
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 1000 tokens" in error["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_bound_is_refused(app: FastAPI, declared: bool) -> None:
    data = json.dumps({"prompt": "x" * BODY_BYTES_MAX}).encode()
    headers = {"content-length": str(len(data))} if declared else {}
    refused(post(app, COMPLETION, data, **headers), 413, None)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_type_is_refused(app: FastAPI, kind: str) -> None:
    data = json.dumps({"prompt": "x"}).encode()
    refused(ask(app, "POST", COMPLETION, data, headers={"content-type": kind}), 415, None)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "soon", "9" * 30, ""])
def test_a_bad_deadline_is_refused(app: FastAPI, text: str) -> None:
    reply = post(app, COMPLETION, {"prompt": "x"}, x_request_timeout_ms=text)
    refused(reply, 400, "x-request-timeout-ms")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("POST", "/v1/models", 405), ("GET", "/v2/nothing", 404)],
)
def test_unknown_routes_and_methods_answer_in_the_same_shape(
    app: FastAPI, method: str, path: str, status: int
) -> None:
    reply = ask(app, method, path, b"")
    refused(reply, status, None)
    assert ("allow" in reply.headers) == (status == 405)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens.0"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/detokenize", {"tokens": None}, "tokens"),
    ],
)
def test_bad_tokeniser_requests_are_refused(
    app: FastAPI, path: str, fields: dict[str, Any], param: str
) -> None:
    refused(post(app, path, fields), 400, param)
