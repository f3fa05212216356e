"""Asks a cluster the same questions as often as one likes, and keeps the answers.

Prompts are token ids, drawn from the seed; half of the answers are greedy, half are drawn with a
seed of their own: both have exactly one right answer, whatever happens while it is computed.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdserve.cluster.http_client import post_events
from pdserve.errors import PdserveError

QUESTIONS = 24
LENGTHS = (40, 120, 300, 600)
ANSWERS = (16, 48, 96)
TOKENS = range(20, 2000)
"""Ids that every vocabulary has."""


@dataclass(frozen=True, slots=True)
class Question:
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int

    def body(self) -> dict[str, Any]:
        return {
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }


@dataclass(slots=True)
class Answer:
    question: int
    tokens: list[int] = field(default_factory=list)
    error: str = ""
    elapsed_s: float = 0.0


Ask = Callable[[Question], Answer]


def drawn(seed: int, count: int = QUESTIONS) -> tuple[Question, ...]:
    """Some share the beginnings of their prompts, as conversations do."""
    dice = random.Random(seed)
    stem = [dice.choice(TOKENS) for _ in range(max(LENGTHS))]
    questions = []
    for number in range(count):
        length = dice.choice(LENGTHS)
        shared = length // 2 if number % 3 == 0 else 0
        rest = [dice.choice(TOKENS) for _ in range(length - shared)]
        questions.append(
            Question(
                prompt=(*stem[:shared], *rest),
                max_tokens=dice.choice(ANSWERS),
                temperature=0.8 if number % 2 else 0.0,
                seed=number,
            )
        )
    return tuple(questions)


def ask_http(url: str) -> Ask:
    def ask(question: Question) -> Answer:
        answer, began_s = Answer(-1), time.monotonic()
        try:
            for event in post_events(url, "/v1/completions", question.body()):
                for choice in event["choices"]:
                    answer.tokens += choice.get("token_ids") or ()
        except (PdserveError, OSError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.elapsed_s = time.monotonic() - began_s
        return answer

    return ask


def ask_all(ask: Ask, questions: Sequence[Question], *, clients: int) -> list[Answer]:
    """Each once, by so many clients; in the order of the questions."""
    return _ask(ask, questions, clients=clients, goes_on=lambda count: count < len(questions))


def ask_for(
    ask: Ask, questions: Sequence[Question], *, clients: int, until_s: float
) -> list[Answer]:
    """Again and again, until an instant of the monotonic clock; what has begun is finished."""
    return _ask(ask, questions, clients=clients, goes_on=lambda _: time.monotonic() < until_s)


def _ask(
    ask: Ask, questions: Sequence[Question], *, clients: int, goes_on: Callable[[int], bool]
) -> list[Answer]:
    answers: list[tuple[int, Answer]] = []
    turn, count = threading.Lock(), 0

    def client() -> None:
        nonlocal count
        while True:
            with turn:
                if not goes_on(count):
                    return
                number, count = count, count + 1
            answer = ask(questions[number % len(questions)])
            answer.question = number % len(questions)
            answers.append((number, answer))

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answer for _, answer in sorted(answers, key=lambda each: each[0])]
