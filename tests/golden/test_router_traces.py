"""What the router answers, event by event, as text to review.

A trace is ``tests/golden/router/*.txt``: blocks of events, then ``----``, then what the core
answered. ``GOLDEN=rewrite`` writes today's answers into the files; the diff is what to look at.

    settings KEY=VALUE …            before anything else; prefill_tokens_per_s is 1000 by default
    at 250ms                        time moves to this instant, and the core is ticked
    worker p0 [host=h0] [chunk_tokens=128] [block_count=1000] [running_max=64]   says hello
    submit r1 tokens=32 [document=NAME] [attempt=0] [deadline_ms=…] [gateway=g0] [prompt_tokens=…]
        [max_tokens=64] [tenant=NAME] [service_class=standard]
    cancel r1
    p0 chunk r1 128 [128]           128 tokens have KV now; the chunk took 128 ms
    p0 preempted|prefill_done|adopted|ended r1 [computed_tokens]
    d0 parked r1 TOKENS             prompt and generated tokens in all
    d0 failed r1
    d0 load [running=…] [waiting=…] [free_blocks=…] [draining=1]
    p0 blocks NAME COUNT            its pool holds the first blocks of that document
    p0 store NAME COUNT             … its host's store holds them
    p0 evicted NAME COUNT           … holds them no more
    p0 lost                         its connection closed
    gateway g0 lost|back
    show                            live requests by phase, the queue by level, counters above zero
"""

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pdserve.clock import MS
from pdserve.errors import ErrorInfo
from pdserve.ids import RequestId, WorkerId
from pdserve.lifecycle import Event
from pdserve.messages import Request, WorkerFailed
from pdserve.router.core import Command, RouterCore
from pdserve.router_config import RouterConfig
from tests.unit.router import build

FOLDER = Path(__file__).parent / "router"
SEPARATOR = "----"


class Player:
    """Plays one trace; keeps what a real worker would remember between events."""

    def __init__(self) -> None:
        self._core = RouterCore(build.settings(), unix_zero_ms=0)
        self._now_ns = 0
        self._requests: dict[str, Request] = {}
        self._workers: dict[str, build.Reporter] = {}

    def play(self, line: str) -> list[str]:
        words = line.split()
        plain = [word for word in words if "=" not in word]
        options = dict(word.split("=") for word in words if "=" in word)
        answers = self._event(plain, options)
        self._core.state.check()
        return answers

    def _event(  # noqa: PLR0911  (one return per kind of event)
        self, words: list[str], options: dict[str, str]
    ) -> list[str]:
        match words:
            case ["settings"]:
                self._core = RouterCore(_settings(options), unix_zero_ms=0)
                return []
            case ["show"]:
                return self._show()
            case ["at", instant]:
                self._now_ns = int(instant.removesuffix("ms")) * MS
                return build.told(self._core.on_tick(self._now_ns))
            case ["worker", name]:
                said = build.hello(name, **_plain(options))
                self._workers[name] = build.Reporter(self._core, said)
                return build.told(self._core.on_hello(said, self._now_ns))
            case ["submit", name]:
                self._requests[name] = build.request(name, **_plain(options))
                return build.told(self._core.on_submit(self._requests[name], self._now_ns))
            case ["cancel", name]:
                return build.told(self._core.on_cancel(RequestId(name), self._now_ns))
            case ["gateway", name, what]:
                on: Callable[..., list[Command]] = (
                    self._core.on_gateway_lost if what == "lost" else self._core.on_gateway_hello
                )
                return build.told(on(build.address(name), self._now_ns))
            case [worker, *rest]:
                return build.told(self._worker_event(worker, rest, options))
        raise AssertionError(f"no such event: {words}")

    def _worker_event(  # noqa: PLR0911  (one return per kind of event)
        self, worker: str, words: list[str], options: dict[str, str]
    ) -> list[Command]:
        reporter, core, now_ns = self._workers[worker], self._core, self._now_ns
        match words:
            case ["lost"]:
                return core.on_worker_lost(WorkerId(worker), now_ns)
            case ["load"]:
                return reporter.report(now_ns=now_ns, **_plain(options))
            case ["blocks", document, count]:
                return reporter.report(blocks_added=build.keys(document, int(count)))
            case ["store", document, count]:
                return reporter.report(store_added=build.keys(document, int(count)))
            case ["evicted", document, count]:
                return reporter.report(store_removed=build.keys(document, int(count)))
            case ["chunk", name, computed, *elapsed]:
                request = self._requests[name]
                return reporter.chunk(
                    request, int(computed), int(elapsed[0]) if elapsed else 128, now_ns=now_ns
                )
            case ["parked", name, tokens]:
                parked = build.handoff(self._requests[name], reporter.hello, tokens=int(tokens))
                return core.on_parked(parked, WorkerId(worker), now_ns)
            case ["failed", name]:
                request = self._requests[name]
                error = ErrorInfo("ticket_gone", "no such ticket")
                failed = WorkerFailed(request.request, request.attempt, error)
                return core.on_failed(failed, WorkerId(worker), now_ns)
            case [event, name, *computed]:
                return reporter.event(
                    self._requests[name],
                    Event(event),
                    computed_tokens=int(computed[0]) if computed else 0,
                    now_ns=now_ns,
                )
        raise AssertionError(f"no such event of a worker: {words}")

    def _show(self) -> list[str]:
        snapshot = self._core.snapshot(self._now_ns)
        phases = [f"{phase} {count}" for phase, count in snapshot.phases.items() if count]
        levels = [f"level {i}: {n}" for i, n in enumerate(snapshot.queue_lengths) if n]
        workers = [
            f"{w.worker} held {w.held} reserved {w.reserved_blocks}"
            for w in snapshot.workers
            if w.held or w.reserved_blocks
        ]
        counters = [f"{name} {count}" for name, count in snapshot.counters.items() if count]
        return [", ".join(part) for part in (phases, levels, workers, counters) if part]


def _settings(options: dict[str, str]) -> RouterConfig:
    values = {"prefill_tokens_per_s": 1000, "worker_silence_ms": build.FAR_MS, **_plain(options)}
    assert set(values) <= {field.name for field in fields(RouterConfig)}
    return RouterConfig(**values)


BOOLS = ("true", "false")


def _plain(options: dict[str, str]) -> dict[str, Any]:
    return {
        name: int(value) if value.isdigit() else value == "true" if value in BOOLS else value
        for name, value in options.items()
    }


def _replayed(text: str) -> str:
    """The trace with today's answers. Comments and blank lines between blocks stay."""
    player, out, answers, skipping = Player(), [], list[str](), False
    for line in text.splitlines():
        if line == SEPARATOR:
            out += [SEPARATOR, *(answers or ["nothing"])]
            answers, skipping = [], True
        elif not line.strip():
            out.append("")
            skipping = False
        elif not skipping:
            out.append(line)
            if not line.startswith("#"):
                answers += player.play(line)
    assert not answers, f"the last block has no {SEPARATOR}: {answers}"
    return "\n".join(out) + "\n"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_the_router_answers_as_reviewed(path: Path) -> None:
    expected = path.read_text()
    answered = _replayed(expected)
    if os.environ.get("GOLDEN") == "rewrite":
        path.write_text(answered)
    assert answered == expected or os.environ.get("GOLDEN") == "rewrite"
