"""The load of a soak: as many requests per second as it is told, of every way to ask and to leave.

Of twenty requests 16 are completions, whose prompts are new except for the stem that each draw of
them shares, and are asked for twice; two are left by their client after the first tokens; two are
responses that are kept, read again and deleted. Nothing repeats for long, so that caches fill, turn
over and evict, and what a request leaves behind adds up.
"""

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from urllib.parse import urlsplit

from pdserve.cluster.chaos.load import QUESTIONS, Question, drawn
from pdserve.cluster.http_client import get_json, post_events, post_json
from pdserve.errors import PdserveError

CLIENTS = 8
LEAVES_EVERY, KEEPS_EVERY = 10, 10
TOKENS_BEFORE_LEAVING = 4
STEP_TOKENS = 512  # the most that a prefill step has
FEW_ROWS, ROWS_STEP = 16, 16
ROUNDS = 2
"""How often each prompt is asked for."""

Done = Callable[[str, bool], None]


class Pace:
    """Hands out instants ``1 / rate`` apart. Who comes late starts at once, so a slow cluster is
    asked by all clients without a pause, and not by more of them."""

    def __init__(self, rate_per_s: float, until_s: float) -> None:
        self._gap_s = 1 / rate_per_s
        self._until_s = until_s
        self._next_s = time.monotonic()
        self._turn = threading.Lock()
        self._count = 0

    def wait(self) -> int | None:
        """The number of the request that is due now. None: it is over."""
        with self._turn:
            due_s, number = self._next_s, self._count
            if max(due_s, time.monotonic()) >= self._until_s:
                return None
            self._next_s, self._count = due_s + self._gap_s, number + 1
        time.sleep(max(0.0, due_s - time.monotonic()))
        return number


class Prompts:
    """Questions by their number, drawn when they are needed; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._lock = threading.Lock()
        self._draws: dict[int, tuple[Question, ...]] = {}

    def __getitem__(self, number: int) -> Question:
        draw = number // (QUESTIONS * ROUNDS)
        with self._lock:
            if draw not in self._draws:
                self._draws = {draw: drawn(self._seed + draw), **self._draws}
                self._draws.pop(draw - 2, None)
            questions = self._draws.get(draw) or drawn(self._seed + draw)
        return questions[number % QUESTIONS]


def serve_for(url: str, minutes: float, *, rate_per_s: float, seed: int) -> Counter[str]:
    """Requests by how they were asked, and the failed ones as ``failed: …`` once more."""
    pace = Pace(rate_per_s, time.monotonic() + 60 * minutes)
    prompts, counts, turn = Prompts(seed), Counter[str](), threading.Lock()

    def client() -> None:
        while (number := pace.wait()) is not None:
            kind, ask = kind_of(number)
            try:
                ask(url, prompts[number])
            except (PdserveError, OSError, http.client.HTTPException) as error:
                with turn:
                    counts[f"failed: {type(error).__name__}: {error}"[:200]] += 1
            with turn:
                counts[kind] += 1

    threads = [threading.Thread(target=client, daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def meet_every_length(url: str, *, seed: int) -> None:
    """A worker that computes in float32 keeps machine code for every number of rows that it has met
    (``model.torch_ops``). The rare ones would be met in the course of hours: here all are."""
    dice = random.Random(seed)
    for tokens in (*range(1, FEW_ROWS), *range(FEW_ROWS, STEP_TOKENS + 1, ROWS_STEP)):
        prompt = [dice.randrange(1000, 40_000) for _ in range(tokens)]
        post_json(url, "/v1/completions", {"prompt": prompt, "max_tokens": 1})


def kind_of(number: int) -> tuple[str, Callable[[str, Question], None]]:
    if number % LEAVES_EVERY == LEAVES_EVERY - 1:
        return "left", leave
    if number % KEEPS_EVERY == KEEPS_EVERY // 2:
        return "kept", keep
    return "completions", complete


def complete(url: str, question: Question) -> None:
    tokens = sum(
        len(choice.get("token_ids") or ())
        for event in post_events(url, "/v1/completions", question.body())
        for choice in event["choices"]
    )
    if tokens != question.max_tokens:
        raise PdserveError(f"{tokens} tokens came, {question.max_tokens} were asked for")


def leave(url: str, question: Question) -> None:
    """The connection is closed while tokens are on their way."""
    with closing(post_events(url, "/v1/completions", question.body())) as events:
        for count, _ in enumerate(events, start=1):
            if count == TOKENS_BEFORE_LEAVING:
                return


def keep(url: str, question: Question) -> None:
    dice = random.Random(question.prompt[0] + len(question.prompt))
    text = " ".join(str(dice.randrange(1000)) for _ in range(20))
    made = post_json(
        url, "/v1/responses", {"input": text, "max_output_tokens": 16, "temperature": 0}
    )
    path = f"/v1/responses/{made['id']}"
    if get_json(url, path, timeout_s=30)["output"] != made["output"]:
        raise PdserveError(f"{path} is not what was answered")
    delete(url, path)


def delete(url: str, path: str) -> None:
    where = urlsplit(url)
    assert where.hostname is not None
    with closing(http.client.HTTPConnection(where.hostname, where.port, timeout=30)) as connection:
        connection.request("DELETE", path)
        status = connection.getresponse().status
    if status != http.client.OK:
        raise PdserveError(f"DELETE {path}: {status}")
