"""``pdserve chat``, and the first chat that ``pdserve serve`` shows."""

import sys
import time
from dataclasses import dataclass
from typing import Any

from pdserve.cluster.http_client import post_events

TURNS_MAX = 200


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    first_token_ms: float  # as this process measured it
    tokens_per_s: float  # after the first token
    timing: dict[str, Any]  # the cluster's own account


def ask(
    url: str,
    messages: list[dict[str, str]],
    *,
    temperature: float,
    max_tokens: int,
    model: str | None = None,
) -> Answer:
    """Streams one answer to the terminal; ``model`` None is the cluster's first."""
    begun = time.monotonic()
    first: float | None = None
    parts: list[str] = []
    timing: dict[str, Any] = {}
    completion_tokens = 0
    body = {
        "model": model,
        "messages": messages,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "include_timing": True,
    }
    for event in post_events(url, "/v1/chat/completions", body):
        for choice in event["choices"]:
            text = choice["delta"].get("content") or ""
            thought = choice["delta"].get("reasoning") or ""  # shown, and no part of the answer
            if (thought or text) and first is None:
                first = time.monotonic()
            parts.append(text)
            sys.stdout.write(thought + text)
            sys.stdout.flush()
        if event.get("usage"):
            completion_tokens = event["usage"]["completion_tokens"]
        timing = event.get("pdserve") or timing
    ended = time.monotonic()
    sys.stdout.write("\n")
    first = first if first is not None else ended
    decode_s = ended - first
    return Answer(
        text="".join(parts),
        first_token_ms=(first - begun) * 1000,
        tokens_per_s=(completion_tokens - 1) / decode_s if decode_s > 0 else 0.0,
        timing=timing,
    )


def dialogue(
    url: str,
    message: str | None,
    *,
    temperature: float,
    max_tokens: int,
    model: str | None = None,
) -> None:
    """One message, or a conversation until end of input."""
    messages: list[dict[str, str]] = []
    for _ in range(TURNS_MAX):
        text = message if message is not None else _prompt()
        if text is None:
            return
        messages.append({"role": "user", "content": text})
        answer = ask(url, messages, temperature=temperature, max_tokens=max_tokens, model=model)
        messages.append({"role": "assistant", "content": answer.text})
        if message is not None:
            return


def _prompt() -> str | None:
    try:
        return input("\n> ")
    except (EOFError, KeyboardInterrupt):
        return None
