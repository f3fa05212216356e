"""OpenAI's client and the responses API: kept, gone on from, in the background, across gateways."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from pdserve.cluster.gateway.access import Doorkeeper, Key, KeyFile, digest_of, write_keys
from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from pdserve.errors import QueueFull, WorkerLost
from pdserve.messages import FinishReason
from tests.integration.http_server import served
from tests.redis_server import RedisServer, running_redis
from tests.unit.cluster.fake_session import HANG, MODEL, FakeSession, piece, said, steps

WAIT_S = 60.0

CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture
def client(session: FakeSession) -> Iterator[openai.OpenAI]:
    with served(create_app(session, config=GatewayConfig())) as url, connected(url) as client:
        yield client


def connected(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)


def until(what: str, is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        time.sleep(0.01)


# ── one answer ───────────────────────────────────────────────────────────────────────────────────


def test_an_answer_is_kept_and_gone_on_from(client: openai.OpenAI, session: FakeSession) -> None:
    first = client.responses.create(
        model=MODEL, input="one", instructions="be kind", metadata={"a": "b"}
    )
    assert first.output_text == "Hello world"
    assert first.usage is not None
    assert first.usage.input_tokens_details.cached_tokens == 3
    second = client.responses.create(model=MODEL, input="two", previous_response_id=first.id)
    prompt = bytes(session.calls[-1].prompt).decode()
    assert prompt == "user: one\nassistant: Hello world\nuser: two\nassistant: "
    again = client.responses.retrieve(second.id)
    assert again == second
    assert again.previous_response_id == first.id
    assert client.responses.retrieve(first.id).metadata == {"a": "b"}


def test_it_is_gone_once_it_is_deleted_or_was_never_stored(client: openai.OpenAI) -> None:
    kept = client.responses.create(model=MODEL, input="x")
    client.responses.delete(kept.id)
    passing = client.responses.create(model=MODEL, input="x", store=False)
    for response in (kept, passing):
        with pytest.raises(openai.NotFoundError, match="not found"):
            client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model=MODEL, input="x", previous_response_id=kept.id)
    assert error.value.param == "previous_response_id"


def test_its_input_is_listed_in_pages(client: openai.OpenAI) -> None:
    items = [{"role": "user", "content": f"{number}"} for number in range(5)]
    response = client.responses.create(model=MODEL, input=items)  # type: ignore[arg-type]
    pages = client.responses.input_items.list(response.id, limit=2, order="asc")
    texts = [item.to_dict()["content"][0]["text"] for item in pages]  # type: ignore[index]
    assert texts == list("01234")
    newest = client.responses.input_items.list(response.id, limit=1)
    assert newest.data[0].to_dict()["content"][0]["text"] == "4"  # type: ignore[index]
    count = client.responses.input_tokens.count(model=MODEL, input="hi")
    assert count.input_tokens == len("user: hi\nassistant: ")


def test_tools_are_called_and_their_results_go_back(
    client: openai.OpenAI, session: FakeSession
) -> None:
    session.script = said(CALL)
    tools = [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": None}]
    asked = client.responses.create(model=MODEL, input="1?", tools=tools)  # type: ignore[arg-type]
    call = asked.output[0]
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("add", {"x": 1})
    session.script = said("2")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
    answer = client.responses.create(
        model=MODEL,
        previous_response_id=asked.id,
        input=[result],  # type: ignore[list-item]
        tools=tools,  # type: ignore[arg-type]
    )
    assert answer.output_text == "2"
    assert bytes(session.calls[-1].prompt).decode().endswith("tool: 2\nassistant: ")


def test_a_schema_is_followed_under_its_own_name(
    client: openai.OpenAI, session: FakeSession
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form: Any = {"type": "json_schema", "name": "s", "schema": schema}
    client.responses.create(model=MODEL, input="x", text={"format": form})
    constraint = session.calls[-1].sampling.constraint
    assert constraint is not None
    assert json.loads(constraint.text) == schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": []}, "input"),
        ({"text": {"format": {"type": "x"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "s"}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"effort": "enough"}}, "reasoning.effort"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"background": True, "store": False}, "store"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"extra_body": {"top_k": "x"}}, "top_k"),
    ],
)
def test_a_bad_field_has_its_own_name(
    client: openai.OpenAI, session: FakeSession, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(**{"model": MODEL, "input": "x", **fields})  # type: ignore[call-overload]
    assert error.value.param == param
    assert session.calls == []


def test_a_null_is_as_good_as_nothing(client: openai.OpenAI) -> None:
    names = client.get("/../openapi.json", cast_to=httpx.Response).json()
    fields = names["components"]["schemas"]["ResponseRequest"]["properties"]
    body = {name: None for name in fields if name != "input"} | {"input": "x"}
    answer = client.post("/responses", body=body, cast_to=httpx.Response)
    assert answer.json()["status"] == "completed"


# ── streams ──────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_says_what_the_whole_says(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="x") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "Hello world"
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(len(events)))
    assert client.responses.retrieve(final.id).output_text == "Hello world"


def test_an_error_before_the_first_token_has_its_status(
    client: openai.OpenAI, session: FakeSession
) -> None:
    session.script = steps(QueueFull("full", retry_after_ms=3000))
    with pytest.raises(openai.InternalServerError) as caught:
        client.responses.create(model=MODEL, input="x", stream=True)
    assert caught.value.status_code == 503


def test_an_error_in_mid_stream_is_its_last_event(
    client: openai.OpenAI, session: FakeSession
) -> None:
    session.script = steps(piece("Hel"), WorkerLost("they keep dying"))
    events = list(client.responses.create(model=MODEL, input="x", stream=True))
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.message == "they keep dying"


def test_who_leaves_takes_the_answer_along(client: openai.OpenAI, session: FakeSession) -> None:
    session.script = steps(piece("Hel"), HANG)
    stream = client.responses.create(model=MODEL, input="x", stream=True)
    assert next(iter(stream)).type == "response.created"
    stream.close()
    assert session.closed.wait(WAIT_S)


# ── in the background ────────────────────────────────────────────────────────────────────────────


def test_who_leaves_comes_back_to_where_it_was(client: openai.OpenAI, session: FakeSession) -> None:
    session.script = steps(piece("Hel"), piece("lo"), HANG)
    stream = client.responses.create(model=MODEL, input="x", background=True, stream=True)
    seen = []
    for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            break
    stream.close()
    response, number = seen[0].response.id, seen[-1].sequence_number  # type: ignore[union-attr]
    rest = client.responses.retrieve(response, stream=True, starting_after=number)
    following = next(iter(rest))
    assert (following.sequence_number, following.type) == (number + 1, "response.output_text.delta")
    assert not session.closed.is_set(), "it goes on without its client"
    cancelled = client.responses.cancel(response)
    assert (cancelled.status, cancelled.output_text) == ("cancelled", "Hello")
    assert [event.type for event in rest][-1] == "response.incomplete"
    assert session.closed.wait(WAIT_S)
    assert client.responses.cancel(response).status == "cancelled"


def test_only_what_is_in_the_background_is_cancelled_or_followed(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="x").id
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(response)
    with pytest.raises(openai.BadRequestError):
        client.responses.retrieve(response, stream=True)


def test_the_gateways_end_is_told(session: FakeSession) -> None:
    session.script = steps(piece("Hel"), HANG)
    app = create_app(session, config=GatewayConfig())
    with served(app) as url, connected(url) as client:
        stream = client.responses.create(model=MODEL, input="x", background=True, stream=True)
        events = iter(stream)
        while next(events).type != "response.output_text.delta":
            pass
        closed_from_here(app)
        assert list(events)[-1].type == "response.incomplete"


def closed_from_here(app: FastAPI) -> None:
    """``close`` belongs to the server's loop; a run of the background is on it."""
    run = next(iter(app.state.responses._runs.values()))
    asyncio.run_coroutine_threadsafe(app.state.responses.close(), run.work.get_loop()).result(
        WAIT_S
    )


# ── tenants and gateways ─────────────────────────────────────────────────────────────────────────


def test_another_tenants_response_is_not_there(session: FakeSession, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = tuple(Key(name, f"tenant-{name}", digest_of(name)) for name in ("a", "b"))
    write_keys(path, KeyFile(keys))
    app = create_app(session, config=GatewayConfig(), doorkeeper=Doorkeeper(path))
    with served(app) as url, connected(url, "a") as mine, connected(url, "b") as other:
        response = mine.responses.create(model=MODEL, input="x").id
        assert mine.responses.retrieve(response).id == response
        for ask in (other.responses.retrieve, other.responses.delete, other.responses.cancel):
            with pytest.raises(openai.NotFoundError, match="not found"):
                ask(response)
        with pytest.raises(openai.NotFoundError):
            other.responses.input_items.list(response)
        with pytest.raises(openai.BadRequestError, match="not found"):
            other.responses.create(model=MODEL, input="x", previous_response_id=response)
        assert mine.responses.retrieve(response).id == response


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def gateways(
    redis: RedisServer, session: FakeSession
) -> Iterator[tuple[openai.OpenAI, openai.OpenAI]]:
    """Two, of which the first one's session has the script; they share nothing but Redis."""
    config = GatewayConfig(responses_redis=redis.url)
    with ExitStack() as stack:
        urls = [
            stack.enter_context(served(create_app(one, config=config)))
            for one in (session, FakeSession(said("again")))
        ]
        first, second = (stack.enter_context(connected(url)) for url in urls)
        yield first, second


def test_any_gateway_finds_a_response(gateways: tuple[openai.OpenAI, openai.OpenAI]) -> None:
    first, second = gateways
    kept = first.responses.create(model=MODEL, input="one")
    assert second.responses.retrieve(kept.id) == kept
    onward = second.responses.create(model=MODEL, input="two", previous_response_id=kept.id)
    assert first.responses.retrieve(onward.id).output_text == "again"
    second.responses.delete(kept.id)
    with pytest.raises(openai.NotFoundError):
        first.responses.retrieve(kept.id)


def test_a_stream_goes_on_at_another_gateway(
    gateways: tuple[openai.OpenAI, openai.OpenAI], session: FakeSession
) -> None:
    first, second = gateways
    session.script = steps(piece("Hel"), piece("lo", finish=FinishReason.STOP))
    there = list(first.responses.create(model=MODEL, input="x", background=True, stream=True))
    response = there[0].response.id  # type: ignore[union-attr]
    until("the end", lambda: second.responses.retrieve(response).status == "completed")
    for number in range(len(there)):
        here = list(second.responses.retrieve(response, stream=True, starting_after=number))
        assert here == there[number + 1 :]


def test_what_one_gateway_runs_another_follows_and_cancels(
    gateways: tuple[openai.OpenAI, openai.OpenAI], session: FakeSession
) -> None:
    first, second = gateways
    session.script = steps(piece("Hel"), HANG)
    response = first.responses.create(model=MODEL, input="x", background=True).id
    events = iter(second.responses.retrieve(response, stream=True))
    while next(events).type != "response.output_text.delta":
        pass
    second.responses.cancel(response)
    assert session.closed.wait(WAIT_S)
    assert list(events)[-1].type == "response.incomplete"
    until("the end", lambda: second.responses.retrieve(response).status == "cancelled")


def test_deleting_what_another_gateway_runs_ends_it(
    gateways: tuple[openai.OpenAI, openai.OpenAI], session: FakeSession
) -> None:
    first, second = gateways
    session.script = steps(piece("Hel"), HANG)
    response = first.responses.create(model=MODEL, input="x", background=True).id
    second.responses.delete(response)
    assert session.closed.wait(WAIT_S)
    with pytest.raises(openai.NotFoundError):
        first.responses.retrieve(response)


def is_kept(client: openai.OpenAI) -> bool:
    return client.responses.create(model=MODEL, input="x").to_dict()["store"] is True


def test_the_answer_matters_more_than_its_keeping(
    redis_server: RedisServer, session: FakeSession
) -> None:
    """Redis stands still: answers still come, and say that they are not stored."""
    config = GatewayConfig(responses_redis=redis_server.url)
    with served(create_app(session, config=config)) as url, connected(url) as client:
        kept = client.responses.create(model=MODEL, input="x")
        assert kept.to_dict()["store"] is True
        os.kill(redis_server.process.pid, signal.SIGSTOP)
        passing = client.responses.create(model=MODEL, input="x")
        assert passing.output_text == "Hello world"
        assert passing.to_dict()["store"] is False
        with pytest.raises(openai.InternalServerError) as error:
            client.responses.retrieve(kept.id)
        assert error.value.status_code == 503
        with pytest.raises(openai.InternalServerError):
            client.responses.create(model=MODEL, input="x", background=True)
        os.kill(redis_server.process.pid, signal.SIGCONT)
        until("Redis", lambda: is_kept(client))
