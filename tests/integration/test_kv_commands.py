"""``pdserve kv`` beside a gateway: a real store node and a real HTTP server, without a model.

The session stands in for the workers: it stores a prompt's blocks before it answers.
"""

import asyncio
import json
import re
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster.commands.kv import audit, evict, show_stat
from pdserve.cluster.commands.warm import warm
from pdserve.cluster.gateway.calls import Call
from pdserve.cluster.gateway.pinning import Pinning
from pdserve.cluster.http.app import create_app
from pdserve.cluster.store_metrics import render, reports_of
from pdserve.config import GatewayConfig
from pdserve.kvstore.admin_client import StoreAdmin
from pdserve.kvstore.client import StoreClient
from pdserve.wire.hosts import local_host_id
from tests.integration.http_server import served
from tests.integration.store_nodes import PATIENCE_S, Node, filler, keys_of, running_node
from tests.unit.cluster.fake_session import FakeSession, said

SYSTEM = "You are a helpful assistant, and brief."


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path, "--shares", json.dumps({"*": 1}), slot_count=24) as node:
        yield node


@pytest.fixture
def client(node: Node) -> StoreClient:
    return node.client("worker")


@pytest.fixture
def url(node: Node, client: StoreClient) -> Iterator[str]:
    session = FakeSession()
    answer = said("x")

    def script(call: Call) -> Iterable[Any]:
        keys = session.block_keys(call.prompt, call.tenant, None)
        client.put(keys, 0, filler("computed"), tenant=call.tenant)
        return answer(call)

    session.script = script

    async def snapshot() -> Mapping[str, Any]:
        worker = {"store_id": client.store_id, "store": asdict(node.address), "worker": "w"}
        return {"workers": [worker | {"role": "prefill"}] * 2}

    async def stores(snapshot: Mapping[str, Any]) -> bytes:
        return render(await reports_of(snapshot), ("alice",))

    app = create_app(session, config=GatewayConfig(), snapshot=snapshot, stores=stores)
    with served(app) as url:
        yield url


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": SYSTEM, "user": "alice"}, {"tokens": list(range(8))}]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_prompts_are_computed_ahead_and_stay_while_they_are_pinned(
    url: str, prompts: Path, client: StoreClient, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = len(SYSTEM) // 4
    assert warm(url, prompts, pin="hard:1h", concurrency=2) == 1  # 25 % of 24 slots may be hard
    said = capsys.readouterr()
    assert "hard_pin_ratio" in re.sub(r"\s+", "", said.err).replace("store.", "")
    assert warm(url, prompts, pin="1h", concurrency=2) == 0
    out = capsys.readouterr().out
    assert "2 prompts: " in out
    assert f"{blocks + 2} of {blocks + 2} full blocks pinned" in out
    session = FakeSession()
    keys = session.block_keys(list(SYSTEM.encode()), "alice", None)
    for name in ("flood", "more"):
        assert client.put(keys_of(name, 12), 0, filler(name), tenant="alice") == 12
    assert client.claim(keys).count == blocks


def test_requests_get_soft_pins_and_a_store_that_is_gone_does_not_end_it(
    node: Node, client: StoreClient
) -> None:
    client.put(keys_of("a", 3), 0, filler("a"))
    admin = StoreAdmin(node.address, host=local_host_id())
    gone = {"store_id": "gone", "store": asdict(node.address) | {"unix_path": "/nowhere/s"}}
    answers = [[gone], [{"store_id": client.store_id, "store": asdict(node.address)}]]

    async def snapshot() -> Mapping[str, Any]:
        return {"workers": answers.pop(0)}

    async def play() -> None:
        pinning = Pinning(snapshot)
        running = asyncio.create_task(pinning.run())
        for _ in range(2):
            pinning.keep(keys_of("a", 3), 60_000)
        async with asyncio.timeout(PATIENCE_S):
            while await asyncio.to_thread(lambda: admin.report().pins["soft"]) < 3:
                pass
        running.cancel()

    asyncio.run(play())


def test_a_prompt_is_evicted_by_its_text_and_nobody_elses(
    url: str, prompts: Path, client: StoreClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert warm(url, prompts, pin=None, concurrency=1) == 0
    blocks = len(SYSTEM) // 4
    evict(url, [], tenant="bob", prompt=SYSTEM, everything=False, pinned=False)
    assert "evicted 0 blocks" in capsys.readouterr().out
    evict(url, [], tenant="alice", prompt=SYSTEM, everything=False, pinned=False)
    assert f"evicted {blocks} blocks" in capsys.readouterr().out
    assert client.stat().slots_committed == 2
    assert audit(url, [], blocks_max=None, as_json=False) == 0
    show_stat(url, [], as_json=False)
    assert client.store_id in capsys.readouterr().out


def test_what_the_stores_did_is_in_the_gateways_metrics(
    url: str, prompts: Path, client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.kvstore.client.NOTE_NS", 0)
    warm(url, prompts, pin=None, concurrency=1)
    client.release(client.claim(keys_of("unknown", 3)))
    client.stat()  # what it looked for by itself, it tells with its next message
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    store = f'store="{client.store_id}"'
    assert f'pdserve_kv_blocks_total{{outcome="asked",{store}}} 3.0' in text
    assert f'pdserve_kv_tenant_slots{{{store},tenant="alice"}} {len(SYSTEM) // 4}.0' in text
    assert f'pdserve_kv_phase_seconds_count{{phase="lookup",{store},tier="memory"}} 1.0' in text
    assert text.count("# TYPE pdserve_kv_phase_seconds histogram") == 1
