"""The same programs against a cluster of Ray with SmolLM2, over HTTP and gRPC."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.clients.matrix import CLIENTS, TEST_S_MAX, Client, recorded
from tests.integration.harness import WAIT_S, TestCluster, held, wait_until_equal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TEST_S_MAX)]

GREEDY = {"max_tokens": 12, "temperature": 0}


def greedy(cluster: TestCluster, *, chat: bool) -> str:
    """What a plain HTTP request gets."""
    if not chat:
        return str(cluster.complete("hi", **GREEDY)["choices"][0]["text"])
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], **GREEDY}
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=WAIT_S)
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.package)
def test_an_unchanged_client_works_with_a_whole_cluster(
    real_cluster: TestCluster, client: Client, record_property: Callable[[str, object], None]
) -> None:
    recorded(record_property, client.package, f"on a whole cluster: {client.what}")
    text = greedy(real_cluster, chat=not client.grpc)
    assert text.strip()
    address = real_cluster.cluster.grpc if client.grpc else f"{real_cluster.url}/v1"
    name = httpx.get(f"{real_cluster.url}/v1/models", timeout=WAIT_S).json()["data"][0]["id"]
    assert client.run(address, name) == client.expects(text)
    wait_until_equal("held at rest", lambda: held(real_cluster), 0, timeout_s=WAIT_S)
