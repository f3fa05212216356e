"""Batches over real sockets, as OpenAI's own client runs them: every line is answered once, in one
of two files, whatever happens to the gateway that began."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import openai
import pytest
from redis.asyncio.connection import Connection

from pdserve.batch_config import BatchConfig
from pdserve.cluster.gateway.access import Doorkeeper, Key, KeyFile, digest_of, write_keys
from pdserve.cluster.gateway.calls import Call
from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.batches import running
from pdserve.cluster.http.batches.running import OPEN
from pdserve.config import GatewayConfig
from pdserve.errors import QueueFull
from pdserve.messages import ServiceClass
from tests.integration.harness import wait_for
from tests.integration.http_server import served
from tests.redis_server import RedisServer
from tests.unit.cluster.fake_session import HANG, FakeSession, Step, said

WAIT_S = 120.0
CHAT = "/v1/chat/completions"
OVER = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "BEAT_S", 0.05)
    monkeypatch.setattr(running, "POLL_S", 0.05)
    monkeypatch.setattr(running, "BACK_OFF_MS_MIN", 5)


def client(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)


def chat(custom_id: str, text: str = "hi", **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def begun(ours: Any, lines: Iterable[Any], **fields: Any) -> Any:
    data = b"".join(json.dumps(each).encode() + b"\n" for each in lines)
    file = ours.files.create(file=("lines.jsonl", data), purpose="batch")
    asked = {"endpoint": CHAT, "completion_window": "24h", **fields}
    return ours.batches.create(input_file_id=file.id, **asked)


def ended(ours: Any, batch: Any) -> Any:
    latest = batch

    def look() -> bool:
        nonlocal latest
        latest = ours.batches.retrieve(batch.id)
        return latest.status in OVER

    wait_for("the batch is over", look, timeout_s=WAIT_S)
    return latest


def lines_in(ours: Any, file: str | None) -> list[dict[str, Any]]:
    return [] if file is None else list(map(json.loads, ours.files.content(file).text.splitlines()))


def test_a_batch_answers_each_line_once() -> None:
    session = FakeSession(said("Hello"))
    with served(create_app(session, config=GatewayConfig())) as url:
        ours = client(url)
        lines = [chat(f"good-{at}") for at in range(20)]
        lines[3]["body"]["temperature"] = 9
        lines[7]["body"]["stream"] = True
        lines[9]["body"]["model"] = "nobody"
        batch = begun(ours, lines, metadata={"for": "test"})
        assert (batch.status, batch.object) == ("validating", "batch")
        batch = ended(ours, batch)
        assert (batch.status, batch.metadata) == ("completed", {"for": "test"})
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (20, 17, 3)
        good, bad = lines_in(ours, batch.output_file_id), lines_in(ours, batch.error_file_id)
        ids = [each["custom_id"] for each in good]
        assert ids == [f"good-{at}" for at in range(20) if at not in (3, 7, 9)]
        texts = {each["response"]["body"]["choices"][0]["message"]["content"] for each in good}
        assert texts == {"Hello"}
        problems = [each["response"]["body"]["error"]["param"] for each in bad]
        assert problems == ["temperature", "stream", "model"]
        assert batch.usage.total_tokens == sum(
            each["response"]["body"]["usage"]["total_tokens"] for each in good
        )
        assert {call.service_class for call in session.calls} == {ServiceClass.BATCH}
        assert [each.id for each in ours.batches.list()] == [batch.id]
        assert {each.purpose for each in ours.files.list()} == {"batch", "batch_output"}


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/embeddings", {"input": ["hi", "ho"]}),
        ("/v1/responses", {"input": "hi"}),
    ],
)
def test_each_endpoint_works_in_a_batch(endpoint: str, body: dict[str, Any]) -> None:
    with served(create_app(FakeSession(), config=GatewayConfig())) as url:
        ours = client(url)
        line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
        batch = ended(ours, begun(ours, [line], endpoint=endpoint))
        assert batch.status == "completed"
        (answer,) = lines_in(ours, batch.output_file_id)
        assert answer["response"]["status_code"] == 200
        assert batch.usage.input_tokens > 0


def test_a_file_that_is_no_batch_fails_with_line_numbers() -> None:
    with served(create_app(FakeSession(), config=GatewayConfig())) as url:
        ours = client(url)
        batch = ended(ours, begun(ours, [chat("a"), {"custom_id": "b"}, chat("a")]))
        assert batch.status == "failed"
        found = [(each.line, each.code) for each in batch.errors.data]
        assert found == [(2, "invalid_method"), (3, "duplicate_custom_id")]


def test_a_refused_line_is_asked_again() -> None:
    left = [3]

    def sometimes(call: Call) -> Iterable[Step]:
        left[0] -= 1
        if left[0] >= 0:
            return [QueueFull("not now", retry_after_ms=1)]
        return said("Hello")(call)

    with served(create_app(FakeSession(sometimes), config=GatewayConfig())) as url:
        ours = client(url)
        batch = ended(ours, begun(ours, [chat("a"), chat("b")]))
        assert (batch.status, batch.request_counts.completed) == ("completed", 2)


def hanging_at(word: str) -> Callable[[Call], Iterable[Step]]:
    def script(call: Call) -> Iterable[Step]:
        return [HANG] if word.encode() in bytes(call.prompt) else said("Hello")(call)

    return script


def test_few_lines_are_under_way_at_once() -> None:
    session = FakeSession(hanging_at("wait"))
    config = GatewayConfig(batches=BatchConfig(lines_at_once=2))
    with served(create_app(session, config=config)) as url:
        ours = client(url)
        batch = begun(ours, [chat(str(at), "wait") for at in range(9)])
        wait_for("two are asked", lambda: len(session.open) == 2, timeout_s=WAIT_S)
        # Somebody else is answered meanwhile.
        answer = ours.chat.completions.create(
            model="", messages=[{"role": "user", "content": "hi"}]
        )
        assert answer.choices[0].message.content == "Hello"
        assert len(session.open) == 2
        ours.batches.cancel(batch.id)
        assert ended(ours, batch).status == "cancelled"


def test_what_is_cancelled_keeps_what_is_answered() -> None:
    session = FakeSession(hanging_at("wait"))
    with served(create_app(session, config=GatewayConfig())) as url:
        ours = client(url)
        batch = begun(ours, [chat("a"), chat("b", "wait")])
        wait_for(
            "one is answered",
            lambda: ours.batches.retrieve(batch.id).request_counts.completed == 1,
            timeout_s=WAIT_S,
        )
        assert ours.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        batch = ended(ours, batch)
        assert batch.status == "cancelled"
        assert [each["custom_id"] for each in lines_in(ours, batch.output_file_id)] == ["a"]
        (bad,) = lines_in(ours, batch.error_file_id)
        assert (bad["custom_id"], bad["error"]["code"]) == ("b", "batch_cancelled")
        wait_for("nothing runs", lambda: not session.open, timeout_s=WAIT_S)
        with pytest.raises(openai.BadRequestError):
            ours.batches.cancel(batch.id)


def test_a_window_closes() -> None:
    with served(create_app(FakeSession(hanging_at("wait")), config=GatewayConfig())) as url:
        ours = client(url)
        batch = begun(ours, [chat("a"), chat("b", "wait")], completion_window="1s")
        batch = ended(ours, batch)
        assert batch.status in ("expired", "completed")
        codes = [each["error"] for each in lines_in(ours, batch.error_file_id)]
        assert len(codes) + len(lines_in(ours, batch.output_file_id)) == 2


def test_a_tenant_sees_its_own_alone(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    both = [Key(name, tenant=name, sha256=digest_of(name)) for name in ("one", "two")]
    write_keys(keys, KeyFile(tuple(both)))
    app = create_app(FakeSession(), config=GatewayConfig(), doorkeeper=Doorkeeper(keys))
    with served(app) as url:
        one, two = client(url, "one"), client(url, "two")
        batch = ended(one, begun(one, [chat("a")]))
        attempts: list[Callable[[], Any]] = [
            lambda: two.batches.retrieve(batch.id),
            lambda: two.batches.cancel(batch.id),
            lambda: two.files.retrieve(batch.input_file_id),
            lambda: two.files.content(batch.output_file_id),
            lambda: two.files.delete(batch.output_file_id),
        ]
        for missing in attempts:
            with pytest.raises(openai.NotFoundError):
                missing()
        with pytest.raises(openai.BadRequestError):
            two.batches.create(
                input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"
            )
        assert list(two.files.list()) == []
        assert list(two.batches.list()) == []
        assert batch.status == "completed"


def test_a_tenants_name_is_no_other_list(tmp_path: Path) -> None:
    """Whatever it is called: the gateway's own list of batches that are open is not its own."""
    keys = tmp_path / "keys.json"
    names = ("one", "open")
    write_keys(keys, KeyFile(tuple(Key(name, name, digest_of(name)) for name in names)))
    session = FakeSession(hanging_at("wait"))
    app = create_app(session, config=GatewayConfig(), doorkeeper=Doorkeeper(keys))
    with served(app) as url:
        batch = begun(client(url, "one"), [chat("a", "wait")])
        wait_for("it is asked", lambda: len(session.open) == 1, timeout_s=WAIT_S)
        assert [each.id for each in client(url, "one").batches.list()] == [batch.id]
        assert list(client(url, "open").batches.list()) == []
        client(url, "one").batches.cancel(batch.id)
        ended(client(url, "one"), batch)


def test_a_list_asks_redis_once_however_long_it_is(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    send = Connection.send_packed_command

    async def noted(self: Any, command: Any, **others: Any) -> None:
        asked.append(command if isinstance(command, bytes) else b"".join(command))
        await send(self, command, **others)

    def round_trips(listed: Callable[[], Any], count: int) -> int:
        """Without those of the gateway that looks for work."""
        asked.clear()
        assert len(list(listed())) == count
        of_lists = [each for each in asked if b":document:" in each]
        return sum(f"group:{OPEN}".encode() not in each for each in of_lists)

    config = GatewayConfig(responses_redis=redis_server.url)
    with served(create_app(FakeSession(), config=config)) as url:
        ours = client(url)
        for _ in range(4):
            ended(ours, begun(ours, [chat("a")]))
        monkeypatch.setattr(Connection, "send_packed_command", noted)
        for listed, count in ((ours.files.list, 8), (ours.batches.list, 4)):
            round_trips(listed, count)  # the first one tells Redis the script
            assert round_trips(listed, count) == 1


@pytest.fixture
def two_gateways(redis_server: RedisServer) -> tuple[FakeSession, Any, FakeSession, Any]:
    """Two gateways with one Redis; the first one's calls wait."""
    config = GatewayConfig(responses_redis=redis_server.url)
    first, second = FakeSession(hanging_at("wait")), FakeSession(said("Hello"))
    apps = [create_app(session, config=config) for session in (first, second)]
    return first, apps[0], second, apps[1]


def test_another_gateway_goes_on(
    two_gateways: tuple[FakeSession, Any, FakeSession, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one stops in the midst of it; what it has answered is not asked again."""
    first, app, second, other = two_gateways
    monkeypatch.setattr(running, "LEASE_S", 1.0)
    with served(other) as elsewhere:
        with served(app) as url:
            ours = client(url)
            lines = [chat(str(at), "wait" if at % 2 else "go") for at in range(10)]
            batch = begun(ours, lines)
            wait_for(
                "what goes is answered",
                lambda: ours.batches.retrieve(batch.id).request_counts.completed == 5,
                timeout_s=WAIT_S,
            )
            assert len(first.open) == 5
            assert second.calls == []
        # Its loop is gone, and nobody renews the lease.
        theirs = client(elsewhere)
        theirs.batches.list()
        batch = ended(theirs, batch)
        assert batch.status == "completed"
        answers = lines_in(theirs, batch.output_file_id)
        assert Counter(each["custom_id"] for each in answers) == {str(at): 1 for at in range(10)}
        assert len(second.calls) == 5
        assert batch.error_file_id is None


def test_a_batch_is_cancelled_at_another_gateway(
    two_gateways: tuple[FakeSession, Any, FakeSession, Any],
) -> None:
    first, app, _, other = two_gateways
    with served(app) as url, served(other) as elsewhere:
        ours, theirs = client(url), client(elsewhere)
        batch = begun(ours, [chat("a", "wait")])
        wait_for("it is asked", lambda: len(first.open) == 1, timeout_s=WAIT_S)
        assert theirs.batches.cancel(batch.id).status == "cancelling"
        assert ended(theirs, batch).status == "cancelled"
        wait_for("nothing runs", lambda: not first.open, timeout_s=WAIT_S)
