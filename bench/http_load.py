"""Streamed completions with a clock on every event, for benchmarks of the HTTP API.

The client shares the machine with what it measures, so while tokens come it only takes times;
events are read when the answer is complete.
"""

import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Answer:
    """Times in seconds on one clock for all answers."""

    sent_s: float
    first_byte_s: float
    token_s: list[float]  # when each token came
    tokens: list[int]
    timing: dict[str, Any]  # the cluster's own account
    cached_tokens: int


def random_tokens(count: int, seed: int, vocabulary: int = 32_000) -> list[int]:
    """Ids of ordinary tokens: a prompt that nobody has cached."""
    source = random.Random(seed)
    return [source.randrange(100, vocabulary) for _ in range(count)]


def ask(url: str, prompt: Sequence[int], generated_tokens: int) -> Answer:
    """Over a connection of its own, which is open before the clock starts."""
    body = json.dumps(
        {
            "prompt": list(prompt),
            "max_tokens": generated_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "include_timing": True,
        }
    )
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
    connection.connect()
    try:
        sent_s = time.perf_counter()
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()  # the status line leaves with the first token
        first_byte_s = time.perf_counter()
        assert response.status == 200, response.read()
        lines = [(time.perf_counter(), line) for line in response]
    finally:
        connection.close()
    return read_events(sent_s, first_byte_s, lines, generated_tokens)


def ask_all(url: str, prompts: Sequence[Sequence[int]], generated_tokens: int) -> list[Answer]:
    """All at once."""
    answers: list[Answer] = []
    threads = [
        threading.Thread(target=lambda p=prompt: answers.append(ask(url, p, generated_tokens)))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == len(prompts), "an answer failed; its error is above"
    return answers


def read_events(
    sent_s: float, first_byte_s: float, lines: Sequence[tuple[float, bytes]], generated_tokens: int
) -> Answer:
    """An answer from its lines, each with the time at which it came."""
    token_s: list[float] = []
    tokens: list[int] = []
    timing: dict[str, Any] = {}
    cached_tokens = 0
    for at_s, line in lines:
        data = line.decode().strip().removeprefix("data: ")
        if not data or data == "[DONE]":
            continue
        event = json.loads(data)
        assert "error" not in event, event
        for choice in event["choices"]:
            some = choice.get("token_ids") or ()
            token_s.extend([at_s] * len(some))
            tokens.extend(some)
        timing = event.get("pdserve") or timing
        if event.get("usage"):
            cached_tokens = event["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert len(token_s) == generated_tokens, f"{len(token_s)} tokens of {generated_tokens}"
    return Answer(sent_s, first_byte_s, token_s, tokens, timing, cached_tokens)
