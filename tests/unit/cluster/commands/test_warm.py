"""What ``pdserve kv warm`` reads: lines of a file, and how long to pin them."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from pdserve.cluster.commands import warm
from pdserve.cluster.commands.warm import Pin, pin_of, read_prompts
from pdserve.cluster.gateway.pinning import PAUSES_S
from pdserve.cluster.kv_stores import Store, address_of
from pdserve.errors import ConfigError
from pdserve.ids import BlockKey
from pdserve.kvstore.admin_client import StoreAdmin


@pytest.mark.parametrize(
    ("text", "pin"),
    [
        ("90s", Pin(False, 90_000)),
        ("30m", Pin(False, 1_800_000)),
        ("hard", Pin(True, None)),
        ("hard:8h", Pin(True, 28_800_000)),
    ],
)
def test_pins_are_times_or_hard(text: str, pin: Pin) -> None:
    assert pin_of(text) == pin


@pytest.mark.parametrize("text", ["", "30", "m", "0m", "-1m", "hard:", "harder", "hardly:1m", "1w"])
def test_other_pins_are_refused_with_what_would_do(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a time as 90s, 30m, 8h or 1d"):
        pin_of(text)


def test_a_line_is_a_prompt_messages_or_tokens(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "be brief"}]
    lines: list[dict[str, Any]] = [
        {"prompt": "a", "user": "u"},
        {"messages": messages},
        {"tokens": [1, 2]},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    text, chat, tokens = read_prompts(file)
    assert (text.line, text.path, chat.path) == (1, "/v1/completions", "/v1/chat/completions")
    assert text.to_compute() == {**lines[0], "max_tokens": 1, "temperature": 0.0}
    assert tokens.to_compute()["prompt"] == [1, 2]
    assert tokens.to_tokenize() == {"prompt_token_ids": [1, 2]}


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"prompt": "a", "tokens": [1]}'])
def test_a_line_that_is_none_of_them_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}')
    with pytest.raises(ConfigError, match="line 2 of"):
        list(read_prompts(file))


def test_a_node_is_a_socket_or_a_tcp_address() -> None:
    assert address_of("/tmp/a.sock").unix_path == "/tmp/a.sock"
    assert address_of("far:9000").tcp == "far:9000"
    with pytest.raises(ConfigError, match="host:port"):
        address_of("far")


class _Admin:
    """A store that has ever more of a prompt, by what is told."""

    def __init__(self, *counts: int) -> None:
        self.counts = list(counts)

    def pin(self, keys: Sequence[BlockKey], *, hard: bool, lifetime_ms: int | None) -> int:
        return self.counts.pop(0)


@pytest.mark.parametrize(
    ("counts", "pinned", "looks"),
    [([3, 9], 3, 1), ([0, 2, 3, 9], 3, 3), ([0, 0, 0, 0, 2, 9], 2, 5)],
)
def test_blocks_that_are_on_their_way_are_looked_for_again(
    counts: list[int], pinned: int, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses_s: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses_s.append)
    admin, empty = _Admin(*counts), _Admin(*[0] * len(counts))
    stores = [Store("here", cast(StoreAdmin, each)) for each in (empty, admin)]
    keys = [BlockKey(bytes([n]) * 16) for n in range(3)]
    assert warm._pinned(stores, keys, Pin(False, 1000)) == pinned
    assert len(counts) - len(admin.counts) == looks
    assert pauses_s == list(PAUSES_S[: looks - 1])
