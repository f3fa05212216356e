"""The store over a cluster's life: pins that end, hosts that are drained, restarts, other secrets.

What outlives a cluster here is its disk. ``Disk`` serves one cluster after another on it.
"""

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from pdserve.cluster.commands.kv import drain, evict, show_stat
from pdserve.cluster.commands.warm import warm
from tests.integration.harness import TestCluster, running, settings, wait_for, wait_until_equal

pytestmark = pytest.mark.slow

TOKENS = 200
BLOCKS = TOKENS // 16
CACHED = BLOCKS * 16
PATIENCE_S = 120.0


def prompt_of(seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(20, 40_000) for _ in range(TOKENS)]


def cached(cluster: TestCluster, prompt: list[int], **fields: Any) -> int:
    """Of the prompt's tokens, those that were found computed."""
    usage = cluster.complete(prompt, max_tokens=1, **fields)["usage"]
    count: int = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return count


def stat(cluster: TestCluster, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    show_stat(cluster.url, [], as_json=True)
    (only,) = json.loads(capsys.readouterr().out)
    found: dict[str, Any] = only
    return found


def test_a_pin_ends_with_its_time(
    cluster: TestCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"tokens": prompt_of(31), "user": "kv-brief"}))
    evict(cluster.url, [], tenant=None, prompt=None, everything=True, pinned=True)

    def pins() -> int:
        count: int = stat(cluster, capsys)["pins"]["soft"]
        return count

    assert pins() == 0
    assert warm(cluster.url, file, pin="1h", concurrency=1) == 0
    assert pins() == BLOCKS
    evict(cluster.url, [], tenant="kv-brief", prompt=None, everything=False, pinned=True)
    assert pins() == 0
    assert warm(cluster.url, file, pin="2s", concurrency=1) == 0
    assert f"{BLOCKS} of {BLOCKS} full blocks pinned" in capsys.readouterr().out
    wait_until_equal("pins that have ended", pins, 0, timeout_s=PATIENCE_S)
    assert cached(cluster, prompt_of(31), user="kv-brief") == CACHED, "it is only a pin that ended"


def test_a_host_is_drained_under_a_stream_and_comes_back(
    cluster: TestCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is under way goes on to its end, what is new is refused, and then it is served again."""
    expected = cluster.tokens(prompt_of(32), 48)
    store = stat(cluster, capsys)["store"]
    began, tokens = threading.Event(), list[int]()

    def stream() -> None:
        # The first token says that a hand-off is behind it: its blocks are the decode worker's.
        body = {"prompt": prompt_of(32), "max_tokens": 48, "ignore_eos": True, "temperature": 0.0}
        body |= {"stream": True, "return_token_ids": True}
        url = f"{cluster.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=300) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        tokens.extend(choice.get("token_ids") or ())
                        began.set()

    streaming = threading.Thread(target=stream)
    streaming.start()
    try:
        assert began.wait(PATIENCE_S)
        assert drain(cluster.url, [], store, timeout_s=PATIENCE_S, undo=False) == 0
        streaming.join(PATIENCE_S)
        assert tokens == expected
        assert stat(cluster, capsys)["draining"]
        refused = httpx.post(
            f"{cluster.url}/v1/completions",
            json={"prompt": prompt_of(33), "max_tokens": 2},
            headers={"x-request-timeout-ms": "4000"},
            timeout=300,
        )
        assert refused.status_code in (429, 503, 504), refused.text
        assert "error" in refused.json()
    finally:
        assert drain(cluster.url, [], store, timeout_s=0, undo=True) == 0
        streaming.join(PATIENCE_S)
    assert len(cluster.tokens(prompt_of(33), 2)) == 2


# ── one cluster after another on a disk ──────────────────────────────────────────────────────────


class Disk:
    def __init__(self, model: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._model = model
        self._directory = directory
        self._capsys = capsys

    @contextmanager
    def serving(self, *, key_salt: str = "", **parts: Any) -> Iterator[TestCluster]:
        disk = {
            "ssd_directory": str(self._directory),
            "ssd_bytes": 1 << 30,
            "ssd_write": "write_through",
            "key_salt": key_salt,
        }
        dtype = {"dtype": "float32"}
        config = settings(self._model, model=dtype, store=disk, **parts)
        with running(config) as cluster:
            yield cluster

    def wait_for_blocks(self, cluster: TestCluster, blocks: int) -> None:
        """Until at least so many are on the disk."""
        wait_for(
            f"{blocks} blocks on the disk",
            lambda: stat(cluster, self._capsys)["stat"]["ssd"]["blocks"] >= blocks,
            timeout_s=PATIENCE_S,
        )


@pytest.fixture
def disk(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Disk:
    return Disk(small_model, tmp_path / "ssd", capsys)


def test_a_store_is_shared_by_those_who_know_its_salt_and_by_nobody_else(disk: Disk) -> None:
    with disk.serving(key_salt="one secret") as cluster:
        assert cached(cluster, prompt_of(34)) == 0
        disk.wait_for_blocks(cluster, BLOCKS)
    with disk.serving(key_salt="another secret") as cluster:
        assert cached(cluster, prompt_of(34)) == 0, "who has another salt finds nothing"
        disk.wait_for_blocks(cluster, 2 * BLOCKS)
    with disk.serving(key_salt="one secret") as cluster:
        assert cached(cluster, prompt_of(34)) == CACHED, "who has the same finds what was his"


def test_workers_of_one_and_of_two_processes_share_blocks_and_no_other_cut_does(
    disk: Disk,
) -> None:
    """Two parts in every worker, whoever has them: their blocks are the same. A model in one part
    sums in another order, so its blocks are others: it finds none, and is given no slice of any."""
    two = {"tensor_parallel": 2}
    with disk.serving(prefill=two) as cluster:
        expected = cluster.tokens(prompt_of(35), 8)
        disk.wait_for_blocks(cluster, BLOCKS)
    with disk.serving(decode=two) as cluster:
        assert cached(cluster, prompt_of(35)) == CACHED, "two processes wrote, one reads"
        assert cluster.tokens(prompt_of(35), 8) == expected
        cluster.tokens(prompt_of(36), 8)
        disk.wait_for_blocks(cluster, 2 * BLOCKS)
    with disk.serving(prefill=two) as cluster:
        assert cached(cluster, prompt_of(36)) == CACHED, "one process wrote, two read"
    with disk.serving() as cluster:
        assert cached(cluster, prompt_of(35)) == 0
        assert cached(cluster, prompt_of(36)) == 0
