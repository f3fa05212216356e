"""Settings of the router: how it orders, places, preempts and refuses."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pdserve.checked import Checked
from pdserve.messages import ServiceClass

QueuePolicy = Literal[
    "skip_join",
    "fcfs",
    "sjf_raw",
    "sjf",
    "sjf_aging",
    "edf",
    "hrrn",
    "lpm",
    "lpm_aging",
    "wspt",
    "gamma_boost",
    "mlfq",
    "fastserve",
    "fastserve_released",
    "srpt",
]

Placement = Literal[
    "late",
    "random",
    "round_robin",
    "least_requests",
    "least_work",
    "two_choices",
    "mooncake",
    "dynamo",
    "lmetric",
    "preble",
]

SERVICE_CLASSES = tuple(str(each) for each in ServiceClass)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig(Checked):
    mode: Literal["disaggregated", "aggregated", "auto"] = "disaggregated"
    """``aggregated``: every decode worker prefills too, and there is no prefill pool. ``auto``: a
    decode worker prefills a prompt itself, or a prefill worker keeps a short answer, where that is
    predicted to be sooner."""

    policy: QueuePolicy = "skip_join"
    """The order of waiting prompts. ``skip_join`` and ``fcfs`` are for use, the others for
    comparison."""

    placement: Placement = "late"
    """``late``: prompts wait in the router until a worker is free. The others choose a prefill
    worker on arrival; for comparison."""

    placement_stale_ms: float = 0.0
    """How old the loads are that a placement on arrival sees; for comparison."""

    topology_labels: str = ""
    """Ray labels of hosts that say where they are, coarse to fine, with commas between them, such
    as ``topology.kubernetes.io/zone,rack``: a hand-off goes to a near decode worker where the
    longer way would cost more than the other's shorter steps save. Empty: all are equally near.
    """

    far_ratio: float = 2.0
    """How much longer a hand-off takes for each of those levels at which two hosts differ."""

    decode_admission: Literal["eager", "peak"] = "eager"
    """When a decode worker has room for a stream: while the tokens there are fit, and what does not
    fit later is parked; or while what all are predicted to grow to fits."""

    decode_policy: Literal["gated", "fcfs", "mlfq", "oracle"] = "gated"
    """Whether a decode is parked for another. ``gated``: where the lengths of past answers say that
    it pays; ``fcfs``: never, unless memory runs out. The others are for comparison."""

    preemption: bool = True
    """Whether a running prefill yields at a chunk boundary to much shorter ones."""

    preempt_ratio: float | None = None
    """It yields only to one so many times shorter than what is left of it. None: 32 with the goal
    ``tail``, else 4."""

    level_count: int = 12
    first_quantum_ms: float = 25.0
    """Level 0 takes prefills predicted to last so long; each further level takes twice as much."""

    goal: Literal["mean", "balanced", "tail", "slo"] = "balanced"
    """What the boost is steered to: the least mean time to first token; the least mean with a 99th
    percentile like first come first served; no worse a tail at all; most requests within
    ``ttft_slo_ms``."""

    gamma_per_s: float | None = None
    """A fixed boost decay instead of a goal: towards 0 shortest first, towards infinity first come
    first served."""

    rescue_after_ms: float = 60_000.0
    """Who waited so long, and ``rescue_ratio`` times its own prefill, is rescued."""

    rescue_ratio: float = 20.0
    rescue_share: float = 0.1
    """Part of the prefill pool's time that the rescued may take from the others."""

    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of tenants under contention; 1 for who is not named."""

    ttft_slo_ms: float | None = None
    """Refuse a new request whose first token is predicted later; None refuses none for that."""

    ttft_max_ms: Mapping[str, float] = field(default_factory=dict)
    """By service class (``interactive``, ``standard``, ``batch``): refuse a new request whose first
    token is predicted later, and one that has waited so long for its dispatch. Who is not named
    has ``ttft_slo_ms`` and ``queue_age_max_ms``, batch work neither."""

    queue_age_max_ms: float | None = 120_000.0
    """Who waited so long for its first dispatch is refused, as is who is predicted to; batch work
    waits until its deadline. By default the longest hint to come back that clients heed. None: no
    bound."""

    tpot_slo_ms: float | None = None
    """Bind a request only where a token is predicted to take no longer; None: anywhere."""

    profile: str | None = None
    """What work costs here: the file that ``pdserve profile`` wrote, or the name of a shipped
    profile. None: learned as it goes."""

    waiting_max: int = 1024
    """Requests that may wait; one more is refused with a hint when to try again."""

    preempted_max: int = 2
    """A prefill preempted so often runs through; so does a decode parked so often."""

    attempts_max: int = 5
    """Attempts of one request before the client is told that workers keep dying."""

    prefill_tokens_per_s: int = 1500
    """The rate believed before a worker has reported one, without a profile."""

    worker_silence_ms: int = 3_000
    """A worker that says nothing for so long is taken for lost. It reports twice a second."""

    stand_in: bool = True
    """In ``disaggregated`` mode, when the last worker of a pool dies, those of the other do its
    work too, until it has another one."""

    replicas: int = 1
    """Router processes, of which one leads. With a second one, another takes over within a moment
    of the first one's death; with one, requests wait until it has been started again."""

    router_silence_ms: int = 3_000
    """A router that says nothing for so long is taken for lost, though its connections stand."""

    @property
    def counts_tokens(self) -> bool:
        """Whether anything depends on how many tokens running streams have."""
        return self.decode_policy != "fcfs" or self.decode_admission == "peak"

    def _problems(self) -> Iterator[str]:
        yield from self._positive(
            "level_count",
            "first_quantum_ms",
            "rescue_after_ms",
            "rescue_ratio",
            "waiting_max",
            "attempts_max",
            "prefill_tokens_per_s",
            "worker_silence_ms",
            "replicas",
            "router_silence_ms",
        )
        if self.far_ratio < 1:
            yield f"far_ratio is {self.far_ratio}, must be at least 1"
        for name in (
            *("gamma_per_s", "preempt_ratio"),
            *("ttft_slo_ms", "tpot_slo_ms", "queue_age_max_ms"),
        ):
            if getattr(self, name) is not None:
                yield from self._positive(name)
        if self.level_count > 16:
            yield f"level_count is {self.level_count}, must be at most 16"
        if not 0 < self.rescue_share <= 1:
            yield f"rescue_share is {self.rescue_share}, must be in (0, 1]"
        if self.goal == "slo" and self.ttft_slo_ms is None:
            yield "goal is slo, which needs ttft_slo_ms"
        for service_class, limit_ms in self.ttft_max_ms.items():
            if service_class not in SERVICE_CLASSES:
                known = ", ".join(SERVICE_CLASSES)
                yield f"ttft_max_ms has {service_class!r}, which is none of {known}"
            if not limit_ms > 0:
                yield f"ttft_max_ms.{service_class} is {limit_ms}, must be positive"
        for tenant, weight in self.tenant_weights.items():
            if not weight > 0:
                yield f"tenant_weights.{tenant} is {weight}, must be positive"
