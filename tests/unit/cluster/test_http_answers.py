"""What good requests become: the call that the session sees, and what the client sees of it."""

import json
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI

from pdserve.clock import steady_unix_ms
from pdserve.cluster.gateway.calls import Call
from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from pdserve.errors import (
    DeadlineExceeded,
    InvalidField,
    OutOfBlocks,
    PoisonRequest,
    QueueFull,
    RateLimited,
    WorkerLost,
)
from pdserve.messages import FinishReason, Sampling, ServiceClass, Stop, Token, TokenLogprob
from tests.unit.cluster.asgi import get, post
from tests.unit.cluster.fake_session import HANG, FakeSession, piece, said, steps

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
RENDERED = b"user: hi\nassistant: "
ASK = {"messages": MESSAGES}


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


def only_call(session: FakeSession) -> Call:
    (call,) = session.calls
    return call


# ── from body to call ────────────────────────────────────────────────────────────────────────────


def test_a_bare_chat_gets_the_defaults_and_the_rest_of_the_context(
    app: FastAPI, session: FakeSession
) -> None:
    before = steady_unix_ms()
    post(app, CHAT, ASK)
    call = only_call(session)
    assert bytes(call.prompt) == RENDERED
    assert call.sampling == Sampling()
    assert call.stop == Stop(max_tokens=1000 - len(RENDERED))
    assert (call.n, call.seed, call.tenant) == (1, None, "default")
    assert call.service_class is ServiceClass.STANDARD
    assert call.deadline_unix_ms - before == pytest.approx(600_000, abs=5000)
    assert call.call.startswith("chatcmpl-")
    assert call.prompt_field == "messages"


def test_null_is_the_same_as_absent(app: FastAPI, session: FakeSession) -> None:
    fields = (
        *("model", "n", "max_tokens", "max_completion_tokens", "min_tokens", "temperature"),
        *("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "stop", "seed"),
        *("frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "stop_token_ids"),
        *("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "user", "tools"),
        *("service_tier", "priority", "stream", "stream_options", "tool_choice", "best_of"),
        *("use_beam_search", "length_penalty", "early_stopping"),
        *(
            "no_repeat_ngram_size",
            "chat_template_kwargs",
            "response_format",
            "suffix",
            "include_timing",
            "metadata",
            "reasoning_effort",
        ),
    )
    assert post(app, CHAT, ASK | dict.fromkeys(fields)).status == 200
    assert only_call(session).sampling == Sampling()
    assert only_call(session).stop == Stop(max_tokens=1000 - len(RENDERED))


def test_every_parameter_arrives(app: FastAPI, session: FakeSession) -> None:
    reply = post(
        app,
        COMPLETION,
        {
            **{"model": "fake-model", "prompt": [5, 6, 7], "n": 2, "max_tokens": 9},
            **{"min_tokens": 2, "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1},
            **{"repetition_penalty": 1.1, "presence_penalty": -1, "frequency_penalty": 0.5},
            **{"logit_bias": {"9": -100, "3": 1.5}, "seed": 42, "stop": ["x", "yz"]},
            **{"stop_token_ids": [1, 2], "ignore_eos": True, "logprobs": 3, "user": "ann"},
            **{"include_stop_str_in_output": True, "skip_special_tokens": False},
            **{"no_repeat_ngram_size": 64, "prompt_cache_retention": "24h"},
            **{"service_tier": "flex", "priority": -5, "best_of": 2, "unheard_of": {"a": 1}},
        },
    )
    assert reply.status == 200
    assert only_call(session) == Call(
        call=only_call(session).call,
        prompt=(5, 6, 7),
        n=2,
        sampling=Sampling(0.0, 7, 0.5, 0.1, 1.1, -1.0, 0.5, ((3, 1.5), (9, -100.0)), 3, 64),
        stop=Stop(9, 2, True, (1, 2), ("x", "yz")),
        seed=42,
        tenant="ann",
        service_class=ServiceClass.BATCH,
        deadline_unix_ms=only_call(session).deadline_unix_ms,
        skip_special_tokens=False,
        include_stop_string=True,
        prompt_field="prompt",
        model=session.model_name,
        pin_ms=24 * 3600 * 1000,
    )


@pytest.mark.parametrize(
    ("fields", "max_tokens"),
    [
        ({}, 16),
        ({"max_tokens": None}, 16),
        ({"max_tokens": 1000}, 990),  # what the context holds beside the prompt
    ],
)
def test_completions_generate_sixteen_tokens_unless_told_otherwise(
    app: FastAPI, session: FakeSession, fields: dict[str, Any], max_tokens: int
) -> None:
    post(app, COMPLETION, {"prompt": "0123456789"} | fields)
    assert only_call(session).stop.max_tokens == max_tokens


def test_the_newer_name_of_max_tokens_wins(app: FastAPI, session: FakeSession) -> None:
    post(app, CHAT, ASK | {"max_tokens": 5, "max_completion_tokens": 7})
    assert only_call(session).stop.max_tokens == 7


@pytest.mark.parametrize(("top_k", "expected"), [(-1, 0), (0, 0), (5, 5)])
def test_top_k_minus_one_is_off(
    app: FastAPI, session: FakeSession, top_k: int, expected: int
) -> None:
    post(app, CHAT, ASK | {"top_k": top_k})
    assert only_call(session).sampling.top_k == expected


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_any_64_bit_seed_travels_as_a_number_without_sign(
    app: FastAPI, session: FakeSession, seed: int
) -> None:
    post(app, CHAT, ASK | {"seed": seed})
    assert only_call(session).seed == seed % 2**63


def test_messages_become_what_templates_know(app: FastAPI, session: FakeSession) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": ["one", {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    post(app, CHAT, {"messages": messages, "add_generation_prompt": False})
    assert (
        bytes(only_call(session).prompt)
        == b"system: be brief\nuser: one\ntwo\nassistant: \ntool: 3\n"
    )


def test_the_deadline_is_the_clients_where_it_names_one(app: FastAPI, session: FakeSession) -> None:
    """A library's timeout is that of one read: what is streamed may take longer."""
    headers = {"x_request_timeout_ms": "25000", "x_stainless_read_timeout": "5"}
    for stream, allowed_ms in ((True, 25_000), (False, 5000)):
        before = steady_unix_ms()
        post(app, CHAT, ASK | {"stream": stream}, **headers)
        after = steady_unix_ms()
        deadline = session.calls[-1].deadline_unix_ms
        assert before + allowed_ms <= deadline <= after + allowed_ms


def test_a_client_that_asks_again_is_known_by_its_library(
    app: FastAPI, session: FakeSession
) -> None:
    post(app, CHAT, ASK, x_stainless_retry_count="2")
    assert session.calls[-1].retries == 2
    told = get(app, "/metrics").body.decode()
    assert 'pdserve_retried_requests_total{front="http",operation="chat",status="200"} 1.0' in told


# ── from pieces to answer ────────────────────────────────────────────────────────────────────────


def test_a_whole_chat(app: FastAPI, session: FakeSession) -> None:
    session.script = steps(piece("Hel"), piece("lo", finish=FinishReason.STOP, stop_reason="END"))
    body = post(app, CHAT, ASK).json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "fake-model"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": "END",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": len(RENDERED),
        "completion_tokens": 5,
        "total_tokens": len(RENDERED) + 5,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_several_prompts_are_several_calls_and_indices_run_over_all_choices(
    app: FastAPI, session: FakeSession
) -> None:
    session.script = lambda call: [
        piece(chr(call.prompt[0]) + str(choice), choice=choice, finish=FinishReason.LENGTH)
        for choice in range(call.n)
    ]
    body = post(app, COMPLETION, {"prompt": ["a", "bb"], "n": 2}).json()
    assert [c["text"] for c in body["choices"]] == ["a0", "a1", "b0", "b1"]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 8
    assert [call.call for call in session.calls] == [f"{body['id']}-0", f"{body['id']}-1"]


def test_chat_logprobs(app: FastAPI) -> None:
    body = post(app, CHAT, ASK | {"logprobs": True, "top_logprobs": 2}).json()
    first = body["choices"][0]["logprobs"]["content"][0]
    assert first == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "I", "logprob": -1.5, "bytes": [73]},
        ],
    }


def test_completion_logprobs_hold_the_chosen_token_among_the_best(app: FastAPI) -> None:
    for count in (0, 2):
        body = post(app, COMPLETION, {"prompt": "a", "logprobs": count}).json()
        scores = body["choices"][0]["logprobs"]
        assert scores["tokens"][:2] == ["H", "e"]
        assert scores["text_offset"][:2] == [0, 1]
        assert scores["token_logprobs"][:2] == [-0.5, -0.5]
        assert scores["top_logprobs"][0] == {0: {"H": -0.5}, 2: {"H": -0.5, "I": -1.5}}[count]


def test_minus_infinity_becomes_a_number_that_json_has(app: FastAPI, session: FakeSession) -> None:
    token = Token(65, TokenLogprob(float("-inf"), ((65, float("-inf")),)))
    session.script = steps(replace(piece("A", finish=FinishReason.STOP), tokens=(token,)))
    body = post(app, COMPLETION, {"prompt": "a", "logprobs": 1}).json()
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_echo_repeats_each_prompt(app: FastAPI) -> None:
    body = post(app, COMPLETION, {"prompt": [[65, 66], [67]], "n": 2, "echo": True}).json()
    assert [c["text"] for c in body["choices"]] == [
        *["ABHello world"] * 2,
        *["CHello world"] * 2,
    ]


def test_timing_is_in_a_header_and_on_demand_in_the_body(app: FastAPI) -> None:
    plain, asked = post(app, CHAT, ASK), post(app, CHAT, ASK | {"include_timing": True})
    assert "pdserve" not in plain.json()
    timing = asked.json()["pdserve"]
    assert timing == json.loads(asked.headers["x-pdserve-timing"])
    assert (timing["queue_ms"], timing["prefill_ms"], timing["handoff_ms"]) == (1.5, 20.0, 0.7)
    assert 0 < timing["first_token_ms"] <= timing["total_ms"]
    assert timing["prefill_worker"] == "prefill-1"
    assert plain.headers["x-pdserve-timing"]


# ── errors of the session ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (QueueFull("full", retry_after_ms=1500), 503, {"retry-after": "2"}),
        (QueueFull("full", retry_after_ms=500_000), 503, {"retry-after": "120"}),
        (QueueFull("full", retry_after_ms=0), 503, {"retry-after": "1", "retry-after-ms": "1"}),
        (RateLimited("too often", retry_after_ms=1500), 429, {"retry-after-ms": "1500"}),
        (OutOfBlocks(5, 3, retry_after_ms=50), 503, {"retry-after-ms": "50"}),
        (PoisonRequest("cmpl-7", 2), 500, {"x-should-retry": "false"}),
        (DeadlineExceeded("late"), 504, {"x-should-retry": "false"}),
        (WorkerLost("they keep dying"), 503, {}),
        (InvalidField("messages", "is odd"), 400, {}),
    ],
)
def test_an_error_before_the_first_piece_has_its_own_status(
    app: FastAPI,
    session: FakeSession,
    error: Any,
    status: int,
    headers: dict[str, str],
    stream: bool,
) -> None:
    session.script = steps(error)
    reply = post(app, CHAT, ASK | {"stream": stream})
    assert reply.status == status
    assert reply.error()["code"] == error.kind
    assert reply.error()["message"] == str(error)
    assert headers.items() <= reply.headers.items()


def test_an_error_after_pieces_ends_a_whole_answer_with_its_status(
    app: FastAPI, session: FakeSession
) -> None:
    session.script = steps(piece("Hel"), WorkerLost("gone"))
    assert post(app, CHAT, ASK).status == 503


def test_an_error_of_one_prompt_cancels_the_others(app: FastAPI, session: FakeSession) -> None:
    session.script = lambda call: [HANG] if call.prompt == (97,) else [WorkerLost("gone")]
    assert post(app, COMPLETION, {"prompt": ["a", "b"]}).status == 503
    assert session.open == set()


# ── other routes ─────────────────────────────────────────────────────────────────────────────────


def test_models(app: FastAPI) -> None:
    listed = get(app, "/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["fake-model"]
    assert listed["data"][0]["max_model_len"] == 1000
    assert get(app, "/v1/models/fake-model").json() == listed["data"][0]
    assert get(app, "/v1/models/org/other").status == 404


def test_tokenize_and_back(app: FastAPI) -> None:
    reply = post(app, "/tokenize", {"prompt": "hi", "return_token_strs": True}).json()
    assert reply == {
        "count": 2,
        "max_model_len": 1000,
        "tokens": [104, 105],
        "token_strs": ["h", "i"],
    }
    assert post(app, "/tokenize", ASK).json()["tokens"] == list(RENDERED)
    assert post(app, "/detokenize", {"tokens": [104, 105]}).json() == {"prompt": "hi"}
    assert post(app, "/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/openapi.json"])
def test_operators_routes_answer(app: FastAPI, path: str) -> None:
    assert get(app, path).status == 200
    assert get(app, path).json()


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1", True), ("x" * 200, False), ("a b", False), ("", False)]
)
def test_request_ids_come_back_or_are_drawn(app: FastAPI, given: str, kept: bool) -> None:
    reply = post(app, CHAT, ASK, x_request_id=given)
    assert (reply.headers["x-request-id"] == given) is kept
    assert reply.headers["x-request-id"]
    assert post(app, CHAT, {}, x_request_id="abc-1").headers["x-request-id"] == "abc-1"
