"""Clients that leave, do not read, come all at once, or ask for more than there is."""

import asyncio
import contextlib
import json
import os
import random
import resource
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.faults import rows
from tests.faults.poisoned import TTFT_MAX_MS, poisoned_cluster
from tests.integration.harness import (
    TestCluster,
    held,
    random_prompts,
    replicas,
    stream_tokens,
    wait_for,
    wait_until_equal,
)

pytestmark = pytest.mark.slow

SEED = 16
SIZE = int(os.environ.get("FAULTS_REQUESTS_PER_CLIENT", "100"))
LEAVING = 10 * SIZE
LEAVING_AT_ONCE = 40
IDENTICAL = 20 * SIZE
QUIET_S = 60.0
BLOCK_TOKENS = 16
RETRY_AFTER_S_MAX = 120


@pytest.fixture
def flooded(small_model: Path) -> TestCluster:
    found = poisoned_cluster(small_model)
    wait_for("quiet", lambda: held(found) == 0)
    return found


def _quiet(flooded: TestCluster) -> str:
    """How long it took; reports lag by up to a second."""
    begun_s = time.monotonic()
    wait_until_equal("held at rest", lambda: held(flooded), 0, timeout_s=QUIET_S)
    return f"at rest after {time.monotonic() - begun_s:.1f} s"


def _post(
    flooded: TestCluster, body: dict[str, Any], *, small_buffer: bool = False
) -> socket.socket:
    """A connection on which a completion was asked for."""
    parts = urlsplit(flooded.url)
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    connection = socket.socket()
    if small_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(QUIET_S)
    connection.connect((parts.hostname, parts.port))
    connection.sendall(head.encode() + data)
    return connection


def test_whoever_leaves_in_any_phase_leaves_nothing_behind(flooded: TestCluster) -> None:
    """F16. Some close, some reset; some before their prompt is computed, some in mid-answer."""
    chance = random.Random(SEED)
    print(f"seed {SEED}")

    at_once = asyncio.Semaphore(LEAVING_AT_ONCE)

    async def leave(prompt: list[int], after_tokens: int, after_s: float, *, reset: bool) -> None:
        async with at_once:
            await leave_now(prompt, after_tokens, after_s, reset=reset)

    async def leave_now(
        prompt: list[int], after_tokens: int, after_s: float, *, reset: bool
    ) -> None:
        body = {"prompt": prompt, "max_tokens": 2000, "ignore_eos": True, "stream": True}
        connection = await asyncio.to_thread(_post, flooded, body)
        try:
            if after_tokens:
                received = 0
                while received < 200 * after_tokens:
                    data = await asyncio.to_thread(connection.recv, 4096)
                    if not data:
                        break
                    received += len(data)
            else:
                await asyncio.sleep(after_s)
        finally:
            if reset:
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.close()

    async def all_of_them() -> None:
        blocking = ThreadPoolExecutor(LEAVING_AT_ONCE)
        asyncio.get_running_loop().set_default_executor(blocking)
        await asyncio.gather(
            *(
                leave(
                    prompt,
                    chance.choice((0, 0, 1, 5, 20)),
                    chance.uniform(0, 0.5),
                    reset=chance.random() < 0.5,
                )
                for prompt in random_prompts(LEAVING, seed=SEED, length=300)
            )
        )

    asyncio.run(all_of_them())
    quiet = _quiet(flooded)
    assert flooded.tokens([100, 200, 300], 5)
    what = "clients close or reset their connections, queued, in prefill, in mid-answer"
    load = f"{LEAVING} clients, {LEAVING_AT_ONCE} at a time"
    rows.enter("F16", what, load, quiet, seed=SEED)


def test_cancelled_prompts_do_not_hold_up_a_later_one(flooded: TestCluster) -> None:
    """F17. What is computed after the cancels is the short prompt, and the steps under way."""
    long_prompts = random_prompts(10, seed=17, length=3000)
    before = flooded.counter("prefill", "prompt_tokens_computed")
    arrived = flooded.status()["counters"]["arrived"]
    body = {"max_tokens": 8, "ignore_eos": True, "stream": True}
    connections = [_post(flooded, {**body, "prompt": prompt}) for prompt in long_prompts]
    wait_for(
        "all to arrive",
        lambda: flooded.status()["counters"]["arrived"] == arrived + len(long_prompts),
    )
    for connection in connections:
        connection.close()
    short = random_prompts(1, seed=18, length=40)[0]
    begun_s = time.monotonic()
    assert len(flooded.tokens(short, 2)) == 2
    took_s = time.monotonic() - begun_s
    _quiet(flooded)
    computed = flooded.counter("prefill", "prompt_tokens_computed") - before
    assert computed < 8 * 3000
    rows.enter(
        "F17",
        "ten long prompts cancelled before their first token, then a short one",
        "10 prompts of 3000 tokens",
        f"2 tokens of the short one after {took_s:.1f} s; {computed} of 30000 tokens computed",
        seed=17,
        whole=1,
    )


def test_a_client_that_does_not_read_is_cut_off_and_others_do_not_notice(
    flooded: TestCluster,
) -> None:
    """F18. One reads nothing, one a byte now and then; neither may keep megabytes."""
    (gateway,) = replicas("gateway")
    other = random_prompts(1, seed=20, length=50)[0]
    calm = flooded.tokens(other, 100)
    resident = _resident_bytes(gateway)
    body = {
        "prompt": random_prompts(1, seed=19, length=40)[0],
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": True,
        "n": 4,
        "logprobs": 5,
    }
    silent, slow = (_post(flooded, body, small_buffer=True) for _ in range(2))
    wait_for("both to run", lambda: flooded.counter("decode", "tokens_generated") > 0)
    assert flooded.tokens(other, 100) == calm

    def given_back() -> bool:
        slow.setblocking(False)
        with contextlib.suppress(OSError):
            slow.recv(1)
        return held(flooded) == 0

    wait_for("both to be cut off", given_back)
    assert flooded.tokens(other, 100) == calm
    grown = _resident_bytes(gateway) - resident
    assert grown < 64 * 2**20
    rows.enter(
        "F18",
        "one client reads nothing, one a byte now and then",
        "4 answers of 1500 tokens each, with log-probabilities",
        f"both cut off, the gateway grew by {grown / 2**20:.1f} MiB",
        seed=19,
        whole=2,
    )
    silent.close()
    slow.close()


def test_identical_prompts_at_once_are_computed_once(flooded: TestCluster) -> None:
    """F23. Once at each prefill worker at most, and but for the last block of each."""
    (gateway,) = replicas("gateway")
    prompt = random_prompts(1, seed=23, length=600)[0]
    before = flooded.counter("prefill", "prompt_tokens_computed")
    descriptors = _descriptors(gateway)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert limit > 2 * IDENTICAL

    async def all_at_once() -> list[list[int]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            streams = await asyncio.gather(
                *(stream_tokens(flooded.url, prompt, 3, client=client) for _ in range(IDENTICAL))
            )
        assert {stream.error for stream in streams} == {None}
        return [stream.tokens for stream in streams]

    answers = asyncio.run(all_at_once())
    assert len({tuple(answer) for answer in answers}) == 1
    _quiet(flooded)
    computed = flooded.counter("prefill", "prompt_tokens_computed") - before
    assert computed <= 2 * len(prompt) + IDENTICAL * BLOCK_TOKENS
    wait_for("descriptors to be closed", lambda: _descriptors(gateway) <= descriptors + 4)
    rows.enter(
        "F23",
        "the same prompt on so many connections at once",
        f"{IDENTICAL} clients, a prompt of {len(prompt)} tokens",
        f"{computed} prompt tokens computed, no descriptor left open",
        seed=23,
        whole=IDENTICAL,
    )


def test_a_flood_is_shed_with_a_hint_and_who_is_let_in_is_served(flooded: TestCluster) -> None:
    prompts = random_prompts(80, seed=24, length=1500)

    async def ask(client: httpx.AsyncClient, prompt: list[int]) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": 2, "service_tier": "priority", "ignore_eos": True}
        return await client.post(f"{flooded.url}/v1/completions", json=body)

    async def all_at_once() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    answers = asyncio.run(all_at_once())
    shed = [answer for answer in answers if answer.status_code == 503]
    served = [answer for answer in answers if answer.status_code == 200]
    print(f"{len(served)} served, {len(shed)} shed at a bound of {TTFT_MAX_MS:g} ms")
    assert len(shed) + len(served) == len(answers)
    assert shed
    assert served
    for answer in shed:
        assert answer.json()["error"]["code"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= RETRY_AFTER_S_MAX
        assert 0 < int(answer.headers["retry-after-ms"]) <= 1000 * RETRY_AFTER_S_MAX
    assert flooded.status()["counters"]["shed"] >= 1
    _quiet(flooded)


def test_an_expired_request_is_answered_504_and_nothing_of_it_stays(flooded: TestCluster) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 4000, "ignore_eos": True}
    for headers in (
        {"x-request-timeout-ms": "700"},
        {"x-request-deadline": f"{time.time() + 0.7:.3f}"},
        {"x-stainless-read-timeout": "0.7"},
        {"x-envoy-expected-rq-timeout-ms": "700"},
    ):
        answer = httpx.post(f"{flooded.url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 504, (headers, answer.text)
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert answer.headers["x-should-retry"] == "false"
    _quiet(flooded)


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
