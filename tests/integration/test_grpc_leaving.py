"""Clients that ask all the time, over connections on which a request takes a while, of a gateway
that leaves: none of them gets a status that it would not send again."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import grpc
import pytest

from pdserve.clock import MS, S
from pdserve.cluster.gateway import draining, front
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import InferenceStub
from tests.grpc_channels import own_connection
from tests.integration.harness import wait_for
from tests.integration.test_front_leaving import BRIEF_S, LONG_S, WAIT_S, Leaving, leaving
from tests.unit.cluster.fake_session import MODEL, said

CLIENTS = 8
ON_ITS_WAY_S = 0.03
"""Longer than a server takes to answer, so that nearly always a request is on its way."""


class Relay:
    """Passes connections on to ``port``; what a client says arrives ``ON_ITS_WAY_S`` later."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._pass, "127.0.0.1", 0))
        self.port = int(self._server.sockets[0].getsockname()[1])

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):
                theirs, ours = await asyncio.open_connection("127.0.0.1", self._upstream)
                asking = asyncio.create_task(self._later(reader, ours))
                try:
                    while data := await theirs.read(1 << 16):
                        writer.write(data)
                        await writer.drain()
                finally:
                    asking.cancel()
                    ours.close()
        finally:
            writer.close()

    async def _later(self, reader: asyncio.StreamReader, ours: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                loop.call_later(ON_ITS_WAY_S, ours.write, data)

    def close(self) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        passing = asyncio.all_tasks() - {asyncio.current_task()}
        for each in passing:
            each.cancel()
        await asyncio.gather(*passing, return_exceptions=True)


class Clients:
    """Each asks, gets its answer, and asks again; half of them for streams, half with gRPC's own
    policy for retries."""

    def __init__(self, ports: list[int]) -> None:
        self.codes: Counter[tuple[bool, str]] = Counter()
        """How calls ended, with the policy and without."""
        self.counts = [0] * CLIENTS
        self._target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
        self._is_ending = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        streams, retries = number % 2 == 0, number % 4 < 2
        options = own_connection(retries=retries)
        with grpc.insecure_channel(self._target, options=options) as channel:
            stub = cast(Any, InferenceStub)(channel)
            while not self._is_ending.is_set():
                code = "OK"
                try:
                    if streams:
                        list(stub.Generate(pb.GenerateRequest(model=MODEL, text="x")))
                    else:
                        stub.ListModels(pb.ListModelsRequest(), timeout=WAIT_S)
                except grpc.RpcError as error:
                    code = cast(Any, error).code().name
                self.codes[retries, code] += 1
                self.counts[number] += 1

    def wait_for_more(self) -> None:
        """Each has asked and been answered, more than once, since this was called."""
        wanted = [count + 3 for count in self.counts]
        wait_for(
            "all clients to be answered",
            lambda: all(have >= want for have, want in zip(self.counts, wanted, strict=True)),
        )

    def close(self) -> None:
        self._is_ending.set()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()


@contextlib.contextmanager
def asked_all_the_time(gone: Leaving, other: Leaving) -> Iterator[Clients]:
    relay = Relay(gone.front.ports["grpc"])
    clients = Clients([relay.port, other.front.ports["grpc"]])
    try:
        clients.wait_for_more()
        yield clients
    finally:
        clients.close()
        relay.close()


def codes_while_one_leaves(*, drain_s: float) -> set[tuple[bool, str]]:
    """Of all calls, and whether their clients retry; another server stays."""
    with (
        leaving(said("Hello"), drain_s=drain_s) as gone,
        leaving(said("Hello"), drain_s=BRIEF_S) as other,
        asked_all_the_time(gone, other) as clients,
    ):
        gone.leave()
        gone.stopped.result(WAIT_S)
        clients.wait_for_more()
    return set(clients.codes)


def test_clients_leave_by_themselves_and_no_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "CONNECTION_AGE_NS_MAX", 200 * MS)
    monkeypatch.setattr(
        draining, "LINGER_NS", int(LONG_S) * S
    )  # however long this machine stands still
    assert codes_while_one_leaves(drain_s=LONG_S) == {(True, "OK"), (False, "OK")}


def test_clients_that_are_cut_off_may_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        front, "END_S", WAIT_S
    )  # for what has begun, on a machine that stands still
    assert codes_while_one_leaves(drain_s=BRIEF_S) <= {
        (True, "OK"),
        (False, "OK"),
        (False, "UNAVAILABLE"),
    }
