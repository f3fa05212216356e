"""The HTTP front on a real server: OpenAI's own client, and clients that go away."""

import asyncio
import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from pdserve.cluster.gateway.calls import Piece
from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from pdserve.errors import QueueFull, WorkerLost
from pdserve.messages import FinishReason, Token
from tests.integration.http_server import served
from tests.unit.cluster.fake_session import HANG, MODEL, FakeSession, piece, said, steps

WAIT_S = 10.0
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture(scope="module")
def url(session: FakeSession) -> Iterator[str]:
    with served(create_app(session, config=GatewayConfig(body_bytes_max=100_000))) as url:
        yield url


@pytest.fixture(autouse=True)
def fresh(session: FakeSession) -> Iterator[None]:
    session.script = said("Hello", " world")
    session.calls.clear()
    session.opened.clear()
    session.closed.clear()
    yield
    assert session.open == set()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


# ── OpenAI's client ──────────────────────────────────────────────────────────────────────────────


def test_the_sdk_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=2)
    assert [choice.message.content for choice in answer.choices] == ["Hello world"] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_the_sdk_streams_a_chat(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"include_timing": True, "top_k": 5},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hello world"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 11
    assert chunks[-1].to_dict()["pdserve"]["level"] == 4  # type: ignore[index]


def test_the_sdk_completes(client: openai.OpenAI, session: FakeSession) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=[[1, 2], [3]], logprobs=1, max_tokens=5, extra_body={"min_p": 0.5}
    )
    assert [choice.text for choice in answer.choices] == ["Hello world"] * 2
    assert session.calls[0].sampling.min_p == 0.5
    streamed = client.completions.create(model=MODEL, prompt="x", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Hello world"


def test_the_sdk_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_the_sdk_raises_its_own_errors(client: openai.OpenAI, session: FakeSession) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    session.script = steps(QueueFull("full", retry_after_ms=3000))
    with pytest.raises(openai.InternalServerError) as full:
        client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert full.value.status_code == 503
    assert full.value.response.headers["retry-after"] == "3"


def test_the_sdk_sees_an_error_in_mid_stream(client: openai.OpenAI, session: FakeSession) -> None:
    session.script = steps(piece("Hel"), WorkerLost("they keep dying"))
    chunks = iter(client.completions.create(model=MODEL, prompt="x", stream=True))
    assert next(chunks).choices[0].text == "Hel"
    with pytest.raises(openai.APIError, match="they keep dying"):
        next(chunks)


def test_closing_the_sdks_stream_closes_the_call(
    client: openai.OpenAI, session: FakeSession
) -> None:
    session.script = steps(piece("Hel"), HANG)
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    assert next(stream).choices[0].delta.role == "assistant"
    stream.close()
    assert session.closed.wait(WAIT_S)


def test_the_async_sdk_streams_and_cancels(url: str, session: FakeSession) -> None:
    async def scenario() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
            text = "".join([chunk.choices[0].text async for chunk in stream])
            session.script = steps(HANG)
            session.opened.clear()
            session.closed.clear()
            waiting = asyncio.create_task(client.completions.create(model=MODEL, prompt="x"))
            assert await asyncio.to_thread(session.opened.wait, WAIT_S)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            return text

    assert asyncio.run(scenario()) == "Hello world"
    assert session.closed.wait(WAIT_S)


# ── plain sockets ────────────────────────────────────────────────────────────────────────────────


def connected(url: str, body: bytes, *, length: int | None = None) -> socket.socket:
    """A connection on which a chat was asked for."""
    parts = urlsplit(url)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body) if length is None else length}\r\n\r\n"
    )
    connection = socket.create_connection((parts.hostname, parts.port), timeout=WAIT_S)
    connection.sendall(head.encode() + body)
    return connection


def asking(*, stream: bool) -> bytes:
    return json.dumps({"messages": MESSAGES, "stream": stream}).encode()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("first", [(), (piece("Hel"),)])
def test_a_client_that_goes_away_takes_its_call_with_it(
    url: str, session: FakeSession, stream: bool, first: tuple[object, ...]
) -> None:
    session.script = steps(*first, HANG)  # type: ignore[arg-type]
    connection = connected(url, asking(stream=stream))
    assert session.opened.wait(WAIT_S)
    if stream and first:
        assert connection.recv(12) == b"HTTP/1.1 200"
    assert not session.closed.is_set()
    connection.close()
    assert session.closed.wait(WAIT_S)


def test_a_client_that_does_not_read_is_let_go_when_it_leaves(
    url: str, session: FakeSession
) -> None:
    large = Piece(0, "x" * 100_000, (Token(1),))
    session.script = lambda _: (large for _ in range(10_000))
    connection = connected(url, asking(stream=True))
    assert session.opened.wait(WAIT_S)
    assert connection.recv(12) == b"HTTP/1.1 200"
    connection.close()
    assert session.closed.wait(WAIT_S)


def test_a_client_that_leaves_in_mid_body_starts_nothing(url: str, session: FakeSession) -> None:
    connected(url, b'{"messages": [', length=1000).close()
    after = connected(url, asking(stream=False))
    assert after.recv(12) == b"HTTP/1.1 200"
    after.close()
    assert len(session.calls) == 1


def test_too_large_a_body_is_refused_before_it_is_sent(url: str) -> None:
    with connected(url, b"", length=10**9) as connection:
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_stream_is_sent_piece_by_piece(url: str, session: FakeSession) -> None:
    session.script = steps(piece("one"), HANG)
    with connected(url, asking(stream=True)) as connection:
        seen = b""
        while b'"one"' not in seen:
            data = connection.recv(65_536)
            assert data
            seen += data
    assert session.closed.wait(WAIT_S)


def test_the_server_goes_on_after_all_that(client: openai.OpenAI, session: FakeSession) -> None:
    session.script = steps(piece("fine", finish=FinishReason.LENGTH))
    answer = client.completions.create(model=MODEL, prompt="x")
    assert answer.choices[0].text == "fine"
    assert answer.choices[0].finish_reason == "length"
