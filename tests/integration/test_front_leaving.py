"""A gateway that is asked to end, on real sockets: nobody who is connected is lost, what is cut off
is told so."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any, cast

import grpc
import httpx
import pytest

from pdserve.clock import MS
from pdserve.cluster.gateway import draining
from pdserve.cluster.gateway.front import Front
from pdserve.cluster.gateway.models import Control
from pdserve.cluster.gateway.session import GatewaySession
from pdserve.cluster.http import server
from pdserve.config import ClusterConfig, GatewayConfig
from pdserve.messages import FinishReason
from pdserve.proto.v1 import inference_pb2 as pb
from pdserve.proto.v1.inference_pb2_grpc import InferenceStub
from pdserve.wire import listening
from pdserve.wire.listening import listeners_at, retire, waiting_count
from tests.integration.harness import wait_for
from tests.unit.cluster.fake_session import HANG, MODEL, FakeSession, Script, piece, steps

WAIT_S = 60.0
QUEUED = 5
LONG_S = 600.0
BRIEF_S = 0.2

BODY = {"model": MODEL, "prompt": "x", "max_tokens": 5}


class Leaving:
    """A front with one request under way, in a thread."""

    def __init__(self, script: Script, *, drain_s: float, replicas: int = 1) -> None:
        self.session = FakeSession(script)
        self.session.has_router = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        config = ClusterConfig(
            gateway=GatewayConfig(http_port=0, grpc_port=0, replicas=replicas),
            drain_timeout_s=drain_s,
        )
        self.front: Front = self._call(self._made(config)).result(WAIT_S)
        self.url = f"http://127.0.0.1:{self.front.ports['http']}"
        self.stopped: Any = None

    async def _made(self, config: ClusterConfig) -> Front:
        async def nothing() -> dict[str, Any]:
            return {}

        front = Front(cast(GatewaySession, self.session), config, Control(nothing, nothing))
        await front.start()
        return front

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def leave(self) -> None:
        """Returns when nobody new gets in."""
        self.stopped = self._call(self.front.stop())
        wait_for("the listener to be closed", lambda: not self.listens())

    def listens(self) -> bool:
        found = listeners_at(self.front.ports["http"])
        for each in found:
            each.close()
        return bool(found)

    def go_on(self) -> None:
        self._loop.call_soon_threadsafe(self.session.go_on)

    def close(self) -> None:
        self.session.has_router = False
        (self.stopped or self._call(self.front.stop())).result(WAIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self._loop.close()


@contextlib.contextmanager
def leaving(script: Script, *, drain_s: float, replicas: int = 1) -> Iterator[Leaving]:
    made = Leaving(script, drain_s=drain_s, replicas=replicas)
    try:
        yield made
    finally:
        made.close()


class Asked:
    """A request whose answer comes in a thread of its own."""

    def __init__(self, url: str, path: str | None = None, **fields: Any) -> None:
        """A completion with ``fields``, or whatever is at ``path``."""
        self.answer: httpx.Response | None = None
        self.error: Exception | None = None
        if path is None:
            self._request = httpx.Request("POST", f"{url}/v1/completions", json={**BODY, **fields})
        else:
            self._request = httpx.Request("GET", f"{url}{path}")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with httpx.Client(timeout=WAIT_S) as client:
                self.answer = client.send(self._request)
        except httpx.HTTPError as error:
            self.error = error

    def get(self) -> httpx.Response:
        self._thread.join(WAIT_S)
        assert self.answer is not None, self.error
        return self.answer


def test_what_is_under_way_is_finished_and_idle_connections_get_an_answer() -> None:
    script = steps(piece("Hel"), HANG, piece("lo", finish=FinishReason.STOP))
    with (
        leaving(script, drain_s=LONG_S) as gateway,
        httpx.Client(base_url=gateway.url, timeout=WAIT_S) as idle,
    ):
        assert "connection" not in idle.get("/health").headers
        asking = Asked(gateway.url)
        wait_for("the request to be under way", lambda: bool(gateway.session.open))
        gateway.leave()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{gateway.url}/health", timeout=WAIT_S)
        answer = idle.get("/health")
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert not gateway.stopped.done()
        gateway.go_on()
        done = asking.get()
        assert (done.status_code, done.headers["connection"]) == (200, "close")
        assert done.json()["choices"][0]["text"] == "Hello"
        gateway.stopped.result(WAIT_S)


@pytest.mark.parametrize("stream", [False, True], ids=["before its first token", "in its stream"])
def test_what_does_not_end_in_time_is_told_so(stream: bool) -> None:
    script = steps(piece("Hello"), HANG) if stream else steps(HANG)
    with leaving(script, drain_s=BRIEF_S) as gateway:
        asking = Asked(gateway.url, stream=stream)
        wait_for("the request to be under way", lambda: bool(gateway.session.open))
        gateway.leave()
        answer = asking.get()
        if stream:
            assert answer.status_code == 200
            events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
            (error,) = [json.loads(event)["error"] for event in events if '"error"' in event]
        else:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            error = answer.json()["error"]
        assert error["code"] == "gateway_leaving"
        assert "any other one" in error["message"]


def test_without_a_router_nobody_waits_for_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "UNLED_NS", 100 * MS)
    with leaving(steps(HANG), drain_s=LONG_S) as gateway:
        asking = Asked(gateway.url)
        wait_for("the request to be under way", lambda: bool(gateway.session.open))
        gateway.session.has_router = False
        gateway.leave()
        assert asking.get().status_code == 503


def test_whatever_hangs_is_not_cut_off_with_a_bare_500(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "END_S", BRIEF_S)
    begun = threading.Event()

    async def hang() -> None:
        begun.set()
        await asyncio.Event().wait()

    with leaving(steps(HANG), drain_s=BRIEF_S) as gateway:
        gateway.front.app.add_api_route("/hang", hang)
        asking = Asked(gateway.url, "/hang")
        assert begun.wait(WAIT_S)
        gateway.leave()
        answer = asking.get()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "gateway_leaving")


def test_a_grpc_call_that_does_not_end_in_time_is_unavailable() -> None:
    with (
        leaving(steps(HANG), drain_s=BRIEF_S) as gateway,
        grpc.insecure_channel(f"127.0.0.1:{gateway.front.ports['grpc']}") as channel,
    ):
        asked = pb.GenerateRequest(model=MODEL, text="x")
        chunks = cast(Any, InferenceStub)(channel).Generate(asked, timeout=WAIT_S)
        wait_for("the call to be under way", lambda: bool(gateway.session.open))
        gateway.leave()
        with pytest.raises(grpc.RpcError) as caught:
            list(chunks)
    failed: Any = caught.value
    assert failed.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(failed.trailing_metadata())["pdserve-error-kind"] == "gateway_leaving"


# ── listeners ────────────────────────────────────────────────────────────────────────────────────


def listener(port: int = 0) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(("127.0.0.1", port))
    made.listen(100)
    return made


def test_nobody_who_waits_to_be_accepted_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two listeners at a port. One retires with connections in its queue; those that come
    meanwhile reach the other one, and the first is empty when it closes."""
    monkeypatch.setattr(listening, "ACCEPT_S_MAX", WAIT_S)
    with contextlib.ExitStack() as stack:
        leaving_one = stack.enter_context(listener())
        port = leaving_one.getsockname()[1]
        staying = stack.enter_context(listener(port))
        clients: list[socket.socket] = []

        def connect() -> None:
            client = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
            clients.append(stack.enter_context(client))

        while waiting_count(leaving_one) < QUEUED:
            assert len(clients) < 90, "the kernel gives the one listener nothing"
            connect()

        async def leave() -> list[socket.socket]:
            retiring = asyncio.create_task(retire([leaving_one]))
            await asyncio.sleep(0)
            for late in lates:
                late.start()  # whom the kernel gives to the one that is deaf asks again
            await asyncio.wait({retiring}, timeout=2 * listening.HANDSHAKE_S)
            assert not retiring.done(), "its owner has not accepted them yet"
            accepted = [leaving_one.accept()[0] for _ in range(QUEUED)]
            await retiring
            return accepted

        lates = [threading.Thread(target=connect) for _ in range(QUEUED)]
        accepted = [stack.enter_context(each) for each in asyncio.run(leave())]
        assert waiting_count(leaving_one) == 0
        leaving_one.close()
        for late in lates:
            late.join(WAIT_S)
        rest_count = len(clients) - QUEUED
        accepted += [stack.enter_context(staying.accept()[0]) for _ in range(rest_count)]
        for each in accepted:
            each.sendall(b"!")
        for client in clients:
            assert client.recv(1) == b"!"
