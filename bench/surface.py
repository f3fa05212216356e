"""What the surface costs: a gateway between clients and workers whose compute is a timed wait.

    python -m bench.surface [--quick] [--json FILE] [--only NAME,…] [--profiles DIRECTORY]

Gateway, router and messages are the real ones, in a process each, over real sockets; Ray is left
out, which has no part in a request (``surface_places``). The workers' tokens come when a clock says
so (``surface_fleet``). Clients are this process (``surface_clients``), so a gateway has one of two
cores and all the others share the second.

*Added* is what a request takes through a gateway less what the same one takes when it is submitted
to the router directly, with tokens and keys that were made beforehand; both in turns.
*CPU per token* is the processor time of all the gateway's threads over the tokens that came; it
says what a gateway costs also on a machine where others work, and its inverse is the rate at which
one core is full.
"""

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.frame import Options, Row, at_least, at_most, row, run
from bench.intervals import mean, ratio_interval
from bench.surface_clients import BareClient, GrpcClient, HttpClient, Stream
from bench.surface_fleet import US_PER_S, Pace
from bench.surface_package import rows as package_rows
from bench.surface_places import Place, Places, loop_factory, places
from bench.surface_router import router_rows
from bench.surface_stages import own_us, read, settled, stages_of

Client = HttpClient | GrpcClient | BareClient

STREAMS = 64
ENDLESS = 100_000
"""Tokens: such a stream lasts longer than anybody here looks at it."""

PREFILL_US = 5_000
BUSY = Pace(PREFILL_US, 20_000)
"""64 streams: 3,200 tokens a second, what a good GPU might do."""

FULL = Pace(PREFILL_US, 4_000)
"""16,000 tokens a second: more than is asked of a gateway. It sends what it can."""

SLOW = Pace(PREFILL_US, 100_000)
"""A step's tokens have all arrived long before the next step's."""

IDLE = Pace(1_000, 0)
IDLE_STREAMS = 2_000
GATEWAYS = 2
SETTLE_S = 0.5
MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Window:
    """What happened within a stretch of time, in which nothing begins or ends."""

    seconds: float
    tokens: int
    cpu_s: tuple[float, ...]  # of each gateway

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def cpu_us_per_token(self) -> float:
        return sum(self.cpu_s) / self.tokens * US_PER_S


async def open_streams(
    clients: Sequence[Client], count: int, pace: Pace, max_tokens: int = ENDLESS
) -> list[Stream]:
    """So many at every client; all have had their first token."""
    asked = [await client.ask(pace, max_tokens) for _ in range(count) for client in clients]
    for stream in asked:
        await stream.until_first()
    return asked


async def window(gateways: Sequence[Place], streams: Sequence[Stream], seconds: float) -> Window:
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    before = [place.cpu_s() for place in gateways]
    had = sum(len(stream.token_s) for stream in streams)
    await asyncio.sleep(seconds)
    took = tuple(place.cpu_s() - s for place, s in zip(gateways, before, strict=True))
    tokens = sum(len(stream.token_s) for stream in streams) - had
    broken = [stream.error for stream in streams if stream.error]
    if broken or not tokens:
        raise RuntimeError(f"{tokens} tokens came in {seconds:g} s; {broken[:1]}")
    return Window(loop.time() - begun_s, tokens, took)


class Surface:
    """The measurements, on one event loop, beside processes that are up."""

    def __init__(self, running: Places, options: Options) -> None:
        self._places = running
        self._options = options
        self._seconds = 0.7 if options.quick else 8.0

    @asynccontextmanager
    async def clients(self, kind: str, count: int = 1) -> AsyncIterator[list[Client]]:
        async with AsyncExitStack() as stack:
            if kind == "bare":
                bare = BareClient(self._places.address, self._places.directory)
                yield [await stack.enter_async_context(bare)]
                return
            made: list[HttpClient | GrpcClient] = [
                HttpClient(place.said["http"]) if kind == "HTTP" else GrpcClient(place.said["grpc"])
                for place in self._places.gateways(count)
            ]
            for client in made:
                await stack.enter_async_context(client)
            yield [*made]

    # ── the first token ──────────────────────────────────────────────────────────────────────────

    async def first_token_rows(self, kind: str) -> list[Row]:
        rounds = self._options.rounds(300)
        rows = []
        for name, busy in (("idle", 0), (f"beside {STREAMS} streams", STREAMS)):
            samples: dict[str, list[float]] = {"bare": [], kind: []}
            async with self.clients(kind) as background:
                await open_streams(background, busy, BUSY)
                async with self.clients("bare") as bare, self.clients(kind) as through:
                    for index in range(10 + rounds):
                        for which, (client,) in (("bare", bare), (kind, through)):
                            stream = await client.ask(Pace(PREFILL_US, 0), 1)
                            taken_s = await stream.until_first()
                            if index >= 10:
                                samples[which].append(taken_s * 1000)
            rows.append(added(f"{kind} first token, {name}, added p50", samples, kind, 3.0))
        return rows

    # ── tokens ───────────────────────────────────────────────────────────────────────────────────

    async def token_rows(self, kind: str) -> list[Row]:
        """At 64 streams that are no load worth the name, and at as many tokens as get through."""
        busy = await self.windows(kind, 1, BUSY)
        full = await self.windows(kind, 1, FULL)
        cost_us = [each.cpu_us_per_token for each in busy]
        rows = [
            row(
                f"{kind} CPU per token, {STREAMS} streams, 3,200 tokens/s",
                [us / 1000 for us in cost_us],
                "ms",
                bar=at_most(0.1) if kind == "HTTP" else None,
            ),
            row(
                f"{kind} tokens from one gateway",
                [each.tokens_per_s for each in full],
                "/s",
                bar=at_least(8000) if kind == "HTTP" else None,
            ),
            row(
                f"{kind} CPU per token, as many as get through",
                [each.cpu_us_per_token / 1000 for each in full],
                "ms",
            ),
            row(
                f"{kind} tokens per second of a gateway's CPU",
                [US_PER_S / each.cpu_us_per_token for each in full],
                "/s",
                bar=at_least(8000) if kind == "HTTP" else None,
            ),
        ]
        return rows

    async def delay_rows(self, kind: str) -> list[Row]:
        """From a step's end to the arrival of the last of its 64 tokens."""
        samples: dict[str, list[float]] = {"bare": [], kind: []}
        for _ in range(3):
            for which in ("bare", kind):
                async with self.clients(which) as clients:
                    streams = await open_streams(clients, STREAMS, SLOW)
                    await asyncio.sleep(SETTLE_S + self._seconds)
                    samples[which] += last_of_each_step_ms(streams, SLOW.step_us)
        per_token = {name: [ms / STREAMS for ms in found] for name, found in samples.items()}
        return [
            added(f"{kind} delay of a step's {STREAMS} tokens, each, p50", per_token, kind, 0.1)
        ]

    async def windows(self, kind: str, count: int, pace: Pace, *, windows: int = 3) -> list[Window]:
        """With 64 streams at each of ``count`` gateways."""
        gateways = self._places.gateways(count)
        found = []
        async with self.clients(kind, count) as clients:
            opened = await open_streams(clients, STREAMS, pace)
            await asyncio.sleep(SETTLE_S)
            for _ in range(windows):
                found.append(await window(gateways, opened, self._seconds))
        return found

    async def several_rows(self) -> list[Row]:
        """Two gateways need more cores than there are here beside everybody else, so what is
        compared is what a token costs them, at a load that leaves room."""
        one, several = [], []
        for _ in range(3):
            one += await self.windows("HTTP", 1, BUSY, windows=1)
            several += await self.windows("HTTP", GATEWAYS, BUSY, windows=1)
        by_cpu = [US_PER_S / w.cpu_us_per_token * GATEWAYS for w in several]
        alone = [US_PER_S / w.cpu_us_per_token * GATEWAYS for w in one]
        made = row(
            f"tokens from {GATEWAYS} gateways, a core each, by CPU",
            by_cpu,
            "/s",
            reference=f"{GATEWAYS} × one alone",
            reference_samples=alone,
            bar=at_least(0.9, of="ratio"),
        )
        interval = ratio_interval(
            [np.array([rate]) for rate in by_cpu], [np.array([rate]) for rate in alone], mean
        )
        both = row(
            f"tokens from {GATEWAYS} gateways that are offered 6,400",
            [w.tokens_per_s for w in several],
            "/s",
            reference=f"{GATEWAYS} × one alone",
            reference_samples=[w.tokens_per_s * GATEWAYS for w in one],
            bar=at_least(0.9, of="ratio"),
        )
        return [replace(made, ratio_interval=interval), both]

    # ── memory ───────────────────────────────────────────────────────────────────────────────────

    async def memory_rows(self) -> list[Row]:
        (gateway,) = self._places.gateways(1)
        before = gateway.resident_bytes()
        async with self.clients("HTTP") as clients:
            for _ in range(IDLE_STREAMS // 100):
                await open_streams(clients, 100, IDLE)
            after = gateway.resident_bytes()
        grown = (after - before) / IDLE_STREAMS / 1000
        return [
            row(
                f"resident memory with {IDLE_STREAMS:,} idle streams",
                [after / MB],
                "MB",
                reference="without them",
                reference_samples=[before / MB],
                bar=at_most(300),
            ),
            row("of it, each stream", [grown], "kB"),
        ]


def last_of_each_step_ms(streams: Sequence[Stream], step_us: int) -> list[float]:
    """How long after the step's end the last of its tokens came, for each step that all saw."""
    step_s = step_us / US_PER_S
    ends: dict[int, list[float]] = {}
    for stream in streams:
        for at_s in stream.token_s[1:]:
            step = int(at_s / step_s)
            ends.setdefault(step, []).append((at_s - step * step_s) * 1000)
    return [max(delays) for delays in ends.values() if len(delays) == len(streams)]


def added(name: str, samples: dict[str, list[float]], kind: str, limit: float) -> Row:
    """The difference of the medians, beside the bare one; spreads are those of what is through."""
    bare = statistics.median(samples["bare"])
    bar = at_most(limit)
    made = row(name, [ms - bare for ms in samples[kind]], "ms", bar=bar)
    return replace(made, reference="without a gateway", reference_value=bare)


def stage_rows(options: Options) -> Iterator[Row]:
    """Of processes of their own, because to note the stages takes time as well."""
    with tempfile.TemporaryDirectory(prefix="pd-") as directory:
        with (
            places(stages=Path(directory)) as running,
            asyncio.Runner(loop_factory=loop_factory()) as runner,
        ):
            requests = runner.run(_one_at_a_time(running, options.rounds(500)))
        stages = stages_of(requests, read(Path(directory)))
    for name, samples in stages.items():
        yield row(f"stage: {name}", samples, "µs")
    yield row("stages of the gateway's own, together", [own_us(stages)], "µs")


async def _one_at_a_time(running: Places, rounds: int) -> list[tuple[int, int]]:
    """When each was sent, and when its first token came, in nanoseconds."""
    (gateway,) = running.gateways(1)
    requests = []
    async with HttpClient(gateway.said["http"]) as client:
        for index in range(10 + rounds):
            stream = await client.ask(Pace(PREFILL_US, 0), 1)
            await stream.until_ended()
            if index >= 10:
                requests.append((round(stream.sent_s * 1e9), round(stream.token_s[0] * 1e9)))
            await settled()
    return requests


GATEWAY_PARTS: Mapping[str, Callable[[Surface], Awaitable[list[Row]]]] = {
    "first": lambda surface: surface.first_token_rows("HTTP"),
    "tokens": lambda surface: surface.token_rows("HTTP"),
    "delay": lambda surface: surface.delay_rows("HTTP"),
    "several": lambda surface: surface.several_rows(),
    "grpc-first": lambda surface: surface.first_token_rows("gRPC"),
    "grpc-tokens": lambda surface: surface.token_rows("gRPC"),
    "memory": lambda surface: surface.memory_rows(),
}


OTHER_PARTS: Mapping[str, Callable[[Options], Iterator[Row]]] = {
    "stages": stage_rows,
    "router": router_rows,
    "package": package_rows,
}


def measure(options: Options) -> Iterator[Row]:
    given = options.arguments
    known = [*GATEWAY_PARTS, *OTHER_PARTS]
    wanted = set(given.only.split(",")) if given.only else {*known}
    if unknown := wanted - {*known}:
        raise SystemExit(f"--only knows {', '.join(known)}, not {', '.join(sorted(unknown))}")
    if given.profiles is not None:
        given.profiles.mkdir(parents=True, exist_ok=True)
    if wanted & {*GATEWAY_PARTS}:
        with (
            places(profiles=given.profiles) as running,
            asyncio.Runner(loop_factory=loop_factory()) as runner,
        ):
            surface = Surface(running, options)
            for name, part in GATEWAY_PARTS.items():
                if name in wanted:
                    yield from runner.run(_all(part(surface)))
    for name, rows in OTHER_PARTS.items():
        if name in wanted:
            yield from rows(options)


async def _all(rows: Awaitable[list[Row]]) -> list[Row]:
    return await rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join([*GATEWAY_PARTS, *OTHER_PARTS])
    parser.add_argument("--only", help=f"some of {known}")
    parser.add_argument("--profiles", type=Path, help="leave each process's profile here (pstats)")


if __name__ == "__main__":
    run("surface", measure, add_arguments=add_arguments)
