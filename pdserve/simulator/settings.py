"""What is simulated: the cluster, its costs, and what goes wrong in it."""

from dataclasses import dataclass, field

from pdserve.config import SsdWrite
from pdserve.messages import Role
from pdserve.router.costs import CostModel, DecodeCost, MoveCost, PrefillCost, StepCost
from pdserve.router.scaling import Plan
from pdserve.router_config import RouterConfig

UNLIMITED_BLOCKS = 1 << 40

STUDY_COSTS = CostModel(
    name="study",
    origin="believed",
    prefill=PrefillCost(fixed_s=0.015, token_s=8e-5, pair_s=1e-9),
    decode=DecodeCost(
        small=StepCost(fixed_s=0.012, context_s=2.4e-8, sequence_s=5e-5),
        large=StepCost(fixed_s=0.012, context_s=2.4e-8, sequence_s=5e-5),
    ),
    handoff=MoveCost(fixed_s=0.0005, bytes_per_s=50e9),
    host=MoveCost(fixed_s=0.0002, bytes_per_s=200e9),
    ssd=MoveCost(fixed_s=0.001, bytes_per_s=20e9),
    kv_token_bytes=327_680,
)
"""A model of 70 billion parameters on eight large GPUs, assumed rather than measured: for studies
in which the ratio of two policies counts, and not the seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """The worker at this place of its pool dies, with everything it holds."""

    role: Role
    index: int
    at_ns: int
    back_after_ns: int | None = None  # until another one takes its place; None: never


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdown:
    """The worker at this place takes ``factor`` times as long. A later one replaces it."""

    role: Role
    index: int
    factor: float
    at_ns: int = 0


Failure = Death | Slowdown


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaling:
    """The pools grow and shrink, as the live ones would by this plan."""

    plan: Plan
    start_ns: int  # from being wanted to being there: the model has to be loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """By how much prefills differ from their prediction. The router is told nothing of it."""

    sigma: float = 0.0  # of the logarithm; the mean stays 1
    lie_share: float = 0.0  # requests whose prefill takes ``lie_factor`` times as long
    lie_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    router: RouterConfig = field(default_factory=RouterConfig)
    costs: CostModel = STUDY_COSTS
    """The truth."""

    predicted: CostModel | None = None
    """What the router believes; None: the truth."""

    prefill_workers: int = 8
    decode_workers: int = 4
    """In aggregated mode, all workers: the prefill pool is empty then."""

    hosts: int = 1
    """Workers are dealt out to them in turn."""

    decode: bool = True
    """False: every request ends with its first token, and decode workers are without limits."""

    chunk_tokens: int = 2048
    mixed_chunk_tokens: int | None = None
    """Of a prompt whose worker has streams running; None: the same."""

    double_cost_tokens: int | None = None
    """Chunks beside streams are equally much work, if a token that has so many before it is twice
    as much as the first; None: equally large."""

    running_max: int = 256
    decode_tokens: int = 1_300_000
    """KV that a decode worker has room for."""

    cache_tokens: int | None = None
    """KV that a prefill worker has room for, its prefix cache included; None: no limit."""

    store_tokens: int | None = 0
    """KV that a host's store keeps for the workers there; None: no limit, 0: no store."""

    disk_tokens: int | None = 0
    """KV that the disk below a host's store keeps; None: no limit, 0: no disk."""

    disk_write: SsdWrite = "second_touch"
    """What goes down: what a prompt finds again, all that is stored, or what leaves memory."""

    fetches: bool = True
    """Whether workers fetch from the stores of other hosts what that is sooner for than computing
    it, as they do where the store has a master."""

    contention: float = 1.0
    """How many times as long everything takes at a worker while all others of its host work."""

    overlap: float = 0.0
    """Part of a chunk's time that hides behind the streams of the same step: 0 adds them up."""

    chunk_reports_max: int = 2
    """Reports at chunk borders per prefill, evenly spaced, and one at the last border but one; of
    long prompts one a second beside them. A live worker reports every one; a few tell the router
    the same, a little later. Without preemption only the last one matters, and those that show
    how fast the queue moves; 0 leaves all of them out."""

    message_ns: int = 0
    """One way, between any two processes."""

    timeout_s: float | None = None
    """Clients' deadline; None: they wait for ever."""

    client_retries: int = 0
    """How often a client that was refused asks again, when it was told to; each time it has
    ``timeout_s`` anew."""

    client_patience_s: float = 0.0
    """Until a client that was told nothing asks again, twice as long each time; such clients do not
    heed hints, which makes a storm. 0: clients heed hints."""

    max_tokens: int = 4096
    """What every request says it may generate; traces do not tell."""

    noise: Noise = field(default_factory=Noise)
    failures: tuple[Failure, ...] = ()
    autoscaling: Autoscaling | None = None
    """None: the pools stay as they are. Else they begin as they are said above."""

    seed: int = 0

    def __post_init__(self) -> None:
        assert self.prefill_workers > 0 or self.router.mode == "aggregated"
        assert self.decode_workers > 0
        assert self.hosts > 0
        assert self.chunk_tokens > 0
        assert self.mixed_chunk_tokens is None or self.mixed_chunk_tokens > 0
        assert self.double_cost_tokens is None or self.double_cost_tokens > 0
        assert 0 <= self.overlap <= 1
        assert self.contention >= 1
        assert self.chunk_reports_max >= 0
        for failure in self.failures:
            assert 0 <= failure.index < self.workers_of(failure.role), f"no such worker: {failure}"

    def workers_of(self, role: Role) -> int:
        if role is Role.DECODE:
            return self.decode_workers
        return 0 if self.router.mode == "aggregated" else self.prefill_workers
