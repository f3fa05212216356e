"""Poison, hangs, deadlines, floods and slow readers, without Ray: what each costs the others."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from pdserve.engine.faults import STEP_ENV
from tests.integration.harness import (
    random_prompts,
    settings,
    stream_tokens,
    wait_for,
    wait_until_equal,
)
from tests.integration.in_process import InProcessCluster, in_process

WAIT_S = 60.0
RAISES, HANGS = 41_002, 41_003
OUTPUT_TOKENS = 60
TTFT_MAX_MS = 2000.0
WRITE_TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Is there once a step has hung."""
    return tmp_path_factory.mktemp("hung") / "once"


@pytest.fixture(scope="module")
def cluster(
    small_model: Path, tmp_path_factory: pytest.TempPathFactory, hung: Path
) -> Iterator[InProcessCluster]:
    config = settings(
        small_model,
        prefill={"replicas": 2, "pool_blocks": 400},
        decode={"pool_blocks": 600},
        router={"ttft_max_ms": {"interactive": TTFT_MAX_MS}},
        gateway={"write_timeout_s": WRITE_TIMEOUT_S, "grpc_port": -1},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STEP_ENV, f"raise:{RAISES},hang:{HANGS}:{hung}")
        with in_process(config, tmp_path_factory.mktemp("house"), small_model) as cluster:
            yield cluster


@pytest.fixture(autouse=True)
def quiet(cluster: InProcessCluster) -> None:
    wait_until_equal("held at rest", cluster.held, 0, timeout_s=WAIT_S)


def _prompt(token: int, *, length: int = 40) -> list[int]:
    """Its last block is not full, and holds the token."""
    return [*random_prompts(1, seed=token, length=length)[0], token, 7]


def _complete(cluster: InProcessCluster, prompt: list[int], **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True, "temperature": 0.0, **more}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=WAIT_S)


def _streams(cluster: InProcessCluster, count: int) -> list[list[int]]:
    async def all_of_them() -> list[list[int]]:
        async with httpx.AsyncClient(timeout=WAIT_S) as client:
            streams = await asyncio.gather(
                *(
                    stream_tokens(cluster.url, prompt, OUTPUT_TOKENS, client=client)
                    for prompt in random_prompts(count, seed=1, length=90)
                )
            )
        assert {stream.error for stream in streams} == {None}
        return [stream.tokens for stream in streams]

    return asyncio.run(all_of_them())


def test_a_request_whose_steps_raise_is_refused_by_its_id_and_others_go_on(
    cluster: InProcessCluster,
) -> None:
    calm = _streams(cluster, 3)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(_streams, cluster, 3)
        answer = _complete(cluster, _prompt(RAISES))
        assert beside.result(WAIT_S) == calm
    assert answer.status_code == 500, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("poison_request", "server_error")
    assert error["request_id"].startswith("cmpl-")
    assert error["request_id"] in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    wait_until_equal("steps that failed", lambda: cluster.counter("steps_failed"), 2, timeout_s=60)
    assert len(cluster.names()) == 3, "no worker died of it"


@pytest.mark.parametrize(
    "headers",
    [
        {"x-request-timeout-ms": "500"},
        pytest.param({"x-stainless-read-timeout": "0.5"}, marks=pytest.mark.slow),
        pytest.param({"x-envoy-expected-rq-timeout-ms": "500"}, marks=pytest.mark.slow),
    ],
    ids=lambda headers: next(iter(headers)),
)
def test_what_is_late_is_answered_so_and_leaves_nothing(
    cluster: InProcessCluster, headers: dict[str, str]
) -> None:
    answer = _complete(cluster, [5, 6, 7], max_tokens=6000, headers=headers)
    assert answer.status_code == 504, answer.text
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.slow
def test_a_flood_is_shed_with_hints_and_who_is_let_in_is_served(cluster: InProcessCluster) -> None:
    async def all_at_once() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=WAIT_S, limits=limits) as client:
            bodies = [
                {"prompt": prompt, "max_tokens": 1, "service_tier": "priority"}
                for prompt in random_prompts(80, seed=2, length=1500)
            ]
            asking = (client.post(f"{cluster.url}/v1/completions", json=body) for body in bodies)
            return await asyncio.gather(*asking)

    answers = asyncio.run(all_at_once())
    shed = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in shed:
        assert answer.json()["error"]["code"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert 0 < int(answer.headers["retry-after-ms"]) <= 120_000


@pytest.mark.slow
def test_identical_prompts_at_once_are_computed_once_at_each_worker(
    cluster: InProcessCluster,
) -> None:
    count, prompt = 30, random_prompts(1, seed=3, length=500)[0]
    before = cluster.counter("prompt_tokens_computed")

    async def all_at_once() -> set[tuple[int, ...]]:
        async with httpx.AsyncClient(timeout=WAIT_S) as client:
            streams = await asyncio.gather(
                *(stream_tokens(cluster.url, prompt, 2, client=client) for _ in range(count))
            )
        return {tuple(stream.tokens) for stream in streams}

    assert len(asyncio.run(all_at_once())) == 1
    wait_until_equal("held at rest", cluster.held, 0, timeout_s=WAIT_S)
    computed = cluster.counter("prompt_tokens_computed") - before
    assert computed <= 2 * len(prompt) + count * 16, f"{computed} for {count} of {len(prompt)}"


@pytest.mark.slow
def test_cancelled_prompts_do_not_hold_up_a_later_one(cluster: InProcessCluster) -> None:
    before = cluster.counter("prompt_tokens_computed")
    arrived = cluster.snapshot().counters["arrived"]
    body = {"max_tokens": 8, "stream": True}
    connections = [
        _post(cluster, {**body, "prompt": prompt})
        for prompt in random_prompts(8, seed=4, length=5000)
    ]
    wait_for("all to arrive", lambda: cluster.snapshot().counters["arrived"] == arrived + 8)
    for connection in connections:
        connection.close()
    assert _complete(cluster, [1, 2, 3]).status_code == 200
    wait_until_equal("held at rest", cluster.held, 0, timeout_s=WAIT_S)
    computed = cluster.counter("prompt_tokens_computed") - before
    assert computed < 6 * 5000, "what nobody waited for was computed all the same"


@pytest.mark.slow
def test_a_client_that_does_not_read_is_cut_off(cluster: InProcessCluster) -> None:
    """Its answers are larger than all buffers together, and would not end for minutes."""
    body = {
        "prompt": [5, 6, 7],
        "max_tokens": 7000,
        "ignore_eos": True,
        "stream": True,
        "n": 4,
        "logprobs": 5,
        "return_token_ids": True,
    }
    connection = _post(cluster, body)
    wait_for("it to run", lambda: sum(cluster.snapshot().phases.values()) > 0)
    wait_until_equal("held at rest", cluster.held, 0, timeout_s=WAIT_S)
    assert cluster.session.in_flight == 0
    connection.close()
    assert _complete(cluster, [1, 2, 3]).status_code == 200


@pytest.mark.slow
def test_a_worker_whose_engine_hangs_is_left_though_its_process_lives(
    cluster: InProcessCluster, hung: Path
) -> None:
    """The last test here: the worker stays as it is."""
    before = cluster.names()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(_complete, cluster, _prompt(HANGS))
        wait_for("the hang", hung.exists)
        begun_s = time.monotonic()
        wait_for("traffic to leave", lambda: len(cluster.names()) == len(before) - 1)
        print(f"left after {time.monotonic() - begun_s:.2f} s")
        assert asked.result(WAIT_S).status_code == 200, "another worker has computed it"
    (left,) = before - cluster.names()
    with pytest.raises(RuntimeError, match="hangs"):
        cluster.workers[left].check_health()


def _post(cluster: InProcessCluster, body: dict[str, Any]) -> socket.socket:
    """A connection with small buffers, on which a completion was asked for."""
    parts = urlsplit(cluster.url)
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.socket())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(WAIT_S)
        connection.connect((parts.hostname, parts.port))
        connection.sendall(head.encode() + data)
        stack.pop_all()
    return connection
