"""The Messages API on a real server: events as they come, pings, and clients that go away."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.messages import answering
from pdserve.config import GatewayConfig
from pdserve.errors import WorkerLost
from tests.integration.http_server import served
from tests.unit.cluster.fake_session import HANG, MODEL, FakeSession, Step, piece, said, steps

WAIT_S = 60.0
PATH = "/v1/messages"
BODY = {"model": MODEL, "max_tokens": 20, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture(scope="module")
def client(session: FakeSession) -> Iterator[httpx.Client]:
    with (
        served(create_app(session, config=GatewayConfig())) as url,
        httpx.Client(base_url=url, timeout=WAIT_S) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def fresh(client: httpx.Client, session: FakeSession) -> Iterator[None]:
    session.opened.clear()
    session.closed.clear()
    yield
    assert session.closed.wait(WAIT_S)
    session.script = said("Hello", " world")
    assert client.post(PATH, json=BODY).json()["content"][0]["text"] == "Hello world"


def events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def until(told: Iterator[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(event for event in told if event["type"] == kind)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("first", [(), (piece("Hel"),)])
def test_a_client_that_goes_away_takes_its_call_with_it(
    client: httpx.Client, session: FakeSession, stream: bool, first: tuple[Step, ...]
) -> None:
    session.script = steps(*first, HANG)
    body = BODY | {"stream": stream}
    if stream and first:
        with client.stream("POST", PATH, json=body) as answer:
            told = events(answer)  # whose end would be the connection's
            assert until(told, "content_block_delta")["delta"]["text"] == "Hel"
            assert not session.closed.is_set()
        return

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=WAIT_S) as leaving:
            waiting = asyncio.create_task(leaving.post(PATH, json=body))
            assert await asyncio.to_thread(session.opened.wait, WAIT_S)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(scenario())


def test_a_quiet_stream_gets_pings(
    client: httpx.Client, session: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "PING_S", 0.01)
    session.script = steps(piece("Hel"), HANG, piece("lo"), WorkerLost("they keep dying"))
    with client.stream("POST", PATH, json=BODY | {"stream": True}) as answer:
        told = events(answer)
        until(told, "content_block_delta")
        for _ in range(3):
            until(told, "ping")
        session.go_on()
        assert until(told, "content_block_delta")["delta"]["text"] == "lo"
        *pings, error = told
        assert error["error"]["message"] == "they keep dying"
        assert {event["type"] for event in pings} <= {"ping"}
    assert error["request_id"] == answer.headers["request-id"]


def test_tokens_are_counted_without_a_call(client: httpx.Client, session: FakeSession) -> None:
    session.calls.clear()
    session.closed.set()
    counted = client.post(f"{PATH}/count_tokens", json=BODY).json()
    assert counted == {"input_tokens": len("user: hi\nassistant: ")}
    assert session.calls == []
