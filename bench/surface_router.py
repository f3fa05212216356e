"""One router among a thousand workers: their load reports, and as many requests as get through.

The router's service runs in a process of its own; another plays all workers, each with a
connection of its own (``surface_fleet``), and this one is the gateway. A request is submitted, goes
to a worker, and ends with its second token; three reports tell of it. Every worker reports twice a
second besides. The prompts are all new to the cluster, so that no two decisions are alike.

A router that is offered more than it can decide queues frames, so what is stated is the rate at
which requests end. Workers and gateway take more than the router does, of the same two cores; so
the processor time of the router's process is stated for a request and for the regular reports, each
measured without the other, and the rate at which these two would fill one core.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from bench.frame import Options, Row, at_least, row
from bench.surface_clients import BareClient, Stream
from bench.surface_fleet import REPORT_S, US_PER_S, Pace
from bench.surface_places import Places, loop_factory, places

WORKERS = 1000
PACE = Pace(5_000, 50_000)
ANSWER_TOKENS = 2
OFFERED_PER_S = 3_000
TURN_S = 0.01
"""Requests that are due within such a turn go out together."""

SILENT_S = 50.0
"""Workers that report only what happens: so that a request's own cost can be told."""

IN_FLIGHT_MAX = 2_000
"""No more are submitted while so many have no first token: then all is full."""


@dataclass(frozen=True, slots=True)
class Load:
    """What became of a stretch of offered requests."""

    seconds: float
    ended: int
    router_cpu_s: float
    others_cpu_s: float  # of the workers' process and of this one
    first_ms: list[float]  # of each request, less its compute

    @property
    def cpu_us_each(self) -> float:
        return self.router_cpu_s / self.ended * US_PER_S


def router_rows(options: Options) -> Iterator[Row]:
    seconds = 1.0 if options.quick else 10.0
    with _crowd(options, REPORT_S) as (running, runner):
        at_rest = runner.run(_at_rest(running, seconds))
        loads = runner.run(_loads(running, seconds, rounds=3))
    with _crowd(options, SILENT_S) as (running, runner):
        alone = runner.run(_loads(running, seconds, rounds=3))
    yield row(f"router CPU for the reports of {WORKERS:,} idle workers", [at_rest * 100], "%")
    yield row(
        f"requests through one router, {WORKERS:,} workers",
        [load.ended / load.seconds for load in loads],
        "/s",
        bar=at_least(OFFERED_PER_S),
    )
    first_ms = [ms for load in loads for ms in load.first_ms]
    yield row("submitted to first token, less compute, p50", first_ms, "ms")
    yield row("submitted to first token, less compute, p99", first_ms, "ms", at=0.99)
    yield row("router CPU per request", [load.cpu_us_each / 1000 for load in alone], "ms")
    yield row(
        "CPU per request of workers and gateway",
        [load.others_cpu_s / load.ended * 1000 for load in alone],
        "ms",
    )
    yield row(
        "requests, and those reports, that fill a core",
        [(1 - at_rest) * US_PER_S / load.cpu_us_each for load in alone],
        "/s",
        bar=at_least(OFFERED_PER_S),
    )


@contextlib.contextmanager
def _crowd(options: Options, report_s: float) -> Iterator[tuple[Places, asyncio.Runner]]:
    with (
        places(
            prefills=WORKERS // 2,
            decodes=WORKERS // 2,
            report_s=report_s,
            profiles=options.arguments.profiles,
        ) as running,
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        yield running, runner


async def _at_rest(running: Places, seconds: float) -> float:
    """The part of a core that reports alone take."""
    begun_s, before_s = time.monotonic(), running.router.cpu_s()
    await asyncio.sleep(seconds)
    return (running.router.cpu_s() - before_s) / (time.monotonic() - begun_s)


async def _loads(running: Places, seconds: float, *, rounds: int) -> list[Load]:
    async with BareClient(running.address, running.directory) as client:
        await _load(running, client, 1.0)
        return [await _load(running, client, seconds) for _ in range(rounds)]


async def _load(running: Places, client: BareClient, seconds: float) -> Load:
    """An open load, as long as there is room in flight."""
    streams: list[Stream] = []
    waiting: set[int] = set()
    begun_s, before_s = time.monotonic(), running.router.cpu_s()
    others_s = running.fleet.cpu_s() + time.process_time()
    while (elapsed_s := time.monotonic() - begun_s) < seconds:
        due = round(elapsed_s * OFFERED_PER_S) - len(streams)
        waiting = {index for index in waiting if not streams[index].first.is_set()}
        for _ in range(min(due, IN_FLIGHT_MAX - len(waiting))):
            waiting.add(len(streams))
            streams.append(await client.ask(PACE, ANSWER_TOKENS))
        await asyncio.sleep(TURN_S)
    for stream in streams:
        await stream.until_ended()
    taken_s = time.monotonic() - begun_s
    cpu_s = running.router.cpu_s() - before_s
    others_s = running.fleet.cpu_s() + time.process_time() - others_s
    first_ms = [(s.token_s[0] - s.sent_s) * 1000 - PACE.prefill_us / 1000 for s in streams]
    client.forget()
    return Load(taken_s, len(streams), cpu_s, others_s, first_ms)
