import asyncio
import os
from collections.abc import Mapping
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from pdserve.cluster.http.app import create_app
from pdserve.cluster.http.processes import text_of
from pdserve.config import GatewayConfig
from pdserve.errors import Disconnected, QueueFull
from pdserve.vitals import METRICS
from tests.unit.cluster.asgi import get, post
from tests.unit.cluster.fake_session import FakeSession, steps

ASK = {"messages": [{"role": "user", "content": "hi"}]}
SNAPSHOT: dict[str, Any] = {
    "queue_lengths": [2, 0, 1],
    "oldest_wait_ms": 1500.0,
    "parked": 4,
    "workers": [
        {"worker": "p-1", "role": "prefill", "running": 1, "waiting": 2, "free_blocks": 9},
        {"worker": "d-1", "role": "decode", "running": 5, "waiting": 0, "free_blocks": 7},
    ],
    "counters": {"preempted": 6},
}


def samples(app: FastAPI) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    reply = get(app, "/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }


CHAT = (("front", "http"), ("operation", "chat"))


def test_calls_tokens_and_latencies_are_counted() -> None:
    session = FakeSession()
    app = create_app(session, config=GatewayConfig())
    post(app, "/v1/chat/completions", ASK)
    post(app, "/v1/chat/completions", ASK | {"stream": True})
    session.script = steps(QueueFull("full", retry_after_ms=5))
    post(app, "/v1/chat/completions", ASK)
    post(app, "/v1/chat/completions", {})
    found = samples(app)
    for status, count in {"200": 2, "503": 1, "400": 1}.items():
        assert found["pdserve_requests_total", (*CHAT, ("status", status))] == count
    assert found["pdserve_requests_in_flight", CHAT] == 0
    assert found["pdserve_ttft_seconds_count", CHAT] == 2
    assert found["pdserve_inter_token_seconds_count", CHAT] == 2 * len(" world")
    assert found["pdserve_request_seconds_count", CHAT] == 4
    assert found["pdserve_generated_tokens_total", ()] == 2 * len("Hello world")
    assert found["pdserve_prompt_tokens_total", ()] == 2 * len("user: hi\nassistant: ")
    assert found["pdserve_cached_prompt_tokens_total", ()] == 2 * 3


def test_the_routers_figures_are_shown_beside_ours() -> None:
    async def snapshot() -> Mapping[str, Any]:
        return SNAPSHOT

    app = create_app(FakeSession(), config=GatewayConfig(), snapshot=snapshot)
    found = samples(app)
    assert found["pdserve_queue_requests", (("level", "2"),)] == 1
    assert found["pdserve_queue_oldest_wait_seconds", ()] == 1.5
    assert found["pdserve_parked_requests", ()] == 4
    assert found["pdserve_worker_running", (("role", "decode"), ("worker", "d-1"))] == 5
    assert found["pdserve_cluster_preempted_total", ()] == 6
    assert get(app, "/cluster/status").json() == SNAPSHOT


@pytest.mark.parametrize("hangs", [True, False])
def test_a_router_that_is_away_hides_its_own_figures_only(
    hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def snapshot() -> Mapping[str, Any]:
        if hangs:
            await asyncio.Event().wait()
        raise Disconnected("the router is away")

    monkeypatch.setattr("pdserve.cluster.http.app.SNAPSHOT_WAIT_S", 0.01)
    app = create_app(FakeSession(), config=GatewayConfig(), snapshot=snapshot)
    post(app, "/v1/chat/completions", ASK)
    assert samples(app)["pdserve_requests_total", (*CHAT, ("status", "200"))] == 1
    assert get(app, "/cluster/status").status == 503


def test_without_a_router_there_is_no_status() -> None:
    app = create_app(FakeSession(), config=GatewayConfig())
    assert get(app, "/cluster/status").status == 404


def test_every_process_says_what_it_has_of_the_machine_by_its_role() -> None:
    held = {"tasks": 9, "resident_bytes": 4096, "open_fds": 7}

    async def snapshot() -> dict[str, Any]:
        workers = [each | {"counters": {"steps": 1, **held}} for each in SNAPSHOT["workers"]]
        return SNAPSHOT | {"workers": workers, "router": {"pid": 11, "epoch": 1, **held}}

    async def stores(_: Mapping[str, Any]) -> bytes:
        return text_of([("store", "s-1", held)]).encode()

    app = create_app(FakeSession(), config=GatewayConfig(), snapshot=snapshot, stores=stores)
    reply = get(app, "/metrics").body.decode()
    found = samples(app)
    others = [("router", "11"), ("prefill", "p-1"), ("decode", "d-1"), ("store", "s-1")]
    for role, process in [*others, ("gateway", str(os.getpid()))]:
        labels = (("process", process), ("role", role))
        for figure, (name, _) in METRICS.items():
            value = found[name, labels]
            assert value > 0 if role == "gateway" else value == held[figure]
    for name, _ in METRICS.values():
        assert reply.count(f"# TYPE {name} ") == 1
