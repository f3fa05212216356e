"""Settings of a cluster: one tree, frozen and checked at once. Where they come from: ``settings``.

Every part is a frozen dataclass; a core gets the numbers it needs, not the tree. The router's part
is long, and stands in ``router_config``.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pdserve.access_config import AccessConfig
from pdserve.batch_config import BatchConfig
from pdserve.checked import Checked
from pdserve.router_config import RouterConfig
from pdserve.speculation_config import speculation_problems

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

DEFAULT_MODEL = "smollm2-135m-instruct"

ADAPTERS_MAX = 64
"""Of one model. All are in every worker's memory."""

Quantization = Literal["none", "file", "int8", "int4", "fp8"]
StoredAs = Literal["any", "gguf", "awq", "gptq", "fp8", "compressed-tensors"]
ReasoningStyle = Literal["deepseek_r1", "qwen3"]
ToolCallStyle = Literal["hermes", "llama3_json"]
SsdWrite = Literal["second_touch", "write_through", "on_evict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Checked):
    source: str = DEFAULT_MODEL
    """A directory, a GGUF file, a hub id, or the name of the default model."""

    revision: str | None = None
    """Of a hub id; None is the hub's default."""

    served_name: str | None = None
    """What clients say in ``model``; None is the last part of ``source``."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights, and of KV blocks without ``kv_dtype``. ``auto``: bfloat16, which every CPU and
    GPU here is fastest in."""

    quantization: Literal["auto", "none", "file", "int8", "int4", "fp8"] = "auto"
    """Of the matrices in memory. ``none``: all are of ``dtype``. ``file``: what the files hold
    quantised in a form that we compute with (``docs/weights.md``) stays as it is; the same weights,
    from less memory and sooner, and on a CPU the same tokens. ``auto``: that, on a CPU whose
    kernels read it. ``int8`` and ``int4`` round the weights of any file when they are read, in
    groups of 32, unless they have as many bits already; with ``int4`` embedding and output layer
    have 8 bits. ``fp8``, on a GPU: layers of 8-bit floating point (e4m3) with a scale for each
    output, and for each token of what they multiply; embedding and output layer stay of ``dtype``.
    All but ``none`` need bfloat16."""

    stored_as: StoredAs = "any"
    """How the files must hold their weights: others are refused. They say it themselves; this
    guards a command line against another model than it was written for."""

    kv_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """Of KV blocks. ``auto``: ``dtype``. ``int8`` and ``fp8`` (e4m3) keep 8 bits, with a scale for
    each token and head: half the memory, and half the bytes of a hand-off. ``fp8`` needs Triton's
    kernels. What they change about a model's answers: ``python -m bench.perplexity``."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "cpu", "triton"] = "auto"
    """``triton`` on a CPU runs the kernels in Triton's interpreter: for tests, thousands of times
    slower."""

    context_tokens: int | None = None
    """A smaller context than the model's own; None is the model's own."""

    block_tokens: int = 16
    """Tokens per KV block. Smaller blocks share more prefixes and cost more bookkeeping."""

    cuda_graphs: Literal["auto", "off"] = "auto"
    """``auto``: on a GPU, decode steps are recorded as CUDA graphs when they first occur, and
    replayed; models with experts excepted. ``off``: kernels are launched one by one; slower, and no
    memory is taken for graphs."""

    deterministic: bool = True
    """Take only paths whose result for a token does not depend on its batch."""

    adapters: Mapping[str, str] = field(default_factory=dict)
    """LoRA adapters: the name that clients say in ``model``, and the directory that PEFT saved it
    in. Every worker loads them all when it starts, and any of them may share a batch."""

    adapter_rank_max: int = 64
    """No adapter may have a higher rank: an adapter's memory is that of its matrices, ``rank``
    times the inputs and outputs of all that it adapts."""

    def _problems(self) -> Iterator[str]:
        yield from self._positive("block_tokens", "adapter_rank_max")
        if len(self.adapters) > ADAPTERS_MAX:
            yield f"adapters has {len(self.adapters)} entries, at most {ADAPTERS_MAX} are loaded"
        if "" in self.adapters:
            yield "adapters has one without a name; a request without a model is the base model's"
        stays = self.quantization in ("auto", "none")
        if not stays and self.dtype not in ("auto", "bfloat16"):
            yield (
                f"quantization is {self.quantization} and dtype {self.dtype}; quantised weights "
                "are computed with in bfloat16: take dtype auto, or quantization none"
            )
        if self.context_tokens is not None and self.context_tokens < 2:
            yield f"context_tokens is {self.context_tokens}, must be at least 2"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig(Checked):
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

    speculation: Literal["off", "prompt_lookup", "draft_model"] = "off"
    """Drafts, of which a step keeps those that it would have drawn: the same tokens in fewer steps.
    ``prompt_lookup``: what followed when a stream's last few tokens stood in its text before.
    ``draft_model``: what that model says. Left out where they are measured not to pay."""

    draft_model: str | None = None
    """A smaller one with the same tokeniser: directory, GGUF file or hub id. Each worker loads it
    beside its own, with as many KV blocks, outside of ``pool_bytes``."""

    step_ahead: bool = False
    """Launch a decode step before the tokens of the one before it are read, where all its streams
    are greedy and plain and nobody joins: the same tokens, and a GPU that need not wait for the
    host. A stream that ends unforeseen has been computed one token too far. Not with
    ``speculation``."""

    draft_tokens_max: int = 4
    """Of one stream in one step."""

    pool_blocks: int | None = None
    """KV blocks in a worker's own memory; None takes ``pool_bytes``."""

    pool_bytes: int = 768 * MiB
    """Of all processes of a worker together."""

    tensor_parallel: int = 1
    """Processes of one worker, each with a part of every layer and a GPU of its own: for models
    that do not fit into one, or are too slow on it. The model is cut into as many parts as the
    least common multiple of both pools' numbers says, and its key/value heads and feed-forward
    channels must be a multiple of that."""

    threads: int = 0
    """Compute threads of each process of a worker on a CPU; 0 is one per core, shared out."""

    nice: int = 0
    """Added to the process's niceness: decode before prefill where they share cores."""

    cpus: float = 0.0
    """What Ray reserves per process of a worker. 0 leaves placement to Ray's other rules."""

    gpus: float | None = None
    """Per process of a worker. None: one where the device is a GPU, else none."""

    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom Ray resources per worker: the way to tie a pool to certain hosts."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray labels that a worker's host must have, such as ``ray.io/accelerator-type: H100``; a value
    may be Ray's ``in(a,b)``, ``!a`` or ``!in(a,b)``."""

    @property
    def replicas_most(self) -> int:
        """How many there ever are."""
        return self.replicas if self.replicas_max is None else self.replicas_max

    def _problems(self) -> Iterator[str]:
        yield from self._positive(
            *("running_max", "chunk_tokens", "mixed_chunk_tokens", "draft_tokens_max"),
            *("pool_bytes", "tensor_parallel"),
        )
        if self.replicas < 0:
            yield f"replicas is {self.replicas}, must not be negative"
        if self.replicas_most < max(1, self.replicas):
            yield f"replicas_max is {self.replicas_max}, must be at least replicas and 1"
        if self.pool_blocks is not None and self.pool_blocks < 2:
            yield f"pool_blocks is {self.pool_blocks}, must be at least 2"
        yield from speculation_problems(
            self.speculation,
            self.draft_model,
            step_ahead=self.step_ahead,
            tensor_parallel=self.tensor_parallel,
        )
        if self.threads < 0:
            yield f"threads is {self.threads}, must not be negative"
        if self.cpus < 0:
            yield f"cpus is {self.cpus}, must not be negative"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig(Checked):
    """The KV store node of each host."""

    arena_bytes: int = 2 * GiB
    """Shared memory lent to the store on each host. Not grown, not shrunk."""

    verify: bool = True
    """Check every block's checksum before its bytes are used, once per process and generation."""

    offload: bool = True
    """Whether workers look for prefixes in the store and put what they compute there."""

    eviction: Literal["turns", "lru"] = "turns"
    """What goes first when the arena is full. ``turns``: blocks of conversations that are least
    likely to go on soon, by what was seen of others. ``lru``: what was used longest ago."""

    tenant_shares: Mapping[str, float] = field(default_factory=dict)
    """Weights of tenants (``user``): once the arena is full, who has more than its share gives way
    first, and nobody below its share loses blocks to another. ``"*"`` is each tenant that is not
    named, 1 where it is left out. Empty: all blocks compete alike, whosever they are."""

    codec: Literal["plain", "int8", "fp8"] = "plain"
    """How blocks are kept and handed over. ``plain``: as they were computed, so an answer does not
    depend on where its prefix lay. ``int8`` and ``fp8``: packed in 8 bits, half of bfloat16's
    bytes; what comes back is close, so answers may depend on what was cached. To halve blocks and
    keep that promise, take ``model.kv_dtype``."""

    hard_pin_ratio: float = 0.25
    """The most of the arena that blocks with a hard pin may take; more are refused."""

    ssd_directory: str | None = None
    """On a local disk of each host: what is used again is kept there too, comes back from there
    where that is sooner than computing, and is found after a restart. None: no disk is used."""

    ssd_bytes: int = 16 * GiB
    """The most that the blocks in ``ssd_directory`` take, per host and kind of block."""

    ssd_write: SsdWrite = "second_touch"
    """What goes to the disk. ``second_touch``: what a prompt finds again; most blocks are used
    once. ``write_through``: all that is stored, at once. ``on_evict``: what leaves memory; each
    eviction then takes a copy, and after ``kill -9`` what was in memory is lost."""

    redis_url: str | None = None
    """Where membership is kept; None: an embedded store on local disk."""

    master: Literal["auto", "on", "off"] = "auto"
    """Whether a master of the store, and a standby, know which host has which blocks: then a prefix
    is fetched from another host, what is read often gets a second home, and a host can be emptied.
    ``auto``: where the cluster has more than one host when it starts, which needs ``tcp``. Nothing
    waits for it: without a master prefixes of other hosts are computed again."""

    ticket_wait_ms: int = 10_000
    """How long a hand-off waits for slots at the other side before it gives up."""

    key_salt: str = field(default="", repr=False)
    """A secret of this cluster that goes into the keys of all blocks: who does not know it can
    neither make a key nor tell whether two tenants asked for the same. Another one finds nothing of
    what is stored. Empty: keys depend on tokens, model and tenant alone."""

    shared_memory: bool = True
    """False forbids shared memory even on one host: blocks then travel over sockets."""

    tls_authority: str | None = None
    """With ``tls_certificate`` and ``tls_key``, files in PEM format: blocks between hosts go over
    TLS, and each side must show a certificate that this authority signed. So do requests, tokens
    and load reports between gateways, router and workers. None: TCP is plain."""

    tls_certificate: str | None = None
    tls_key: str | None = None

    key_file: str | None = None
    """The cluster's secret, the same file on every host, readable by its owner alone: who reaches
    a store over TCP must show a token signed with it. None: whoever reaches the port may do all."""

    mooncake: bool = False
    """Blocks between hosts go through Mooncake's Transfer Engine, which has neither certificates
    nor permissions; for trusted networks. Needs ``pip install pdserve[mooncake]`` on every host."""

    def _problems(self) -> Iterator[str]:
        yield from self._positive("arena_bytes", "ssd_bytes", "ticket_wait_ms")
        for tenant, weight in self.tenant_shares.items():
            if not 0 < weight < math.inf:
                yield f"tenant_shares.{tenant} is {weight}, must be positive"
        if not 0 <= self.hard_pin_ratio <= 0.9:
            yield (
                f"hard_pin_ratio is {self.hard_pin_ratio}, must be in [0, 0.9]: hand-offs need "
                "room that nobody has pinned"
            )
        if self.mooncake and (self.tls_key is not None or self.key_file is not None):
            yield "mooncake: it goes with neither TLS nor key_file; leave out one of them"
        tls = ("tls_authority", "tls_certificate", "tls_key")
        missing = [name for name in tls if getattr(self, name) is None]
        if 0 < len(missing) < len(tls):
            yield f"{' and '.join(missing)}: TLS needs {', '.join(tls)}; give all three, or none"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig(Checked):
    host: str = "127.0.0.1"
    http_port: int = 8000
    """Of our own HTTP server; 0 takes a free one, -1 leaves HTTP to Serve's proxy."""

    grpc_port: int = 50051
    """0 takes a free one, -1 leaves gRPC out."""

    replicas: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray labels that the hosts of the gateways and of the router must have; as of the pools."""

    request_timeout_s: float = 600.0
    """Deadline of a request that names none."""

    body_bytes_max: int = 4 * MiB
    streams_max: int = 2048
    """Requests in flight at one gateway, for each model; one more is refused."""

    write_timeout_s: float = 30.0
    """A client that reads nothing for so long, while there is something for it, is cut off."""

    n_max: int = 16
    """Choices per call."""

    pooling: Literal["last", "mean"] = "last"
    """Which hidden states make an embedding: the ``last`` token's, or the ``mean`` of all."""

    api_keys: str | None = None
    """A file that ``pdserve keys`` writes: whoever asks must send one of its keys. None: everybody
    who reaches the gateway may use it."""

    access: AccessConfig = field(default_factory=AccessConfig)
    batches: BatchConfig = field(default_factory=BatchConfig)
    tls_certificate: str | None = None
    """HTTPS and gRPC over TLS, with this certificate and its key, both PEM files."""

    tls_key: str | None = None
    tls_client_authority: str | None = None
    """Clients must show a certificate of this authority."""

    tool_call_parser: ToolCallStyle = "hermes"
    """How the model writes its calls of tools: ``hermes`` within ``<tool_call>`` and
    ``</tool_call>`` (Qwen 2.5 and 3 too), ``llama3_json`` as a bare JSON object."""

    reasoning_parser: ReasoningStyle | None = None
    """Tell the model's thoughts apart from its answer in chat completions over HTTP: what stands
    between ``<think>`` and ``</think>``; with ``deepseek_r1`` all before ``</think>``, as those
    models may leave the first tag out. None: the text as it is."""

    responses_redis: str | None = None
    """Keep the responses of ``/v1/responses`` in this Redis, where every gateway finds them, as
    ``redis://host:6379/0``. None: in the memory of the gateway that made them."""

    responses_keep_s: float = 24 * 3600.0
    """How long they are kept at most."""

    responses_max: int = 10_000
    """How many are kept in memory; the oldest give way."""

    responses_bytes_max: int = 64 * MiB
    """Of all that are kept in memory; in Redis, of one."""

    def _problems(self) -> Iterator[str]:
        yield from self._positive(
            *("replicas", "request_timeout_s", "body_bytes_max", "streams_max", "write_timeout_s"),
            *("n_max", "responses_keep_s", "responses_max", "responses_bytes_max"),
        )
        if (self.tls_certificate is None) != (self.tls_key is None):
            yield "tls_certificate and tls_key belong together; set both or none"
        if self.tls_client_authority is not None and self.tls_certificate is None:
            yield "tls_client_authority needs tls_certificate and tls_key"
        for name in ("http_port", "grpc_port"):
            if not -1 <= getattr(self, name) <= 65535:
                yield f"{name} is {getattr(self, name)}, must be a port, 0 or -1"


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalingConfig(Checked):
    """When a pool grows or shrinks between ``replicas`` and ``replicas_max``. How these play
    together: ``docs/autoscaling.md``."""

    queue_age_ms: float = 1000.0
    """Prefill is late when its oldest request has waited longer."""

    ttft_ms: float | None = None
    """Prefill is late when the next first token is predicted later; None: ``router.ttft_slo_ms``,
    and without it only the queue's age counts."""

    tpot_ms: float | None = None
    """Decode wants so many workers that a token is predicted to take no longer; None:
    ``router.tpot_slo_ms``, and without it only room counts."""

    kv_pressure_ratio: float = 0.85
    """A decode pool wants more workers when this part of its blocks or places is in use."""

    prefill_busy_ratio: float = 0.8
    """A prefill pool wants more workers when the prompts that arrive keep it busy for this part of
    the time."""

    upscale_delay_s: float = 2.0
    downscale_delay_s: float = 15.0
    zero_delay_s: float = 300.0
    """Where ``replicas`` is 0, a pool sleeps after nobody has come for so long."""

    start_s: float = 10.0
    """How long a worker takes to start, until that has been measured. What will be worked off by
    then is no reason to start one."""

    load_memory_s: float = 30.0
    """Over which arriving work is averaged."""

    metrics_interval_s: float = 1.0
    """Between two decisions, and between two of a worker's reports to Serve."""

    dry_run: bool = False
    """Decide and explain, and leave the pools as they are."""

    def _problems(self) -> Iterator[str]:
        yield from self._positive(
            *("queue_age_ms", "upscale_delay_s", "downscale_delay_s", "zero_delay_s", "start_s"),
            *("load_memory_s", "metrics_interval_s"),
        )
        for name in ("ttft_ms", "tpot_ms"):
            if getattr(self, name) is not None:
                yield from self._positive(name)
        for name in ("kv_pressure_ratio", "prefill_busy_ratio"):
            if not 0 < getattr(self, name) <= 1:
                yield f"{name} is {getattr(self, name)}, must be in (0, 1]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig(Checked):
    """Everything that can be set."""

    model: ModelConfig = field(default_factory=ModelConfig)
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further models beside ``model``: the name that clients say, and the parts (``model``,
    ``prefill``, ``decode``, ``router``, ``autoscaling``) with what differs from the settings out
    here. Each has a router and pools of its own: ``docs/deployment.md``."""

    prefill: PoolConfig = field(default_factory=lambda: PoolConfig(nice=5))
    decode: PoolConfig = field(default_factory=PoolConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    autoscaling: AutoscalingConfig = field(default_factory=AutoscalingConfig)
    drain_timeout_s: float = 60.0
    """How long a worker that leaves may take to finish or hand over what it runs, and a gateway to
    finish it."""

    directory: str | None = None
    """Where sockets go on every host; None: ``pdserve-<uid>`` in the system's temporary directory.
    Keep it short: a socket's path has at most 107 bytes."""

    tcp: bool = True
    """Whether processes listen on their host's address too, for workers on other hosts."""

    @property
    def has_one_worker(self) -> bool:
        """Whether a single process computes everything, so that its threads have the cores to
        themselves."""
        aggregated = self.router.mode == "aggregated" and not self.models
        return aggregated and self.decode.replicas_most == self.decode.tensor_parallel == 1

    @property
    def tensor_parts(self) -> int:
        """How many parts the model is cut into, in every worker alike, so that all compute the same
        bits; a worker's processes have one each, or several."""
        if self.router.mode == "aggregated":
            return self.decode.tensor_parallel
        return math.lcm(self.prefill.tensor_parallel, self.decode.tensor_parallel)

    def _problems(self) -> Iterator[str]:
        yield from self._positive("drain_timeout_s")
        if self.model.adapters and self.tensor_parts > 1:
            yield (
                "model.adapters: a model over several processes takes none so far; leave it out, "
                "or set prefill.tensor_parallel and decode.tensor_parallel to 1"
            )
        if self.model.kv_dtype != "auto" and self.tensor_parts > 1:
            yield (
                f"model.kv_dtype is {self.model.kv_dtype}: a model over several processes keeps KV "
                "as it is so far; take auto, or set tensor_parallel to 1"
            )
        if self.model.kv_dtype != "auto" and self.store.codec != "plain":
            yield (
                f"store.codec is {self.store.codec}: with model.kv_dtype {self.model.kv_dtype} "
                "blocks have 8 bits already; leave one of the two out"
            )
        if self.decode.step_ahead and self.tensor_parts > 1:
            yield (
                "decode.step_ahead: a model over several processes has to know each token before "
                "the next step; set it to false, or tensor_parallel to 1"
            )
