"""Settings of a cluster: one tree, frozen and checked at once. Where they come from: ``settings``.

Every part is a frozen dataclass; a core gets the numbers it needs, not the tree.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pdserve.errors import ConfigError

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

DEFAULT_MODEL = "smollm2-135m-instruct"


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


Quantization = Literal["none", "file", "int8", "int4"]

ReasoningStyle = Literal["deepseek_r1", "qwen3"]


class _Checked:
    """Collects what is wrong with a part and raises it all at once."""

    __slots__ = ()

    def _problems(self) -> Iterator[str]:
        yield from ()

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(problems))

    def _positive(self, *names: str) -> Iterator[str]:
        for name in names:
            value = getattr(self, name)
            if not value > 0:  # NaN is not positive either
                yield f"{name} is {value}, must be positive"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(_Checked):
    source: str = DEFAULT_MODEL
    """A directory, a GGUF file, a hub id, or the name of the default model."""

    revision: str | None = None
    """Of a hub id; None is the hub's default."""

    served_name: str | None = None
    """What clients say in ``model``; None is the last part of ``source``."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and KV blocks. ``auto``: bfloat16, which every CPU and GPU here is fastest in."""

    quantization: Literal["auto", "none", "file", "int8", "int4"] = "auto"
    """Of the matrices in a CPU's memory. ``none``: all are of ``dtype``. ``file``: what a GGUF file
    holds as Q4_0, Q4_1 or Q8_0 stays as it is; the same tokens, from less memory and sooner.
    ``auto``: that, where the kernels of the machine read it. ``int8`` and ``int4`` round the
    weights of any file when they are read, in groups of 32; with ``int4`` embedding and output
    layer have 8 bits. All but ``none`` need bfloat16."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "cpu", "triton"] = "auto"
    """``triton`` on a CPU runs the kernels in Triton's interpreter: for tests, thousands of times
    slower."""

    context_tokens: int | None = None
    """A smaller context than the model's own; None is the model's own."""

    block_tokens: int = 16
    """Tokens per KV block. Smaller blocks share more prefixes and cost more bookkeeping."""

    deterministic: bool = True
    """Take only paths whose result for a token does not depend on its batch."""

    def _problems(self) -> Iterator[str]:
        yield from self._positive("block_tokens")
        stays = self.quantization in ("auto", "none")
        if not stays and self.dtype not in ("auto", "bfloat16"):
            yield (
                f"quantization is {self.quantization} and dtype {self.dtype}; quantised weights "
                "are computed with in bfloat16: take dtype auto, or quantization none"
            )
        if self.context_tokens is not None and self.context_tokens < 2:
            yield f"context_tokens is {self.context_tokens}, must be at least 2"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig(_Checked):
    """One pool of workers."""

    replicas: int = 1
    replicas_max: int | None = None
    """The pool scales between ``replicas`` and this; None: it does not scale."""

    running_max: int = 64
    """Sequences in one batch."""

    chunk_tokens: int = 256
    """Prompt tokens computed between two moments at which a prefill can be preempted. A chunk's
    blocks travel while the next one is computed, so smaller chunks hand over sooner."""

    mixed_chunk_tokens: int = 80
    """Prompt tokens in a step that also decodes, where one worker does both: what a stream's next
    token waits for. So many at the beginning of a prompt, and as much work later on, where a token
    attends to more."""

    speculation: Literal["off", "prompt_lookup"] = "off"
    """``prompt_lookup``: a step also computes what followed when a stream's last few tokens stood
    in its text before, as drafts, and keeps those that are what it would have drawn: the same
    tokens in fewer steps where answers repeat their prompt or themselves. Drafts are left out where
    they are measured not to pay."""

    draft_tokens_max: int = 4
    """Of one stream in one step."""

    pool_blocks: int | None = None
    """KV blocks in a worker's own memory; None takes ``pool_bytes``."""

    pool_bytes: int = 768 * MiB
    threads: int = 0
    """Compute threads of a worker on a CPU; 0 is one per core."""

    nice: int = 0
    """Added to the process's niceness: decode before prefill where they share cores."""

    cpus: float = 0.0
    """What Ray reserves per worker. 0 leaves placement to Ray's other rules."""

    gpus: float | None = None
    """None: one where the device is a GPU, else none."""

    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom Ray resources per worker: the way to tie a pool to certain hosts."""

    @property
    def replicas_most(self) -> int:
        """How many there ever are."""
        return self.replicas if self.replicas_max is None else self.replicas_max

    def _problems(self) -> Iterator[str]:
        yield from self._positive(
            "running_max", "chunk_tokens", "mixed_chunk_tokens", "draft_tokens_max", "pool_bytes"
        )
        if self.replicas < 0:
            yield f"replicas is {self.replicas}, must not be negative"
        if self.replicas_most < max(1, self.replicas):
            yield f"replicas_max is {self.replicas_max}, must be at least replicas and 1"
        if self.pool_blocks is not None and self.pool_blocks < 2:
            yield f"pool_blocks is {self.pool_blocks}, must be at least 2"
        if self.threads < 0:
            yield f"threads is {self.threads}, must not be negative"
        if self.cpus < 0:
            yield f"cpus is {self.cpus}, must not be negative"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig(_Checked):
    """The KV store node of each host."""

    arena_bytes: int = 2 * GiB
    """Shared memory lent to the store on each host. Not grown, not shrunk."""

    verify: bool = True
    """Check every block's checksum before its bytes are used, once per process and generation."""

    offload: bool = True
    """Whether workers look for prefixes in the store and put what they compute there."""

    redis_url: str | None = None
    """Where membership is kept; None: an embedded store on local disk."""

    ticket_wait_ms: int = 10_000
    """How long a hand-off waits for slots at the other side before it gives up."""

    shared_memory: bool = True
    """False forbids shared memory even on one host: blocks then travel over sockets."""

    def _problems(self) -> Iterator[str]:
        yield from self._positive("arena_bytes", "ticket_wait_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig(_Checked):
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

    decode_admission: Literal["eager", "peak"] = "eager"
    """When a decode worker has room for a stream: while the tokens there are fit, and what does not
    fit later is parked; or while what all are predicted to grow to fits."""

    decode_policy: Literal["gated", "fcfs", "mlfq", "oracle"] = "gated"
    """Whether a decode is parked for another. ``gated``: where the lengths of past answers say that
    it pays; ``fcfs``: never, unless memory runs out. The others are for comparison."""

    preemption: bool = True
    """Whether a running prefill yields at a chunk boundary to much shorter ones."""

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

    worker_silence_ms: int = 5_000
    """A worker that says nothing for so long is taken for lost."""

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
        )
        for name in ("gamma_per_s", "ttft_slo_ms", "tpot_slo_ms"):
            if getattr(self, name) is not None:
                yield from self._positive(name)
        if self.level_count > 16:
            yield f"level_count is {self.level_count}, must be at most 16"
        if not 0 < self.rescue_share <= 1:
            yield f"rescue_share is {self.rescue_share}, must be in (0, 1]"
        if self.goal == "slo" and self.ttft_slo_ms is None:
            yield "goal is slo, which needs ttft_slo_ms"
        for tenant, weight in self.tenant_weights.items():
            if not weight > 0:
                yield f"tenant_weights.{tenant} is {weight}, must be positive"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig(_Checked):
    host: str = "127.0.0.1"
    http_port: int = 8000
    """Of our own HTTP server; 0 takes a free one, -1 leaves HTTP to Serve's proxy."""

    grpc_port: int = 50051
    """0 takes a free one, -1 leaves gRPC out."""

    replicas: int = 1
    request_timeout_s: float = 600.0
    """Deadline of a request that names none."""

    body_bytes_max: int = 4 * MiB
    streams_max: int = 2048
    """Requests in flight at one gateway; one more is refused."""

    n_max: int = 16
    """Choices per call."""

    reasoning_parser: ReasoningStyle | None = None
    """Tell the model's thoughts apart from its answer in chat completions over HTTP: what stands
    between ``<think>`` and ``</think>``; with ``deepseek_r1`` all before ``</think>``, as those
    models may leave the first tag out. None: the text as it is."""

    def _problems(self) -> Iterator[str]:
        yield from self._positive(
            "replicas", "request_timeout_s", "body_bytes_max", "streams_max", "n_max"
        )
        for name in ("http_port", "grpc_port"):
            if not -1 <= getattr(self, name) <= 65535:
                yield f"{name} is {getattr(self, name)}, must be a port, 0 or -1"


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalingConfig(_Checked):
    """When a pool grows or shrinks between ``replicas`` and ``replicas_max``."""

    queue_age_ms: float = 1000.0
    """A prefill pool wants one more worker when its oldest request waited longer."""

    kv_pressure_ratio: float = 0.85
    """A decode pool wants one more worker when this part of its blocks is in use."""

    upscale_delay_s: float = 2.0
    downscale_delay_s: float = 15.0
    metrics_interval_s: float = 1.0

    def _problems(self) -> Iterator[str]:
        yield from self._positive(
            "queue_age_ms", "upscale_delay_s", "downscale_delay_s", "metrics_interval_s"
        )
        if not 0 < self.kv_pressure_ratio <= 1:
            yield f"kv_pressure_ratio is {self.kv_pressure_ratio}, must be in (0, 1]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig(_Checked):
    """Everything that can be set."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prefill: PoolConfig = field(default_factory=lambda: PoolConfig(nice=5))
    decode: PoolConfig = field(default_factory=PoolConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    autoscaling: AutoscalingConfig = field(default_factory=AutoscalingConfig)
    drain_timeout_s: float = 60.0
    """How long a worker that leaves may take to finish or hand over what it runs."""

    directory: str | None = None
    """Where sockets go on every host; None: ``pdserve-<uid>`` in the system's temporary directory.
    Keep it short: a socket's path has at most 107 bytes."""

    tcp: bool = True
    """Whether processes listen on their host's address too, for workers on other hosts."""

    @property
    def has_one_worker(self) -> bool:
        """Whether a single worker computes everything, so that its threads have the cores to
        themselves."""
        return self.router.mode == "aggregated" and self.decode.replicas_most == 1

    def _problems(self) -> Iterator[str]:
        yield from self._positive("drain_timeout_s")
