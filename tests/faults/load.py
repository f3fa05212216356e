"""The load that faults strike: clients that send one request after the other, of every kind whose
tokens could go wrong in a way of its own, and come back where a stream breaks.

What an answer must be is known from a run without a fault: the same text, tokens, log-probabilities
and reasons, choice by choice.
"""

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

OUTPUT_TOKENS = 24
BACK_S = 200.0
"""How long a client keeps trying to get the rest of a broken stream."""

END_S = 600.0
"""For the round under way when an endless load is to end."""

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["apple", "pear"]}, "many": {"type": "boolean"}},
    "required": ["kind", "many"],
    "additionalProperties": False,
}

KINDS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 0.9, "top_p": 0.95},
    "penalties": {
        "temperature": 0.7,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.1,
    },
    "n": {"temperature": 0.8, "n": 2},
    "logprobs": {"temperature": 0.5, "logprobs": 3},
    "stop": {"temperature": 0.8, "stop": ["e", " "], "min_tokens": 4, "ignore_eos": False},
    "json_schema": {
        "temperature": 0.8,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": SCHEMA, "strict": True},
        },
        "ignore_eos": False,
    },
}


@dataclass(frozen=True, slots=True)
class Ask:
    kind: str
    path: str
    body: Mapping[str, Any]


@dataclass(slots=True)
class Answer:
    """What a client has put together, whatever broke on the way."""

    choices: dict[int, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None
    resumed_count: int = 0
    pause_s: float = 0.0  # the longest without an event, from asking on

    def of_choice(self, index: int) -> dict[str, Any]:
        blank: dict[str, Any] = {"text": "", "tokens": [], "logprobs": [], "finish": None}
        return self.choices.setdefault(index, blank)


def mixed(count: int, *, seed: int, output_tokens: int = OUTPUT_TOKENS) -> list[Ask]:
    """``count`` requests, all kinds in turn."""
    chance = random.Random(seed)
    kinds = list(KINDS)
    return [_ask(kinds[index % len(kinds)], index, chance, output_tokens) for index in range(count)]


def _ask(kind: str, index: int, chance: random.Random, output_tokens: int) -> Ask:
    prompt = [chance.randrange(20, 40_000) for _ in range(chance.choice((20, 60, 150, 300)))]
    body: dict[str, Any] = {
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "seed": 1000 + index,
        "stream": True,
        "return_token_ids": True,
        **KINDS[kind],
    }
    if kind == "json_schema":
        body["messages"] = [{"role": "user", "content": f"Which fruit is it, no. {prompt[0]}?"}]
        return Ask(kind, CHAT, body)
    return Ask(kind, COMPLETION, body | {"prompt": prompt})


Strike = tuple[int, Callable[[], None]]  # at which event of all, and what


class Progress:
    """What the load has done so far; strikes come in the thread of its event loop."""

    def __init__(self, strikes: Sequence[Strike] = ()) -> None:
        self.events = 0
        self._due = sorted(strikes, key=lambda strike: strike[0], reverse=True)

    @property
    def is_over(self) -> bool:
        return not self._due

    def note(self) -> None:
        self.events += 1
        while self._due and self.events >= self._due[-1][0]:
            self._due.pop()[1]()


def run(
    url: str,
    asks: Sequence[Ask],
    *,
    clients: int,
    strikes: Sequence[Strike] = (),
    keeps_connections: bool = True,
) -> list[Answer]:
    """The answers, in the order of ``asks``; each client takes the next one that is open.

    Args:
        strikes: short, since nobody reads meanwhile.
        keeps_connections: False: every request has a new one.
    """
    limits = httpx.Limits(max_keepalive_connections=None if keeps_connections else 0)
    return asyncio.run(_run(url, asks, clients, limits, Progress(strikes)))


async def _run(
    url: str, asks: Sequence[Ask], clients: int, limits: httpx.Limits, progress: Progress
) -> list[Answer]:
    answers = [Answer() for _ in asks]
    turns = iter(range(len(asks)))

    async def one_by_one() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
            for index in turns:
                answers[index] = await answer_to(client, asks[index], progress)

    await asyncio.gather(*(one_by_one() for _ in range(clients)))
    assert progress.is_over, "every strike came while there was load"
    return answers


async def answer_to(client: httpx.AsyncClient, ask: Ask, progress: Progress) -> Answer:
    """A whole answer, in as many streams as it takes."""
    answer = Answer()
    last_id: str | None = None
    until_s = time.monotonic() + BACK_S
    heard_s = time.monotonic()
    while True:
        headers = {"last-event-id": last_id} if last_id else {"x-pdserve-resumable": "1"}
        try:
            async with client.stream("POST", ask.path, json=dict(ask.body), headers=headers) as got:
                if got.status_code != 200:
                    answer.error = (await got.aread()).decode()
                    return answer
                async for data, event_id in _events(got):
                    answer.pause_s = max(answer.pause_s, time.monotonic() - heard_s)
                    heard_s = time.monotonic()
                    if data == "[DONE]":
                        return answer
                    event = json.loads(data)
                    if "error" in event:
                        answer.error = json.dumps(event["error"])
                        return answer
                    _take(answer, event)
                    last_id = event_id or last_id
                    progress.note()
        except httpx.HTTPError as broken:
            if time.monotonic() > until_s:
                answer.error = f"the stream broke and cannot be resumed: {broken!r}"
                return answer
            answer.resumed_count += 1
            await asyncio.sleep(0.05)


async def _events(got: httpx.Response) -> Any:
    """(data, id) of each event that has come whole: half of one is none, as the standard says."""
    data, event_id = "", ""
    async for line in got.aiter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
        elif line.startswith("id: "):
            event_id = line.removeprefix("id: ")
        elif not line and data:
            yield data, event_id
            data, event_id = "", ""


def _take(answer: Answer, event: Mapping[str, Any]) -> None:
    for choice in event["choices"]:
        known = answer.of_choice(choice["index"])
        said = choice.get("text", choice.get("delta", {}).get("content"))
        known["text"] += said or ""
        known["tokens"] += choice.get("token_ids") or []
        with contextlib.suppress(KeyError, TypeError):
            known["logprobs"] += choice["logprobs"]["token_logprobs"]
        if choice["finish_reason"] is not None:
            assert known["finish"] is None, "it ended twice"
            known["finish"] = choice["finish_reason"]


def differences(
    asks: Sequence[Ask], answers: Sequence[Answer], calm: Sequence[Answer]
) -> list[str]:
    """What is wrong with answers that should be those of the calm run; empty: nothing."""
    found = []
    for index, (ask, answer, expected) in enumerate(zip(asks, answers, calm, strict=True)):
        if answer.error is not None:
            found.append(f"{index} ({ask.kind}) failed: {answer.error}")
        elif answer.choices != expected.choices:
            found.append(f"{index} ({ask.kind}): {answer.choices} is not {expected.choices}")
    return found


def told_of(answers: Sequence[Answer]) -> str:
    """What a row of the table says of them besides."""
    pause_s = max(answer.pause_s for answer in answers)
    resumed_count = sum(answer.resumed_count > 0 for answer in answers)
    resumed = f", {resumed_count} streams resumed" if resumed_count else ""
    return f"pause {pause_s:.1f} s{resumed}"


class Endless:
    """The load again and again, in a thread, until it is told to stop."""

    def __init__(self, url: str, asks: Sequence[Ask], *, clients: int) -> None:
        self.answers: list[Answer] = []
        self._url, self._asks, self._clients = url, asks, clients
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.answers += run(self._url, self._asks, clients=self._clients)

    def __enter__(self) -> "Endless":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(END_S)
        assert not self._thread.is_alive()
