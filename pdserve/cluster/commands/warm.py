"""``pdserve kv warm FILE``: prompts are computed ahead, by asking for one token of each.

Requests that begin as they do find their KV in the stores then. With a pin it stays there, softly
for a time or hard (``kvstore.pins``): as far as blocks are full, and on the hosts that have them.
"""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pdserve.cluster.commands.kv import keys_of
from pdserve.cluster.gateway.pinning import PAUSES_S, lifetime_ms_of
from pdserve.cluster.http_client import post_json
from pdserve.cluster.kv_stores import Store, stores_of
from pdserve.errors import ConfigError, PdserveError
from pdserve.ids import BlockKey
from pdserve.kvstore.security import Credentials

HARD = "hard"

WAYS = ("prompt", "messages", "tokens")

console = Console(highlight=False, soft_wrap=True, stderr=True)


@dataclass(frozen=True, slots=True)
class Pin:
    hard: bool
    lifetime_ms: int | None


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line: ``/v1/completions`` or ``/v1/chat/completions``, and what is sent."""

    line: int
    body: dict[str, Any]

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if "messages" in self.body else "/v1/completions"

    def to_compute(self) -> dict[str, Any]:
        body = {"max_tokens": 1, "temperature": 0.0, **self.body}
        if "tokens" in body:
            body["prompt"] = body.pop("tokens")
        return body

    def to_tokenize(self) -> dict[str, Any]:
        body = dict(self.body)
        if "tokens" in body:
            body["prompt_token_ids"] = body.pop("tokens")
        return body


@dataclass(slots=True)
class Tally:
    prompts: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    blocks: int = 0  # full ones of all prompts
    pinned: int = 0  # of them, in some store
    failed: int = 0


def warm(
    url: str,
    file: Path,
    *,
    pin: str | None,
    concurrency: int,
    credentials: Credentials | None = None,
) -> int:
    """The exit status: 1 where a prompt could not be computed or pinned.

    Args:
        credentials: for stores on other hosts.

    Raises:
        ConfigError: a line or an option does not fit; nothing has been computed then.
    """
    wanted = None if pin is None else pin_of(pin)
    prompts = list(read_prompts(file))
    if concurrency < 1:
        raise ConfigError(f"--concurrency is {concurrency}, must be at least 1")
    tally = Tally()
    with (
        _progress() as progress,
        stores_of(url, (), credentials) as stores,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        task = progress.add_task("computing", total=len(prompts))
        asked = {pool.submit(post_json, url, p.path, p.to_compute()): p for p in prompts}
        for answer in as_completed(asked):
            prompt = asked[answer]
            try:
                _count(tally, answer.result()["usage"])
                if wanted is not None:
                    keys = keys_of(url, prompt.to_tokenize())
                    tally.blocks += len(keys)
                    tally.pinned += _pinned(stores, keys, wanted)
            except PdserveError as error:
                tally.failed += 1
                progress.console.print(f"{file}:{prompt.line}: {error}", markup=False)
            progress.advance(task)
    said = (
        f"{tally.prompts:,} prompts: {tally.computed_tokens:,} tokens computed, "
        f"{tally.cached_tokens:,} were there"
    )
    if wanted is not None:
        said += f"; {tally.pinned:,} of {tally.blocks:,} full blocks pinned"
    print(said + (f"; {tally.failed:,} prompts failed" if tally.failed else ""))
    return 1 if tally.failed else 0


def _pinned(stores: Sequence[Store], keys: Sequence[BlockKey], pin: Pin) -> int:
    """How many of the blocks are pinned, at the store that has most; they may be on their way
    (``gateway.pinning``)."""

    def look() -> int:
        return max(
            store.admin.pin(keys, hard=pin.hard, lifetime_ms=pin.lifetime_ms) for store in stores
        )

    count = look()
    for pause_s in PAUSES_S:
        if count == len(keys):
            break
        time.sleep(pause_s)
        count = look()
    return count


def pin_of(text: str) -> Pin:
    """Of ``--pin``: 30m is soft, hard lasts as long as the node, hard:8h is hard for a time."""
    hard, _, lifetime = text.partition(":") if text.startswith(HARD) else ("", "", text)
    if hard not in ("", HARD):
        raise _bad_pin(text)
    if hard and not lifetime:
        if text != HARD:
            raise _bad_pin(text)
        return Pin(True, None)
    lifetime_ms = lifetime_ms_of(lifetime)
    if lifetime_ms is None:
        raise _bad_pin(text)
    return Pin(bool(hard), lifetime_ms)


def read_prompts(file: Path) -> Iterator[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            body = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"line {number} of {file} is no JSON: {error}") from error
        if not isinstance(body, dict) or sum(way in body for way in WAYS) != 1:
            raise ConfigError(
                f"line {number} of {file} must be an object with one of {', '.join(WAYS)}; beside "
                "it may stand what a request takes, as model and user"
            )
        yield Prompt(number, body)


def _count(tally: Tally, usage: dict[str, Any]) -> None:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    tally.prompts += 1
    tally.cached_tokens += cached
    tally.computed_tokens += usage["prompt_tokens"] - cached


def _bad_pin(text: str) -> ConfigError:
    return ConfigError(
        f"--pin is {text!r}; it must be a time as 90s, 30m, 8h or 1d (softly), hard, or hard:8h"
    )


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
