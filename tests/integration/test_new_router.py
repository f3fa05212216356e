"""A router that takes over learns what workers and stores have, without waiting for new prompts."""

from pathlib import Path

import httpx

from tests.integration.harness import random_prompts, settings, wait_for, wait_until_equal
from tests.integration.in_process import InProcessCluster, in_process

WAIT_S = 60.0
PROMPT_TOKENS = 600
BLOCKS = PROMPT_TOKENS // 16


def _known(cluster: InProcessCluster) -> tuple[int, int]:
    """Blocks in the prefill worker's pool and in the host's store, as far as the router knows."""

    async def ask() -> tuple[int, int]:
        fleet = cluster.router._core.state.fleet
        workers = [worker for worker in fleet.all() if worker.prefills]
        if not workers:
            return 0, 0
        (worker,) = workers
        return fleet.index.key_count(worker.slot), fleet.index.key_count(worker.hello.store_id)

    known: tuple[int, int] = cluster.do(ask())
    return known


def _complete(cluster: InProcessCluster, prompt: list[int]) -> str:
    body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True, "temperature": 0.0}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_a_new_router_knows_what_is_cached(small_model: Path, tmp_path: Path) -> None:
    config = settings(small_model, gateway={"grpc_port": -1})
    first, second = random_prompts(2, seed=3, length=PROMPT_TOKENS)
    with in_process(config, tmp_path, small_model) as cluster:
        said = _complete(cluster, first)
        _complete(cluster, second)
        wait_for("all blocks at the router", lambda: min(_known(cluster)) >= 2 * BLOCKS)
        known = _known(cluster)
        cluster.replace_router()
        wait_until_equal(
            "blocks that the new router knows of", lambda: _known(cluster), known, timeout_s=WAIT_S
        )
        assert _complete(cluster, first) == said
