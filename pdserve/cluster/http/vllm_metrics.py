"""The cluster's figures under the names that vLLM's dashboards and autoscalers ask for.

``vllm:*`` as vLLM's server has them, and the same as ``ray_vllm_*``, as they are called where Ray
Serve runs vLLM. Names, labels and buckets are those of vLLM 0.33; what we have no figure for is
left out. One gateway says what passed through itself, and what the router knows of the cluster.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pdserve.cluster.gateway.calls import Call
from pdserve.cluster.http.tallies import Tally, TallyCounter, TallyHistogram
from pdserve.messages import Timing

LABELS = ("model_name", "engine")
ENGINE = "0"

TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
COUNTS = (1, 2, 5, 10, 20)

US_PER_S = 1_000_000


class VllmMetrics:
    """What passed through one gateway."""

    def __init__(self, model: str, context_tokens: int) -> None:
        self._registry = CollectorRegistry()
        self.model = model
        lengths = _one_two_five(context_tokens)
        self._ttft = self._histogram("time_to_first_token_seconds", TTFT_S)
        self._inter_token = self._histogram("inter_token_latency_seconds", TOKEN_S)
        self._per_token = self._histogram("request_time_per_output_token_seconds", TOKEN_S)
        self._end_to_end = self._histogram("e2e_request_latency_seconds", REQUEST_S)
        self._queue = self._histogram("request_queue_time_seconds", REQUEST_S)
        self._inference = self._histogram("request_inference_time_seconds", REQUEST_S)
        self._prefill = self._histogram("request_prefill_time_seconds", REQUEST_S)
        self._decode = self._histogram("request_decode_time_seconds", REQUEST_S)
        self._prompt_length = self._histogram("request_prompt_tokens", lengths)
        self._answer_length = self._histogram("request_generation_tokens", lengths)
        self._longest_answer = self._histogram("request_max_num_generation_tokens", lengths)
        self._computed = self._histogram("request_prefill_kv_computed_tokens", lengths)
        self._n = self._histogram("request_params_n", COUNTS)
        self._max_tokens = self._histogram("request_params_max_tokens", lengths)
        self._prompt = self._counter("prompt_tokens")
        self._cached = self._counter("prompt_tokens_cached")
        self._queries = self._counter("prefix_cache_queries")
        self._hits = self._counter("prefix_cache_hits")
        self._generated = self._counter("generation_tokens")
        self._success = Counter(
            "vllm:request_success",
            "Choices that ended, by reason",
            (*LABELS, "finished_reason"),
            registry=self._registry,
        )

    def first_token(self, elapsed_s: float) -> None:
        self._ttft.observe(elapsed_s)

    def tokens(self, count: int, gap_s: float | None) -> None:
        """``gap_s``: for each of them, since the one before; None: they are the first."""
        self._generated.inc(count)
        if gap_s is not None:
            self._inter_token.observe(gap_s, count)

    def choice_ended(
        self,
        call: Call,
        timing: Timing | None,
        reason: str,
        *,
        token_count: int,
        first_s: float,
        last_s: float,
    ) -> None:
        """Seconds are since the call's arrival."""
        self._success.labels(self.model, ENGINE, reason).inc()
        self._end_to_end.observe(last_s)
        self._decode.observe(last_s - first_s)
        if token_count > 1:
            self._per_token.observe((last_s - first_s) / (token_count - 1))
        self._answer_length.observe(token_count)
        self._longest_answer.observe(token_count)
        self._prompt_length.observe(len(call.prompt))
        self._n.observe(call.n)
        self._max_tokens.observe(call.stop.max_tokens)
        cached = 0 if timing is None else timing.cached_tokens
        self._prompt.inc(len(call.prompt))
        self._queries.inc(len(call.prompt))
        self._cached.inc(cached)
        self._hits.inc(cached)
        self._computed.observe(len(call.prompt) - cached)
        if timing is not None:
            self._queue.observe(timing.queued_us / US_PER_S)
            self._prefill.observe(timing.prefill_us / US_PER_S)
            self._inference.observe(max(0.0, last_s - timing.queued_us / US_PER_S))

    def render(self, snapshot: Mapping[str, Any]) -> str:
        """The text format: each family under both names."""
        cluster = CollectorRegistry()
        cluster.register(_Cluster(self.model, snapshot))
        text = (generate_latest(self._registry) + generate_latest(cluster)).decode()
        return text + _as_ray_names(text) + self._serve_counter()

    def _serve_counter(self) -> str:
        """Ray's dashboard joins each of its panels with this metric of Serve's, by ``WorkerId``,
        for the names of deployment and replica. Calls do not go through Serve here, so it would
        count none."""
        families = self._success.collect()
        ended = sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name.endswith("_total")
        )
        family = CounterMetricFamily(
            "ray_serve_deployment_request_counter",
            "As Ray Serve's, of choices that ended",
            labels=("model_name", "deployment", "replica", "WorkerId"),
        )
        who = str(os.getpid())
        family.add_metric((self.model, "gateway", who, who), ended)
        registry = CollectorRegistry()
        registry.register(_Just(family))
        return generate_latest(registry).decode()

    def _histogram(self, name: str, buckets: Sequence[float]) -> Tally:
        family = TallyHistogram(f"vllm:{name}", _help(name), LABELS, buckets=buckets)
        self._registry.register(family)
        return family.labels(self.model, ENGINE)

    def _counter(self, name: str) -> TallyCounter:
        counter = TallyCounter(f"vllm:{name}", _help(name), LABELS, (self.model, ENGINE))
        self._registry.register(counter)
        return counter


class _Just(Collector):
    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


class _Cluster(Collector):
    """What a snapshot of the router says; a part that it lacks is left out."""

    def __init__(self, model: str, snapshot: Mapping[str, Any]) -> None:
        self._model = model
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        workers = self._snapshot.get("workers")
        if workers is None:
            return
        queued = sum(self._snapshot.get("queue_lengths", ()))
        decoding = [worker for worker in workers if worker.get("role") != "prefill"]
        blocks = sum(worker.get("block_count", 0) for worker in decoding)
        free = sum(worker.get("free_blocks", 0) for worker in decoding)
        yield self._gauge(
            "num_requests_running", sum(worker.get("running", 0) for worker in workers)
        )
        yield self._gauge(
            "num_requests_waiting", queued + sum(worker.get("waiting", 0) for worker in workers)
        )
        yield self._gauge("num_requests_swapped", self._snapshot.get("parked", 0))
        yield self._gauge("kv_cache_usage_perc", (blocks - free) / blocks if blocks else 0.0)
        counters = self._snapshot.get("counters", {})
        preempted = counters.get("preemptions", 0) + counters.get("parks", 0)
        yield self._counter("num_preemptions", preempted)
        yield self._steps([worker.get("counters", {}) for worker in workers])

    def _steps(self, workers: Sequence[Mapping[str, int]]) -> Metric:
        """vLLM's tokens per step. Workers count steps and tokens, so it has the one bucket that
        every histogram has; panels ask for steps and for the mean."""
        steps = sum(counters.get("steps", 0) for counters in workers)
        tokens = sum(
            counters.get(name, 0)
            for counters in workers
            for name in ("tokens_generated", "prompt_tokens_computed")
        )
        name = "iteration_tokens_total"
        family = HistogramMetricFamily(f"vllm:{name}", _help(name), labels=LABELS)
        family.add_metric((self._model, ENGINE), [("+Inf", steps)], tokens)
        return family

    def _counter(self, name: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", _help(name), labels=LABELS)
        family.add_metric((self._model, ENGINE), value)
        return family

    def _gauge(self, name: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", _help(name), labels=LABELS)
        family.add_metric((self._model, ENGINE), value)
        return family


def _as_ray_names(text: str) -> str:
    """``vllm:x{…} 1`` as ``ray_vllm_x{…,ReplicaId="…",WorkerId="…"} 1``: Ray's exporter knows no
    colon, and says which replica it was, and in which of its worker processes."""
    replica = f',ReplicaId="{os.getpid()}",WorkerId="{os.getpid()}"}}'
    lines = []
    for line in text.splitlines():
        renamed = line.replace("vllm:", "ray_vllm_", 1)
        if not line.startswith("#"):
            renamed = replica.join(renamed.rsplit("}", 1))
        lines.append(renamed)
    return "\n".join(lines) + "\n"


def _one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, … up to ``limit``."""
    steps = (digit * 10**power for power in range(len(str(limit))) for digit in (1, 2, 5))
    return tuple(step for step in steps if step <= limit)


def _help(name: str) -> str:
    return f"As vLLM's {name}"
