"""Load tools against a cluster of Ray: they find what they insist on, and count what we count.

Each takes its prompts' tokens from a directory, as it would from a hub.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.matrix import TEST_S_MAX, recorded, run, script_of
from tests.integration.harness import WAIT_S, TestCluster, held, wait_for, wait_until_equal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TEST_S_MAX)]

REQUESTS, PROMPT_TOKENS, ANSWER_TOKENS = 6, 32, 8
TOKENS = REQUESTS * ANSWER_TOKENS
OFFLINE = {"HF_HUB_OFFLINE": "1"}

READ_BY_AIPERF = {
    f"vllm:{name}"
    for name in (
        *("prefix_cache_hits", "prefix_cache_queries", "kv_cache_usage_perc"),
        *("num_requests_running", "num_requests_waiting", "num_preemptions"),
        *("prompt_tokens", "generation_tokens"),
    )
}
"""Of vLLM's metrics, those that it looks for."""

Record = Callable[[str, object], None]


@pytest.fixture
def name(real_cluster: TestCluster) -> str:
    models = httpx.get(f"{real_cluster.url}/v1/models", timeout=WAIT_S).json()["data"]
    return str(models[0]["id"])


def generated(cluster: TestCluster) -> float:
    """Tokens so far, by the metric that tools read."""
    lines = httpx.get(f"{cluster.url}/metrics", timeout=WAIT_S).text.splitlines()
    (line,) = (line for line in lines if line.startswith("vllm:generation_tokens_total{"))
    return float(line.split()[-1])


def counted(cluster: TestCluster, before: float, least: int) -> None:
    """At rest again, having generated at least that many (a tool may warm up)."""
    wait_for("what was generated to be counted", lambda: generated(cluster) - before >= least)
    wait_until_equal("held at rest", lambda: held(cluster), 0, timeout_s=WAIT_S)


@pytest.mark.parametrize("api", ["completions", "chat/completions"])
def test_vllm_bench_serve(
    real_cluster: TestCluster,
    name: str,
    small_model: Path,
    api: str,
    tmp_path: Path,
    record_property: Record,
) -> None:
    recorded(
        record_property,
        "vllm",
        "on a whole cluster: bench serve, random prompts, completions and chat",
    )
    backend = "openai-chat" if api.startswith("chat") else "openai"
    before = generated(real_cluster)
    run(
        [
            *(script_of("vllm", "vllm"), "bench", "serve", "--backend", backend),
            *("--base-url", real_cluster.url, "--endpoint", f"/v1/{api}"),
            *("--model", name, "--tokenizer", small_model, "--ignore-eos"),
            *("--dataset-name", "random", "--random-input-len", str(PROMPT_TOKENS)),
            *("--random-output-len", str(ANSWER_TOKENS), "--num-prompts", str(REQUESTS)),
            *("--max-concurrency", "3", "--percentile-metrics", "ttft,tpot,itl,e2el"),
            *("--save-result", "--save-detailed", "--result-dir", tmp_path),
            *("--result-filename", "result.json", "--disable-tqdm"),
        ],
        more=OFFLINE,
    )
    told = json.loads((tmp_path / "result.json").read_text())
    assert (told["completed"], told["failed"]) == (REQUESTS, 0)
    assert told["output_lens"] == [ANSWER_TOKENS] * REQUESTS
    assert told["total_output_tokens"] == TOKENS
    assert any(told["generated_texts"])
    counted(real_cluster, before, TOKENS)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_guidellm(
    real_cluster: TestCluster,
    small_model: Path,
    path: str,
    tmp_path: Path,
    record_property: Record,
) -> None:
    recorded(
        record_property,
        "guidellm",
        "on a whole cluster: synthetic prompts, concurrent; completions, chat, responses",
    )
    before = generated(real_cluster)
    run(
        [
            *(script_of("guidellm", "guidellm"), "run", "--disable-console-interactive"),
            *("--backend", f"kind=openai_http,target={real_cluster.url},request_format={path}"),
            *("--profile", "kind=concurrent,streams=2"),
            *("--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={small_model}"),
            "--data",
            f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={ANSWER_TOKENS}",
            *("--output", f"kind=json,path={tmp_path}/result.json"),
        ],
        more=OFFLINE,
    )
    (benchmark,) = json.loads((tmp_path / "result.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == totals["total"] == REQUESTS
    for request in benchmark["requests"]["successful"]:
        tokens = request["output_metrics"]["text_tokens"]
        assert tokens == ANSWER_TOKENS or (path == "/v1/responses" and tokens > 0)
    counted(real_cluster, before, TOKENS)


@pytest.mark.parametrize("kind", ["chat", "completions", "responses", "embeddings"])
def test_aiperf(
    real_cluster: TestCluster,
    name: str,
    small_model: Path,
    kind: str,
    tmp_path: Path,
    record_property: Record,
) -> None:
    recorded(
        record_property,
        "aiperf",
        "on a whole cluster: chat, completions, responses, embeddings; the server's metrics",
    )
    generates = kind != "embeddings"
    before = generated(real_cluster)
    answers = ["--streaming", "--output-tokens-mean", str(ANSWER_TOKENS)]
    answers += ["--extra-inputs", "ignore_eos:true"]
    run(
        [
            *(script_of("aiperf", "aiperf"), "profile", "--ui", "none"),
            *("--model", name, "--url", real_cluster.url, "--endpoint-type", kind),
            *("--tokenizer", small_model, "--concurrency", "2"),
            *("--request-count", str(REQUESTS), "--artifact-dir", tmp_path),
            *("--synthetic-input-tokens-mean", str(PROMPT_TOKENS)),
            *("--synthetic-input-tokens-stddev", "0", *(answers if generates else ())),
        ],
        more={"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""},  # else it takes no directory
    )
    told = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert told["error_summary"] == []
    assert told["request_count"]["avg"] == REQUESTS
    if generates:
        assert told["output_sequence_length"]["avg"] > 0  # it counts the text's tokens itself
    if kind in ("chat", "completions"):  # it reads no usage of a response that ends by its limit
        assert told["total_usage_completion_tokens"]["avg"] == TOKENS
    metrics: dict[str, Any] = json.loads((tmp_path / "server_metrics_export.json").read_text())
    assert metrics["metrics"].keys() >= READ_BY_AIPERF
    counted(real_cluster, before, TOKENS if generates else 0)
