"""``pdserve kv`` beside a running cluster: prompts warmed, pinned, counted, evicted."""

import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.cluster.commands.kv import audit, drain, evict, show_stat
from pdserve.cluster.commands.warm import warm
from pdserve.vitals import METRICS
from tests.integration.harness import TestCluster, running, settings, wait_until_equal

TOKENS = 200
BLOCKS = TOKENS // 16


def _stat(cluster: TestCluster, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    show_stat(cluster.url, [], as_json=True)
    (stat,) = json.loads(capsys.readouterr().out)
    found: dict[str, Any] = stat
    return found


def _cached(cluster: TestCluster, prompt: list[int], **fields: Any) -> int:
    """Of the prompt's tokens, those that a request with these fields found computed."""
    usage = cluster.complete(prompt, max_tokens=1, **fields)["usage"]
    cached: int = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return cached


def test_a_system_prompt_is_computed_ahead_and_is_there_for_its_tenant(
    cluster: TestCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(5)
    prompt = [chance.randrange(20, 40_000) for _ in range(TOKENS)]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"tokens": prompt, "user": "kv-tenant"}))
    assert warm(cluster.url, file, pin="1h", concurrency=1) == 0
    assert f"{TOKENS} tokens computed, 0 were there; {BLOCKS} of {BLOCKS} full blocks pinned" in (
        capsys.readouterr().out
    )
    assert warm(cluster.url, file, pin=None, concurrency=1) == 0
    assert f"{TOKENS - BLOCKS * 16} tokens computed, {BLOCKS * 16} were" in capsys.readouterr().out
    assert _cached(cluster, prompt, user="kv-tenant") == BLOCKS * 16
    assert _cached(cluster, prompt, user="kv-stranger") == 0, "another tenant sees nothing of it"
    assert _cached(cluster, prompt) == 0
    other = [chance.randrange(20, 40_000) for _ in range(TOKENS)]
    cluster.complete(other, max_tokens=1, prompt_cache_retention="30m")

    def soft_pins() -> int:
        count: int = _stat(cluster, capsys)["pins"]["soft"]
        return count

    wait_until_equal("blocks with a soft pin", soft_pins, 2 * BLOCKS)
    stat = _stat(cluster, capsys)
    (use,) = [use for use in stat["tenants"] if use["tenant"] == "kv-tenant"]
    assert use["slots"] >= BLOCKS

    assert audit(cluster.url, [], blocks_max=None, as_json=False) == 0
    with urllib.request.urlopen(f"{cluster.url}/metrics", timeout=10) as answer:
        metrics = answer.read().decode()
    assert f'store="{stat["store"]}"' in metrics
    told = {
        (sample.name, sample.labels["role"])
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if "process" in sample.labels and sample.value > 0
    }
    roles = ("gateway", "router", "prefill", "decode", "store")
    assert told == {(name, role) for name, _ in METRICS.values() for role in roles}
    assert all(worker["counters"]["tasks"] > 0 for worker in cluster.status()["workers"])

    evict(cluster.url, [], tenant="kv-tenant", prompt=None, everything=False, pinned=True)
    assert f"evicted {use['slots']:,} blocks" in capsys.readouterr().out
    assert soft_pins() == BLOCKS
    assert drain(cluster.url, [], stat["store"], timeout_s=20, undo=False) == 0
    assert drain(cluster.url, [], stat["host"], timeout_s=0, undo=True) == 0
    assert len(cluster.tokens(prompt, 2, user="kv-tenant")) == 2


@pytest.mark.slow
def test_blocks_of_a_whole_cluster_may_be_packed(
    small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of whatever workers move: hand-offs, and prefixes that come back."""
    chance = random.Random(6)
    prompt = [chance.randrange(20, 40_000) for _ in range(TOKENS)]
    sizes = {}
    for codec in ("plain", "int8"):
        with running(settings(small_model, store={"codec": codec})) as cluster:
            first = cluster.tokens(prompt, 8)
            assert len(first) == len(cluster.tokens([*prompt, *first], 8)) == 8
            assert cluster.counter("decode", "bytes_restored") > 0
            capsys.readouterr()  # what Ray says
            stat = _stat(cluster, capsys)
            sizes[codec] = stat["block_bytes"]
    assert sizes["int8"] < 0.7 * sizes["plain"]
