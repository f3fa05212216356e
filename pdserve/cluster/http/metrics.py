"""What the two fronts count, for Prometheus.

``follow`` wraps one client call from its arrival to its last byte and knows how it ended. Time to
first token and the gaps between tokens are taken where pieces arrive here: what the client sees,
less its network. Counters of the rest of the cluster come through ``snapshot``.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from pdserve.clock import unix_ms
from pdserve.cluster.gateway.calls import Call, Piece
from pdserve.cluster.gateway.models import by_model
from pdserve.cluster.gateway.quotas import Ledger
from pdserve.cluster.http.exposition import joined
from pdserve.cluster.http.processes import own_process, processes_in, text_of
from pdserve.cluster.http.recent import Ended, Recent
from pdserve.cluster.http.tallies import Tally, TallyCounter, TallyHistogram
from pdserve.cluster.http.vllm_metrics import VllmMetrics
from pdserve.messages import Timing

SHORT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
LONG_BUCKETS = (
    *(0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 320, 640),
)

US_PER_S = 1_000_000

DISCONNECTED = "disconnected"
"""The status of a call whose client went away."""


class FrontMetrics:
    """One registry; both fronts of a gateway may share it."""

    def __init__(self, vllm: VllmMetrics | None = None) -> None:
        """``vllm``: tell everything in vLLM's words as well; of the first model."""
        self._vllm = {} if vllm is None else {"": vllm}
        self.recent = Recent()
        self.ledger: Ledger | None = None
        """Of tenants' quotas, where there are any: it is told of every token."""

        self.registry = registry = CollectorRegistry()
        labels = ("front", "operation")
        self._requests = Counter(
            "pdserve_requests_total",
            "Client calls that ended, by status",
            (*labels, "status"),
            registry=registry,
        )
        self._retried = Counter(
            "pdserve_retried_requests_total",
            "Client calls that ended, and of which the client said it had asked before",
            (*labels, "status"),
            registry=registry,
        )
        self._in_flight = Gauge(
            "pdserve_requests_in_flight", "Client calls under way", labels, registry=registry
        )
        self._ttft = TallyHistogram(
            "pdserve_ttft_seconds",
            "From a call's arrival to its first token",
            labels,
            buckets=LONG_BUCKETS,
        )
        registry.register(self._ttft)
        self._inter_token = TallyHistogram(
            "pdserve_inter_token_seconds",
            "Between two tokens of one choice",
            labels,
            buckets=SHORT_BUCKETS,
        )
        registry.register(self._inter_token)
        self._end_to_end = TallyHistogram(
            "pdserve_request_seconds",
            "From a call's arrival to its end, failed ones included",
            labels,
            buckets=LONG_BUCKETS,
        )
        registry.register(self._end_to_end)
        self._prompt_tokens = TallyCounter(
            "pdserve_prompt_tokens", "Prompt tokens of answered calls"
        )
        registry.register(self._prompt_tokens)
        self._generated_tokens = TallyCounter(
            "pdserve_generated_tokens", "Tokens that were generated"
        )
        registry.register(self._generated_tokens)
        self._cached_tokens = TallyCounter(
            "pdserve_cached_prompt_tokens", "Prompt tokens that no worker had to compute"
        )
        registry.register(self._cached_tokens)

    @contextmanager
    def follow(self, front: str, operation: str) -> Iterator["Meter"]:
        """Counts one call; the caller sets the meter's ``status`` once it knows it."""
        in_flight = self._in_flight.labels(front, operation)
        meter = Meter(
            self._ttft.labels(front, operation),
            self._inter_token.labels(front, operation),
            self._generated_tokens,
            self._vllm_of,
            self.ledger,
        )
        in_flight.inc()
        try:
            yield meter
        finally:
            in_flight.dec()
            self._requests.labels(front, operation, meter.status).inc()
            if any(call.retries for call in meter.calls):
                self._retried.labels(front, operation, meter.status).inc()
            self._end_to_end.labels(front, operation).observe(meter.elapsed_s())
            self._prompt_tokens.inc(meter.prompt_tokens)
            self._cached_tokens.inc(meter.cached_tokens)
            if meter.calls:
                self.recent.add(meter.ended(front, operation))

    def add_model(self, vllm: VllmMetrics) -> None:
        """One more model; its figures are told beside those of the first."""
        self._vllm[vllm.model] = vllm

    def remove_model(self, name: str) -> None:
        self._vllm.pop(name, None)

    def _vllm_of(self, model: str) -> VllmMetrics | None:
        return self._vllm.get(model) or self._vllm.get("")

    @property
    def in_flight(self) -> int:
        """Client calls under way."""
        samples = (s for family in self._in_flight.collect() for s in family.samples)
        return round(sum(sample.value for sample in samples))

    def render(self, snapshot: Mapping[str, Any] | None = None) -> bytes:
        """The text format, with the router's snapshot where there is one."""
        own = {} if snapshot is None else by_model(snapshot)
        text = generate_latest(self.registry).decode()
        if self._vllm:
            told = snapshot or {}
            text += joined(
                [
                    each.render(own.get(each.model, {}) if own else told)
                    for each in self._vllm.values()
                ]
            )
        others = () if snapshot is None else processes_in(snapshot)
        text += text_of([own_process(), *others])
        if own:
            text += joined([_snapshot_text(each, model=name) for name, each in own.items()])
        elif snapshot is not None:
            text += _snapshot_text(snapshot)
        return text.encode()


@dataclass(slots=True)
class _Told:
    """One choice so far."""

    first_s: float
    last_s: float
    token_count: int = 0
    timing: Timing | None = None


class Meter:
    """One call's figures while it runs."""

    def __init__(
        self,
        ttft: Tally,
        inter_token: Tally,
        generated: TallyCounter,
        vllm_of: Callable[[str], VllmMetrics | None],
        ledger: Ledger | None = None,
    ) -> None:
        self._ledger = ledger
        self.status = "internal"  # stays where a bug ends the call
        self._calls: Sequence[Call] = ()

        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.first_token_s: float | None = None
        self._begun_s = time.perf_counter()
        self._ttft = ttft
        self._inter_token = inter_token
        self._generated = generated
        self._vllm_of = vllm_of
        self._vllm = vllm_of("")
        self._told: dict[tuple[int, int], _Told] = {}  # per prompt and choice

    @property
    def calls(self) -> Sequence[Call]:
        """What was asked for, as soon as that is known: all of one model."""
        return self._calls

    @calls.setter
    def calls(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        self._vllm = self._vllm_of(calls[0].model)

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._begun_s

    def ended(self, front: str, operation: str) -> Ended:
        """The call as the console shows it. A batch of prompts is told by its first one."""
        call = self.calls[0]
        first = self._told.get((0, 0))
        return Ended(
            call=call.call,
            model=call.adapter or call.model,
            front=front,
            operation=operation,
            tenant=call.tenant,
            status=self.status,
            ended_unix_ms=unix_ms(),
            prompt_tokens=sum(len(call.prompt) for call in self.calls),
            generated_tokens=sum(told.token_count for told in self._told.values()),
            first_token_us=round((self.first_token_s or 0.0) * US_PER_S),
            total_us=round(self.elapsed_s() * US_PER_S),
            timing=None if first is None else first.timing,
        )

    def note(self, batch: Iterable[tuple[int, Piece]]) -> None:
        now_s = self.elapsed_s()
        for call, piece in batch:
            told = self._told.get((call, piece.choice))
            if self._ledger is not None and self.calls:
                asked = self.calls[call]
                # Choices share the prompt: the first one to say something stands for it.
                is_new = all((call, choice) not in self._told for choice in range(asked.n))
                tokens = len(piece.tokens) + (len(asked.prompt) if is_new else 0)
                self._ledger.spend(asked.tenant, tokens, unix_ms())
            if told is None:
                told = self._told[call, piece.choice] = _Told(now_s, now_s)
            if piece.tokens:
                self._note_tokens(told, len(piece.tokens), now_s)
            told.timing = piece.timing or told.timing
            if piece.finish is not None and self._vllm is not None and self.calls:
                self._vllm.choice_ended(
                    self.calls[call],
                    told.timing,
                    str(piece.finish),
                    token_count=told.token_count,
                    first_s=told.first_s,
                    last_s=told.last_s,
                )

    def _note_tokens(self, told: _Told, count: int, now_s: float) -> None:
        gap_s = (now_s - told.last_s) / count if told.token_count else None
        if gap_s is None:
            told.first_s = now_s
        else:
            self._inter_token.observe(gap_s, count)
        told.last_s = now_s
        told.token_count += count
        self._generated.inc(count)
        if self._vllm is not None:
            self._vllm.tokens(count, gap_s)
        if self.first_token_s is None:
            self.first_token_s = now_s
            self._ttft.observe(now_s)
            if self._vllm is not None:
                self._vllm.first_token(now_s)


def _snapshot_text(snapshot: Mapping[str, Any], *, model: str = "") -> str:
    """The router's figures; a part that the snapshot lacks is left out.

    ``model``: goes into every sample's labels, where there are several.
    """
    families: dict[str, list[tuple[str, float]]] = {}
    whose = f'model_name="{_escaped(model)}"' if model else ""

    def add(name: str, labels: str, value: float) -> None:
        all_labels = ",".join(filter(None, (whose, labels)))
        families.setdefault(f"pdserve_{name}", []).append(
            (f"{{{all_labels}}}" if all_labels else "", value)
        )

    for level, count in enumerate(snapshot.get("queue_lengths", ())):
        add("queue_requests", f'level="{level}"', count)
    if "oldest_wait_ms" in snapshot:
        add("queue_oldest_wait_seconds", "", snapshot["oldest_wait_ms"] / 1000)
    if "parked" in snapshot:
        add("parked_requests", "", snapshot["parked"])
    for worker in snapshot.get("workers", ()):
        labels = f'worker="{worker["worker"]}",role="{worker["role"]}"'
        for name in ("running", "waiting", "free_blocks", "block_count"):
            if name in worker:
                add(f"worker_{name}", labels, worker[name])
    for name, value in sorted(snapshot.get("counters", {}).items()):
        add(f"cluster_{name}_total", "", value)
    return "".join(
        f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}\n"
        + "".join(f"{name}{labels} {float(value)}\n" for labels, value in samples)
        for name, samples in families.items()
    )


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
