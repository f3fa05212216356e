"""``make demo``: why prefill and decode are apart, why prefills are preempted, why KV is kept.

Four acts on a real cluster with the real model; every figure is measured while it is shown.

1. Six chats arrive while a long prompt is being prefilled: once with preemption off, once on.
2. ``kill -9`` of the decode worker in mid-sentence: the sentence goes on.
3. A long document is asked about twice; in between, others push it out of the workers' memory.
4. Everything is started again, and the document asked about once more.
"""

import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pdserve.cluster.http_client import get_json, post_events
from pdserve.cluster.local import interrupt_once, local_cluster
from pdserve.config import ClusterConfig, GatewayConfig, GiB, PoolConfig, StoreConfig

LONG_PROMPT_TOKENS = 3000
CHAT_COUNT = 6
CHAT_TOKENS = 24
DOCUMENT_TOKENS = 2000
POOL_BLOCKS = 300  # 4,800 tokens: two documents and a bit
STORY_TOKENS = 90
KILL_AFTER_TOKENS = 25

BARS = "▁▂▃▄▅▆▇█"
BAR_S_MIN = 0.01
BAR_S_MAX = 10.0

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the closing table."""

    what: str
    without: str
    with_: str


def main() -> None:
    interrupt_once()
    with tempfile.TemporaryDirectory(prefix="pdserve-demo-") as disk:
        _show(disk)


def _show(disk: str) -> None:
    begun = time.monotonic()
    config = ClusterConfig(
        prefill=PoolConfig(pool_blocks=POOL_BLOCKS, chunk_tokens=256, nice=5),
        decode=PoolConfig(pool_blocks=POOL_BLOCKS),
        gateway=GatewayConfig(http_port=0, grpc_port=-1),
        store=StoreConfig(ssd_directory=disk, ssd_bytes=GiB),
        tcp=False,
    )
    console.print("[bold]pdserve demo[/]: about two minutes, all figures measured as you watch\n")
    console.print(
        f"[bold]1[/] {CHAT_COUNT} chats arrive behind a prompt of {LONG_PROMPT_TOKENS} tokens: the "
        f"wait for each token\n  [dim]{BARS[0]} {BAR_S_MIN * 1000:.0f} ms … {BARS[-1]} "
        f"{BAR_S_MAX:.0f} s, logarithmic; the first bar of a chat is its first token[/]"
    )
    unpreempted = replace(config, router=replace(config.router, preemption=False))
    with local_cluster(unpreempted) as cluster:
        _warm(cluster.http)
        without = _chats_behind_a_long_prompt(cluster.http)
        _show_gaps("preemption off", without)
    with local_cluster(config) as cluster:
        _warm(cluster.http)
        with_ = _chats_behind_a_long_prompt(cluster.http)
        _show_gaps("preemption on", with_)
        document = _tokens(DOCUMENT_TOKENS, seed=time.time_ns())
        lines = [
            Line(
                "slowest first token of a chat",
                _ms(max(_firsts(without))),
                _ms(max(_firsts(with_))),
            ),
            Line("longest gap inside a chat", _ms(max(_gaps(without))), _ms(max(_gaps(with_)))),
            _killed_in_mid_sentence(cluster.http),
            _asked_twice(cluster.http, document),
        ]
    console.print("\n[bold]4[/] everything ends and is started again")
    with local_cluster(config) as cluster:
        _warm(cluster.http)
        lines.append(_asked_after_a_restart(cluster.http, document))
    table = Table(title="\nmeasured just now", title_justify="left", box=box.SIMPLE_HEAD)
    for column, width in (("", 38), ("without", 9), ("with", 26)):
        table.add_column(column, width=width)
    for line in lines:
        table.add_row(line.what, line.without, line.with_)
    console.print(table)
    console.print(f"[dim]{time.monotonic() - begun:.0f} s in all[/]")


# ── act 1 ────────────────────────────────────────────────────────────────────────────────────────


def _chats_behind_a_long_prompt(url: str) -> list[list[float]]:
    """For each chat its token gaps in seconds; the first is the time to its first token."""
    gaps: list[list[float]] = [[] for _ in range(CHAT_COUNT)]
    long_prompt = threading.Thread(
        target=lambda: list(_stream(url, _tokens(LONG_PROMPT_TOKENS, seed=time.time_ns()), 4))
    )
    long_prompt.start()
    _wait_until_prefilling(url)
    threads = [
        threading.Thread(target=_record_gaps, args=(url, index, gaps[index]))
        for index in range(CHAT_COUNT)
    ]
    for thread in (*threads,):
        thread.start()
    for thread in (*threads, long_prompt):
        thread.join()
    return gaps


def _record_gaps(url: str, index: int, gaps: list[float]) -> None:
    last = time.monotonic()
    for _ in _stream(url, _tokens(40, seed=time.time_ns() + index), CHAT_TOKENS):
        now = time.monotonic()
        gaps.append(now - last)
        last = now


def _wait_until_prefilling(url: str) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        workers = get_json(url, "/cluster/status")["workers"]
        if any(worker["role"] == "prefill" and worker["running"] for worker in workers):
            return
        time.sleep(0.01)


def _show_gaps(title: str, gaps: Sequence[Sequence[float]]) -> None:
    firsts = _firsts(gaps)
    cells = "  ".join("".join(map(_bar, row)) for row in gaps)
    console.print(f"  {title:>14}  {cells}")
    console.print(
        f"           chats  [dim]first token after {_ms(min(firsts))} to {_ms(max(firsts))}, gaps "
        f"up to {_ms(max(_gaps(gaps)))}[/]"
    )


def _bar(gap_s: float) -> str:
    """Logarithmic, the same scale in every row: an eighth more for each factor of 2.4."""
    ratio = math.log(max(gap_s, BAR_S_MIN) / BAR_S_MIN) / math.log(BAR_S_MAX / BAR_S_MIN)
    return BARS[min(int(ratio * len(BARS)), len(BARS) - 1)]


def _firsts(gaps: Sequence[Sequence[float]]) -> list[float]:
    return [row[0] for row in gaps]


def _gaps(gaps: Sequence[Sequence[float]]) -> list[float]:
    return [gap for row in gaps for gap in row[1:]]


# ── act 2 ────────────────────────────────────────────────────────────────────────────────────────


def _killed_in_mid_sentence(url: str) -> Line:
    console.print("\n[bold]2[/] kill -9 of the decode worker in mid-sentence\n")
    body = {
        "messages": [{"role": "user", "content": "Tell me a short story about a lighthouse."}],
        "temperature": 0.0,
        "max_tokens": STORY_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    expected = "".join(_texts(post_events(url, "/v1/chat/completions", body)))
    parts: list[str] = []
    pause_s, last = 0.0, time.monotonic()
    for text in _texts(post_events(url, "/v1/chat/completions", body)):
        now = time.monotonic()
        pause_s, last = max(pause_s, now - last) if parts else 0.0, now
        parts.append(text)
        sys.stdout.write(text)
        if len(parts) == KILL_AFTER_TOKENS:
            pid = next(
                worker["pid"]
                for worker in get_json(url, "/cluster/status")["workers"]
                if worker["role"] == "decode"
            )
            os.kill(pid, signal.SIGKILL)
            sys.stdout.write("\033[31m [kill -9] \033[0m")
        sys.stdout.flush()
    same = "".join(parts) == expected
    console.print(f"\n[dim]  longest pause {pause_s:.1f} s; same text as undisturbed: {same}[/]")
    return Line(
        "decode worker killed, the stream",
        "ends",
        f"resumes in {pause_s:.1f} s, {'same' if same else 'OTHER'} text",
    )


def _texts(events: Iterator[dict[str, Any]]) -> Iterator[str]:
    for event in events:
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                yield text


# ── act 3 ────────────────────────────────────────────────────────────────────────────────────────


def _asked_twice(url: str, document: list[int]) -> Line:
    console.print(f"\n[bold]3[/] a document of {DOCUMENT_TOKENS} tokens, asked about twice")
    first_s = _first_token_s(url, document)
    for index in range(3):  # more than the workers' own memory holds
        _first_token_s(url, _tokens(DOCUMENT_TOKENS, seed=time.time_ns() + index))
    again_s = _first_token_s(url, document)
    console.print(
        f"  first token after {_ms(first_s)}; again, from host memory, after {_ms(again_s)}"
    )
    return Line("long document asked again, first token", _ms(first_s), _ms(again_s))


# ── act 4 ────────────────────────────────────────────────────────────────────────────────────────


def _asked_after_a_restart(url: str, document: list[int]) -> Line:
    again_s = _first_token_s(url, document)
    unknown_s = _first_token_s(url, _tokens(DOCUMENT_TOKENS, seed=time.time_ns()))
    console.print(
        f"  the same document, from the disk, after {_ms(again_s)}; another after {_ms(unknown_s)}"
    )
    return Line("the same after a restart, first token", _ms(unknown_s), _ms(again_s))


def _first_token_s(url: str, tokens: list[int]) -> float:
    begun = time.monotonic()
    stream = _stream(url, tokens, 2)
    next(stream)
    first_s = time.monotonic() - begun
    list(stream)
    return first_s


# ── tools ────────────────────────────────────────────────────────────────────────────────────────


def _stream(url: str, tokens: list[int], count: int) -> Iterator[None]:
    """Yields once per event that carries tokens."""
    body = {
        "prompt": tokens,
        "max_tokens": count,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    for event in post_events(url, "/v1/completions", body):
        if any(choice.get("token_ids") for choice in event["choices"]):
            yield


def _tokens(count: int, *, seed: int) -> list[int]:
    """Ordinary token ids, unlike those of any other seed from the first block on."""
    return [
        1000 + (seed * 7919 + index * 104_729 + (index * seed) % 8191) % 40_000
        for index in range(count)
    ]


def _warm(url: str) -> None:
    list(_stream(url, _tokens(64, seed=1), 8))


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    main()
