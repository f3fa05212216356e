"""The parts of ``bench.surface`` together: real processes and sockets, and every token once."""

import asyncio
from collections.abc import Iterator

import pytest

from bench.surface_clients import BareClient, GrpcClient, HttpClient
from bench.surface_fleet import Pace
from bench.surface_places import Places, loop_factory, places

pytestmark = pytest.mark.slow  # three processes of their own start

TOKENS = 7
STREAMS = 3
PACE = Pace(1_000, 2_000)


@pytest.fixture(scope="module")
def running(default_model: object) -> Iterator[Places]:
    with places(prefills=2, decodes=2) as started:
        yield started


@pytest.mark.parametrize("kind", ["HTTP", "gRPC", "bare"])
def test_every_client_gets_every_token_once(running: Places, kind: str) -> None:
    async def scenario() -> list[int]:
        async with client_of(running, kind) as client:
            streams = [await client.ask(PACE, TOKENS) for _ in range(STREAMS)]
            for stream in streams:
                await stream.until_first()
            for stream in streams:
                await stream.until_ended()
        return [len(stream.token_s) for stream in streams]

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        assert runner.run(scenario()) == [TOKENS] * STREAMS


def test_a_gateway_says_what_it_takes(running: Places) -> None:
    (gateway,) = running.gateways(1)
    assert gateway.cpu_s() > 0
    assert gateway.resident_bytes() > 10_000_000


def test_streams_that_are_left_free_their_workers(running: Places) -> None:
    """A client that leaves cancels: what it had does not keep others from being served."""

    async def scenario() -> None:
        for _ in range(3):
            async with client_of(running, "HTTP") as client:
                for _ in range(20):
                    await (await client.ask(Pace(1_000, 0), 1_000)).until_first()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(scenario())


def client_of(running: Places, kind: str) -> HttpClient | GrpcClient | BareClient:
    if kind == "bare":
        return BareClient(running.address, running.directory)
    (gateway,) = running.gateways(1)
    said = gateway.said
    return HttpClient(said["http"]) if kind == "HTTP" else GrpcClient(said["grpc"])
