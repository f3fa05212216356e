"""Requests that kill, break or hang whoever computes them, among others that do nothing wrong."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.faults import rows
from tests.faults.poisoned import EXITS, HANGS, HUNG, RAISES, poisoned_cluster
from tests.integration.harness import (
    Stream,
    TestCluster,
    held,
    random_prompts,
    storm,
    wait_for,
    wait_until_equal,
)

pytestmark = pytest.mark.slow

STREAMS = 4
OUTPUT_TOKENS = 150
POISON_S = 120.0


@pytest.fixture
def poisoned(small_model: Path) -> TestCluster:
    return poisoned_cluster(small_model)


@pytest.fixture
def hung() -> Iterator[Path]:
    """Whether the fault has struck."""
    HUNG.unlink(missing_ok=True)
    yield HUNG
    HUNG.unlink(missing_ok=True)


def _ask(cluster: TestCluster, token: int, *, at: int = 60) -> httpx.Response:
    """A prompt with the token, in its last, unfinished block."""
    prompt = [*random_prompts(1, seed=token, length=at)[0], token, 7, 8]
    body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=POISON_S)


def _all_workers(cluster: TestCluster) -> bool:
    return all(len(cluster.pids(role)) == 2 for role in ("prefill", "decode"))


def _among_others(
    cluster: TestCluster, token: int, seed: int
) -> tuple[httpx.Response, list[Stream]]:
    """The answer to the poison, which is sent when the others have begun."""
    answers: list[httpx.Response] = []
    sender = threading.Thread(target=lambda: answers.append(_ask(cluster, token)))
    prompts = random_prompts(STREAMS, seed=seed, length=200)
    streams = storm(cluster, prompts, OUTPUT_TOKENS, at=STREAMS, strike=sender.start)
    sender.join(POISON_S)
    assert len(answers) == 1, "the poison was not answered"
    return answers[0], streams


@pytest.mark.parametrize("token", [RAISES, EXITS], ids=["raises", "exits"])
def test_a_poison_request_is_refused_by_its_id_and_nobody_else_is(
    poisoned: TestCluster, token: int
) -> None:
    wait_for("all workers", lambda: _all_workers(poisoned))
    before = {role: poisoned.pids(role) for role in ("prefill", "decode")}
    answer, streams = _among_others(poisoned, token, seed=token)
    assert answer.status_code == 500, answer.text
    error = answer.json()["error"]
    assert error["code"] == "poison_request"
    assert error["request_id"].startswith("cmpl-")
    assert error["request_id"] in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert [stream.error for stream in streams] == [None] * STREAMS
    if token == RAISES:  # only its step failed
        assert before == {role: poisoned.pids(role) for role in ("prefill", "decode")}
    wait_for("all workers", lambda: _all_workers(poisoned))
    prompts = random_prompts(STREAMS, seed=token, length=200)
    calm = storm(poisoned, prompts, OUTPUT_TOKENS)
    assert [stream.tokens for stream in streams] == [stream.tokens for stream in calm]
    wait_until_equal("held at rest", lambda: held(poisoned), 0, timeout_s=60)
    rows.enter(
        "F14",
        f"a request whose steps {'raise' if token == RAISES else 'end their process'}",
        f"{STREAMS} others in mid-stream",
        f"the request is refused by its id: 500 {error['code']}",
        seed=token,
        whole=STREAMS,
    )


def test_a_worker_whose_engine_hangs_is_left_and_replaced(
    poisoned: TestCluster, hung: Path
) -> None:
    """Its process lives, and answers whoever asks how it is."""
    wait_for("all workers", lambda: _all_workers(poisoned))
    before = poisoned.pids("prefill")
    answers: list[httpx.Response] = []
    sender = threading.Thread(target=lambda: answers.append(_ask(poisoned, HANGS)))
    sender.start()
    wait_for("the hang", hung.exists)
    begun_s = time.monotonic()
    wait_for("traffic to leave", lambda: len(set(before) & set(poisoned.pids("prefill"))) == 1)
    left_s = time.monotonic() - begun_s
    sender.join(POISON_S)
    assert [answer.status_code for answer in answers] == [200], "another worker computes it"
    (stuck,) = set(before) - set(poisoned.pids("prefill"))
    wait_for("a successor", lambda: _all_workers(poisoned))
    wait_for("the end of the one that hung", lambda: not _lives(stuck))
    wait_until_equal("held at rest", lambda: held(poisoned), 0, timeout_s=60)
    rows.enter(
        "F22",
        "the engine's thread hangs in a process that answers",
        "the request whose step hangs",
        f"traffic has left after {left_s:.1f} s; the worker is replaced",
        seed=HANGS,
        whole=1,
    )


def test_a_stopped_worker_is_left_and_comes_back(poisoned: TestCluster) -> None:
    """It says nothing, and its connections stay open."""
    wait_for("all workers", lambda: _all_workers(poisoned))
    before = poisoned.pids("decode")
    stopped = before[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        begun_s = time.monotonic()
        wait_for("traffic to leave", lambda: stopped not in poisoned.pids("decode"))
        print(f"left after {time.monotonic() - begun_s:.2f} s")
        assert len(poisoned.tokens([100, 200, 300], 20)) == 20
    finally:
        os.kill(stopped, signal.SIGCONT)
    wait_for("all workers", lambda: _all_workers(poisoned))
    wait_until_equal("held at rest", lambda: held(poisoned), 0, timeout_s=60)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
