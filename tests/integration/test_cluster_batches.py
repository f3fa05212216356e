"""Batches of a whole cluster: gateways that share a Redis, of which one is killed at work, and
chats beside a batch, which do not wait behind it."""

import json
import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from redis import Redis

from tests.integration.harness import (
    TestCluster,
    held,
    replicas,
    running,
    settings,
    wait_for,
    wait_until_equal,
)
from tests.redis_server import RedisServer, running_redis

PATIENCE_S = 400.0
"""For what takes seconds where nobody else uses the cores."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * PATIENCE_S)]

PATH = "/v1/chat/completions"
LINES, LINES_AT_ONCE, ANSWERED_MIN = 64, 16, 5
CHATS, WAITING_MIN = 3, 4


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def gateways(small_model: Path, cluster_port: int, redis: RedisServer) -> Iterator[TestCluster]:
    """Two of them, at one address."""
    config = settings(
        small_model,
        model={"dtype": "float32", "served_name": "small"},
        decode={"threads": 1, "pool_blocks": 512},
        gateway={
            "replicas": 2,
            "http_port": cluster_port,
            "responses_redis": redis.url,
            "batches": {"lines_at_once": LINES_AT_ONCE},
        },
    )
    with running(config) as cluster:
        yield cluster


@pytest.fixture
def client(gateways: TestCluster) -> Iterator[Any]:
    """Asks again where the gateway that it was connected to is gone."""
    url = f"{gateways.url}/v1"
    with openai.OpenAI(base_url=url, api_key="-", max_retries=20, timeout=PATIENCE_S) as client:
        yield client


def body(text: str, tokens: int) -> dict[str, Any]:
    return {
        "model": "small",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "pdserve": {"why": True},
    }


def line(number: int, *, words: int, tokens: int) -> dict[str, Any]:
    asked = body(f"Tale {number}:" + " once" * words, tokens)
    return {"custom_id": str(number), "method": "POST", "url": PATH, "body": asked}


def begun(client: Any, lines: Iterable[dict[str, Any]]) -> str:
    data = "\n".join(map(json.dumps, lines))
    file = client.files.create(file=("tales.jsonl", data.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=PATH, completion_window="24h")
    return str(batch.id)


def answers_in(redis: RedisServer, batch: str) -> dict[str, Any]:
    """By their lines' numbers, those that are kept by now."""
    kept: Any = Redis.from_url(redis.url).hgetall(f"pdserve:document:{batch}:answers")
    return {number.decode(): json.loads(answer) for number, answer in kept.items()}


def worker_on(redis: RedisServer, batch: str) -> int:
    """The process that holds its lease."""
    ours: Any = Redis.from_url(redis.url)
    holders: list[bytes] = []

    def is_held() -> bool:
        holder: bytes | None = ours.get(f"pdserve:document:{batch}:lease")
        holders.extend([holder] if holder else [])
        return bool(holders)

    wait_for("a gateway to take it", is_held, timeout_s=PATIENCE_S)
    return int(holders[0].decode().split(":")[1])


def when_under_way(redis: RedisServer, batch: str) -> dict[str, Any]:
    """Its answers, some of them by then."""
    found: dict[str, Any] = {}

    def are_some() -> bool:
        found.update(answers_in(redis, batch))
        return len(found) >= ANSWERED_MIN

    wait_for("lines to be answered", are_some, timeout_s=PATIENCE_S)
    return found


def output_of(client: Any, batch: str) -> list[dict[str, Any]]:
    """Of the batch, once it is over."""
    wait_for(
        "the end of the batch",
        lambda: client.batches.retrieve(batch).status == "completed",
        timeout_s=PATIENCE_S,
    )
    over = client.batches.retrieve(batch)
    assert over.error_file_id is None
    assert over.request_counts.completed == LINES
    return [
        json.loads(each) for each in client.files.content(over.output_file_id).text.splitlines()
    ]


def queued_and_dispatched(answer: dict[str, Any]) -> tuple[float, float]:
    """When the router got a request, and when it sent it to a worker, by its own clock."""
    first = answer["pdserve"]["decisions"][0]
    dispatched: float = first["at_unix_ms"]
    return dispatched - first["waited_ms"], dispatched


def answered(cluster: TestCluster, asked: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(cluster.url + PATH, json=asked, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_a_chat_does_not_wait_behind_a_batch(
    gateways: TestCluster, client: Any, redis: RedisServer
) -> None:
    """By the router's own record: lines that were there before a chat go after it, although they
    are shorter."""
    batch = begun(client, (line(number, words=800, tokens=2) for number in range(LINES)))
    when_under_way(redis, batch)
    chats = []
    for number in range(CHATS):
        wait_for(
            "lines that wait",
            lambda: sum(gateways.status()["queue_lengths"]) >= WAITING_MIN,
            timeout_s=PATIENCE_S,
        )
        longer = f"Say {number}:" + " again" * 1000
        chats.append(answered(gateways, body(longer, 2)))
    assert len(answers_in(redis, batch)) < LINES, "no batch was beside the last chat"
    lines = [queued_and_dispatched(each["response"]["body"]) for each in output_of(client, batch)]
    overtaken = [
        sum(queued < came and went < dispatched for queued, dispatched in lines)
        for came, went in map(queued_and_dispatched, chats)
    ]
    print(f"chats have overtaken {overtaken} lines")
    assert sum(overtaken) >= CHATS
    wait_until_equal("held at rest", lambda: held(gateways), 0, timeout_s=PATIENCE_S)


def test_a_batch_goes_on_when_its_gateway_is_killed(
    gateways: TestCluster, client: Any, redis: RedisServer
) -> None:
    """Every line is answered once, by whichever of them; what was answered is not asked again."""
    lines = [line(number, words=1, tokens=120) for number in range(LINES)]
    batch = begun(client, lines)
    both, victim = replicas("gateway"), worker_on(redis, batch)
    assert victim in both
    assert len(both) == 2
    before = when_under_way(redis, batch)
    os.kill(victim, signal.SIGKILL)
    assert len(before) < LINES, "there was something left to do"
    answers = output_of(client, batch)
    assert Counter(each["custom_id"] for each in answers) == {str(n): 1 for n in range(LINES)}
    by_line = {each["custom_id"]: each for each in answers}
    assert [name for name, kept in before.items() if by_line[name] != kept] == []
    alone = answered(gateways, lines[-1]["body"])
    assert answers[-1]["response"]["body"]["choices"] == alone["choices"]
    wait_for(
        "two gateways again",
        lambda: len(replicas("gateway")) == 2 and victim not in replicas("gateway"),
        timeout_s=PATIENCE_S,
    )
    wait_until_equal("held at rest", lambda: held(gateways), 0, timeout_s=PATIENCE_S)
