"""What only a hostile or a broken client sends: each is refused with a 4xx that names what is
wrong, or does no harm; and the server answers the next one.

What a body alone can hold is in ``tests/unit/cluster/test_http_bad_input.py``; here are the cases
that need a real server, a real grammar or a socket.
"""

import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from pdserve.cluster.gateway.access import Doorkeeper, Key, KeyFile, digest_of, write_keys
from pdserve.cluster.http import patience
from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.patience import PatientHTTP
from pdserve.config import GatewayConfig
from tests.integration.http_server import served
from tests.unit.cluster.fake_session import VOCAB_SIZE, FakeSession

WAIT_S = 60.0
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture(scope="module")
def url(session: FakeSession) -> Iterator[str]:
    with served(create_app(session, config=GatewayConfig()), http=PatientHTTP) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=WAIT_S) as client:
        yield client


@pytest.fixture(autouse=True)
def goes_on(
    client: httpx.Client, session: FakeSession, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """After each: no call is open, nothing was logged as a bug, the next one is answered."""
    yield
    answer = client.post(CHAT, json={"messages": MESSAGES})
    assert answer.status_code == 200
    assert session.open == set()
    assert [r for r in caplog.records if r.levelno >= logging.ERROR or r.exc_info] == []


def refused(answer: httpx.Response, field: str | None, status: int = 400) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    if answer.request.url.path.startswith("/v1/messages"):
        assert set(error) - {"details"} == {"message", "type"}
        assert field is None or field in error["message"], error
        return
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == field, error


# ── bodies, for every operation that generates ───────────────────────────────────────────────────

PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/decisions", {"input": "x", "questions": [{}] * 100_000}, "questions"),
        (
            "/v1/decisions",
            {"input": "x", "questions": [{"type": ["x"] * 1000}]},
            "questions.0.type",
        ),
        ("/v1/rerank", {"query": "x", "documents": ["x"] * 100_000}, "documents"),
        ("/v1/score", {"text_1": "x", "text_2": [["x"]]}, "text_2.0"),
        ("/v1/batches", {"input_file_id": "file-" + "x" * 9999}, "endpoint"),
    ],
)
def test_what_cannot_be_compared_or_decided_is_named(
    client: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    refused(client.post(path, json=body), param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x",
        b"--x\r\n\r\n" * 10_000,
        b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n',
        b"--x\r\n" + b"a" * 100_000 + b"\r\n\r\n--x--",
    ],
)
def test_a_form_that_is_none_is_refused(client: httpx.Client, body: bytes) -> None:
    kind = {"content-type": "multipart/form-data; boundary=x"}
    refused(client.post("/v1/files", content=body, headers=kind), None)


BOMB = "((a{1,100}){1,100}){1,100}"
NESTED: dict[str, Any] = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
LARGE = {"enum": ["x" * 3_000_000]}
NEVER = {"type": "object", "properties": {"a": False}, "required": ["a"]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"structured_outputs": {"regex": "(" * 500 + "a"}},
            "structured_outputs.regex",
        ),
        ({"structured_outputs": {"json": LARGE}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": NEVER}}, "structured_outputs.json"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["x"] * 100_000}, "stop"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
        ({"logit_bias": {"01": 1}}, "logit_bias"),
        ({"service_tier": ""}, "service_tier"),
        ({"prompt_cache_retention": "9" * 5000 + "h"}, "prompt_cache_retention"),
        ({"cache_salt": "x" * 1025}, "cache_salt"),
        ({"kv_transfer_params": {"remote_block_ids": [1]}}, "kv_transfer_params"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
    ],
)
@pytest.mark.parametrize("path", PROMPTS)
def test_a_bad_field_is_named(
    client: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = client.post(path, json={**PROMPTS[path], **fields})
    refused(answer, param)


@pytest.mark.parametrize("pattern", [BOMB, "(a+)+$", "(a|a)*b"])
def test_a_regex_that_explodes_elsewhere_does_not_here(client: httpx.Client, pattern: str) -> None:
    """Ours is compiled to an automaton; a pattern is followed, or refused by name."""
    body = {"messages": MESSAGES, "structured_outputs": {"regex": pattern}}
    answer = client.post(CHAT, json=body)
    if answer.status_code != 200:
        refused(answer, "structured_outputs.regex")


def test_a_schema_that_refers_to_itself_alone_does_no_harm(client: httpx.Client) -> None:
    body = {"messages": MESSAGES, "structured_outputs": {"json": NESTED}}
    answer = client.post(CHAT, json=body)
    if answer.status_code != 200:
        refused(answer, "structured_outputs.json")


@pytest.mark.parametrize("name", ["a\x00b", "a\nb", "\u202ea", "", "x" * 65])
@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
def test_a_tools_name_is_plain(client: httpx.Client, path: str, name: str) -> None:
    function = {"name": name, "parameters": {"type": "object"}}
    flat = path != CHAT
    tool = {"type": "function", **(function if flat else {"function": function})}
    body = {"messages": MESSAGES, "input": "hi", "tools": [tool]}
    answer = client.post(path, json=body)
    refused(answer, "tools.0.name" if flat else "tools.0.function.name")


@pytest.mark.parametrize("calls", ["abc", [5], {"a": 1}, 0])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_calls_are_a_list_whoever_made_them(client: httpx.Client, role: str, calls: Any) -> None:
    body = {"messages": [{"role": role, "content": "x", "tool_calls": calls}]}
    answer = client.post(CHAT, json=body)
    refused(answer, "messages.0.tool_calls.0.function" if calls == [5] else "messages.0.tool_calls")


def test_a_whole_number_may_have_a_point(client: httpx.Client, session: FakeSession) -> None:
    """To JSON 2.0 is an integer; minus zero is zero; a null character is a character."""
    data = b'{"prompt": "a\\u0000b", "n": 2.0, "temperature": -0, "top_k": -0.0}'
    answer = client.post(
        "/v1/completions",
        content=data,
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 200
    assert len(answer.json()["choices"]) == 2
    assert bytes(session.calls[-1].prompt) == b"a\x00b"


# ── headers ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "value", ["x", "00-zz-zz-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-00", "y" * 5000]
)
def test_a_bad_traceparent_starts_a_trace_of_its_own(client: httpx.Client, value: str) -> None:
    headers = {"traceparent": value, "tracestate": "=,,"}
    answer = client.post(CHAT, json={"messages": MESSAGES}, headers=headers, timeout=WAIT_S)
    assert answer.status_code == 200


def test_a_request_id_that_cannot_be_repeated_is_replaced(client: httpx.Client) -> None:
    given = "x" * 200
    answer = client.get("/health", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] != given


def test_no_path_is_open_that_should_not_be(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, KeyFile((Key("a", "tenant", digest_of("secret")),)))

    async def snapshot() -> dict[str, Any]:
        return {}

    app = create_app(
        FakeSession(),
        config=GatewayConfig(),
        snapshot=snapshot,
        recording=snapshot,
        doorkeeper=Doorkeeper(path),
    )
    with served(app) as url, httpx.Client(base_url=url, timeout=WAIT_S) as client:
        tree = client.get("/openapi.json", headers={"authorization": "Bearer secret"}).json()
        operations = [
            (method, path, said.get("security", tree["security"]))
            for path, methods in tree["paths"].items()
            for method, said in methods.items()
        ]
        operations += [("get", path, [{}]) for path in ("/openapi.json", "/docs", "/redoc", "/no")]
        for method, path_, security in operations:
            target = re.sub(r"\{\w+\}", "x", path_)
            for headers in ({}, {"authorization": "Bearer wrong"}):
                answer = client.request(method, target, headers=headers)
                if security == []:
                    assert answer.status_code == 200, path_
                else:
                    refused(answer, None, 401)


# ── on the wire ──────────────────────────────────────────────────────────────────────────────────


def said(url: str, data: bytes) -> bytes:
    """All that the server answers before it closes, or has answered the last of ``data``."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=WAIT_S) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while more := connection.recv(65_536):
            answer += more
        return answer


def request(body: bytes = b"", *headers: str, version: str = "1.1", method: str = "POST") -> bytes:
    lines = [f"{method} {CHAT} HTTP/{version}", "host: x", "content-type: application/json"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


BODY = json.dumps({"messages": MESSAGES}).encode()
LENGTH = f"content-length: {len(BODY)}"


def test_http_1_0_is_answered(url: str) -> None:
    assert said_with_all(url, request(BODY, LENGTH, version="1.0")).startswith(b"HTTP/1.1 200")


def test_pipelined_requests_are_answered_in_order(url: str) -> None:
    closing = request(BODY, LENGTH, "connection: close")
    answer = said_with_all(url, request(BODY, LENGTH) * 2 + closing)
    assert answer.count(b"HTTP/1.1 200") == 3


def said_with_all(url: str, data: bytes) -> bytes:
    """As ``said``, without saying that nothing more comes: that is how clients leave."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=WAIT_S) as connection:
        connection.sendall(data)
        answer = b""
        while more := connection.recv(65_536):
            answer += more
        return answer


def test_who_waits_for_100_continue_gets_it(url: str) -> None:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=WAIT_S) as connection:
        connection.sendall(request(b"", LENGTH, "expect: 100-continue", "connection: close"))
        answer = connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 100")
        connection.sendall(BODY)
        while more := connection.recv(65_536):
            answer += more
        assert b"HTTP/1.1 200" in answer


def test_chunks_arrive_as_one_body(url: str) -> None:
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:9], BODY[9:]))
    headers = ("transfer-encoding: chunked", "connection: close")
    answer = said_with_all(url, request(chunked + b"0\r\n\r\n", *headers))
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(request(b"zz\r\nx", "transfer-encoding: chunked"), id="no length of a chunk"),
        pytest.param(request(b"-5\r\nx", "transfer-encoding: chunked"), id="a negative one"),
        pytest.param(request(BODY, "content-length: -1"), id="a negative length"),
        pytest.param(request(BODY, "content-length: x"), id="no length"),
        pytest.param(request(BODY, LENGTH, "content-length: 1"), id="two lengths"),
        pytest.param(request(BODY, LENGTH, "x\x01y: 1"), id="a control character in a name"),
        pytest.param(b"POST  HTTP/1.1\r\n\r\n", id="no path"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
    ],
)
def test_what_is_no_http_is_refused_or_dropped(url: str, session: FakeSession, data: bytes) -> None:
    count = len(session.calls)
    answer = said(url, data)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer[:100]
    assert len(session.calls) == count


def test_a_header_of_64_kb_does_no_harm(url: str) -> None:
    answer = said(url, request(BODY, LENGTH, "x-large: " + "x" * 65_536, "connection: close"))
    assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 4")) or answer == b""


def test_a_websocket_is_no_way_to_chat(url: str) -> None:
    headers = (
        *("upgrade: websocket", "connection: upgrade", "sec-websocket-version: 13"),
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    answer = said(url, request(b"", *headers, method="GET"))
    assert answer.startswith(b"HTTP/1.1 4"), answer[:100]


@pytest.mark.parametrize("before", [b"", request(BODY, LENGTH)])
def test_a_head_that_does_not_end_is_not_waited_for(
    url: str, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    """Slowloris: also where the connection was of use before."""
    monkeypatch.setattr(patience, "HEADERS_WAIT_S", 0.1)
    answer = said_with_all(url, before + request(BODY)[:60])
    assert answer.count(b"HTTP/1.1 200") == (before != b"")


def test_a_head_in_pieces_is_waited_for(url: str) -> None:
    data = request(BODY, LENGTH, "connection: close")
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=WAIT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(data), 7):
            connection.sendall(data[at : at + 7])
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
