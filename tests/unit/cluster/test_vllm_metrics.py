"""vLLM's names: what its stock dashboards ask for is there, and says what happened."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig
from tests.unit.cluster.asgi import get, post
from tests.unit.cluster.fake_session import MODEL, FakeSession

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 50, "n": 2}
PROMPT_TOKENS = len("user: hi\nassistant: ")
ANSWER_TOKENS = len("Hello world")
SNAPSHOT: dict[str, Any] = {
    "queue_lengths": [2, 0, 1],
    "parked": 4,
    "workers": [
        {
            **{"worker": "p", "role": "prefill", "running": 1, "waiting": 2, "free_blocks": 9},
            "counters": {"steps": 2, "prompt_tokens_computed": 90, "tokens_generated": 1},
        },
        {
            **{"worker": "d", "role": "decode", "running": 5, "waiting": 0},
            **{"free_blocks": 25, "block_count": 100},
            "counters": {"steps": 5, "tokens_generated": 9},
        },
    ],
    "counters": {"preemptions": 6, "parks": 1},
}

DASHBOARD = (
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:kv_cache_usage_perc",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_success_total",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_max_num_generation_tokens_sum",
    "vllm:inter_token_latency_seconds_count",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_count",
    "vllm:request_time_per_output_token_seconds_sum",
    "vllm:time_to_first_token_seconds_count",
    "vllm:time_to_first_token_seconds_sum",
    "vllm:iteration_tokens_total_count",
)
"""What the panels of vLLM's own dashboards ask for: its Grafana dashboard, and those of performance
and of query statistics, as vLLM 0.33 has them."""

RAY_DASHBOARD = (
    "ray_vllm_generation_tokens_total",
    "ray_vllm_prompt_tokens_total",
    "ray_vllm_request_success_total",
    "ray_vllm_prefix_cache_queries_total",
    "ray_vllm_prefix_cache_hits_total",
    "ray_vllm_time_to_first_token_seconds_bucket",
    "ray_vllm_request_time_per_output_token_seconds_bucket",
    "ray_vllm_num_requests_running",
    "ray_vllm_num_requests_waiting",
    "ray_vllm_num_requests_swapped",
    "ray_vllm_kv_cache_usage_perc",
    "ray_vllm_request_queue_time_seconds_sum",
    "ray_vllm_request_prefill_time_seconds_sum",
    "ray_vllm_request_decode_time_seconds_sum",
)
"""Of Ray's Serve LLM dashboard."""


@pytest.fixture(scope="module")
def samples() -> dict[str, list[tuple[dict[str, str], float]]]:
    """By name, after one call with two choices."""

    async def snapshot() -> dict[str, Any]:
        return SNAPSHOT

    app = create_app(FakeSession(), config=GatewayConfig(), snapshot=snapshot)
    assert post(app, CHAT, ASK).status == 200
    text = get(app, "/metrics").body.decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_ray_s_panels_can_be_joined_by_worker(samples: Any) -> None:
    """Ray's dashboard multiplies each figure with Serve's counter of the same ``WorkerId``."""
    ((partner, ended),) = samples["ray_serve_deployment_request_counter_total"]
    assert ended == 2
    assert (partner["deployment"], partner["model_name"]) == ("gateway", MODEL)
    assert partner["replica"]
    for name in RAY_DASHBOARD:
        assert {labels["WorkerId"] for labels, _ in samples[name]} == {partner["WorkerId"]}


def value(samples: Any, name: str, **labels: str) -> float:
    matching = [v for own, v in samples[name] if labels.items() <= own.items()]
    assert len(matching) == 1, (name, samples[name])
    return float(matching[0])


@pytest.mark.parametrize("name", [*DASHBOARD, *RAY_DASHBOARD])
def test_what_a_stock_dashboard_asks_for_is_there(samples: Any, name: str) -> None:
    assert samples[name]
    for labels, _ in samples[name]:
        assert (labels["model_name"], labels["engine"]) == (MODEL, "0")
        assert name.startswith("vllm:") or labels["ReplicaId"]


@pytest.mark.parametrize("prefix", ["vllm:", "ray_vllm_"])
def test_the_figures_are_those_of_the_call(samples: Any, prefix: str) -> None:
    def of(name: str, **labels: str) -> float:
        return value(samples, prefix + name, **labels)

    assert of("request_success_total", finished_reason="stop") == 2
    assert of("prompt_tokens_total") == 2 * PROMPT_TOKENS
    assert of("generation_tokens_total") == 2 * ANSWER_TOKENS
    assert of("prefix_cache_hits_total") == 2 * 3
    assert of("time_to_first_token_seconds_count") == 1
    assert of("e2e_request_latency_seconds_count") == 2
    assert of("request_generation_tokens_sum") == 2 * ANSWER_TOKENS
    assert of("request_params_max_tokens_sum") == 2 * 50
    assert of("request_params_n_sum") == 2 * 2
    assert of("request_queue_time_seconds_sum") == pytest.approx(2 * 1500e-6)
    assert of("request_prefill_time_seconds_sum") == pytest.approx(2 * 0.02)
    assert of("inter_token_latency_seconds_count") == 2 * len(" world")


def test_the_cluster_s_figures_are_the_router_s(samples: Any) -> None:
    assert value(samples, "vllm:num_requests_running") == 6
    assert value(samples, "vllm:num_requests_waiting") == 5
    assert value(samples, "vllm:num_requests_swapped") == 4
    assert value(samples, "vllm:kv_cache_usage_perc") == 0.75
    assert value(samples, "vllm:num_preemptions_total") == 7
    assert value(samples, "vllm:iteration_tokens_total_count") == 7
    assert value(samples, "vllm:iteration_tokens_total_sum") == 100


def test_our_own_names_are_there_too(samples: Any) -> None:
    assert value(samples, "pdserve_queue_requests", level="0") == 2
    assert value(samples, "pdserve_generated_tokens_total") == 2 * ANSWER_TOKENS
