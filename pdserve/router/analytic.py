"""Cost models from data sheets, for deployments that nobody has measured here: a roofline.

A step takes the longer of what its arithmetic needs at the accelerator's peak and what its bytes
need at its memory's, each at the share of the peak that good kernels reach; ``n`` accelerators that
share the model by tensor parallelism divide both, and add two all-reduces per layer.

    F = n · peak · COMPUTE_SHARE           M = n · bandwidth · MEMORY_SHARE
    weights = parameters · 2 B / M         arithmetic = 2 · parameters / F, per token
    reduce  = 2 · layers · hidden · 2 B · 2 (n − 1) / n / (link · LINK_SHARE), per token
    start   = layers · LAYER_START_S + 2 · layers · REDUCE_START_S, the second for n > 1

    prefill  fixed = start + weights; token = arithmetic + reduce
             pair = 2 · layers · heads · head_dim / F, since U tokens after H see U·(U + 2H)/2
             others, at 4 operations per channel each
    decode   context = KV bytes of a token / M
             small: fixed = start + weights; sequence = SEQUENCE_S + reduce
             large: fixed = start; sequence = SEQUENCE_S + reduce + arithmetic
             large from the batch whose arithmetic outlasts reading the weights
    moves    bandwidth of n links · LINK_SHARE

The shares are what published kernels reach on large shapes. Expect 20 to 30 per cent of error, more
for short prompts: such a profile compares plans, a measured one predicts. Peaks are of dense bf16,
from the vendor's data sheets; a link's bandwidth is of one direction.
"""

from dataclasses import asdict, dataclass
from typing import Any

from pdserve.router.costs import CostModel, DecodeCost, MoveCost, PrefillCost, StepCost

COMPUTE_SHARE = 0.55
MEMORY_SHARE = 0.8
LINK_SHARE = 0.8
LAYER_START_S = 5e-6  # of kernels in a CUDA graph
REDUCE_START_S = 8e-6
SEQUENCE_S = 1e-5  # sampling, and its share of the host's work
MOVE_START_S = 5e-4
KV_MEMORY_SHARE = 0.9  # of the accelerators' memory, for weights and KV
VALUE_BYTES = 2  # bf16 weights and KV
SSD_BYTES_PER_S = 7e9  # one PCIe 4 drive
SIGNIFICANT_DIGITS = 6

FORMULA = "roofline, additive where terms overlap in part; see pdserve/router/analytic.py"


@dataclass(frozen=True, slots=True)
class Accelerator:
    name: str
    peak_flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float  # to its neighbours in the host
    host_bytes_per_s: float  # to host memory
    network_bytes_per_s: float  # of the network card that is its own


@dataclass(frozen=True, slots=True)
class ModelShape:
    name: str
    parameters: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def kv_token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * VALUE_BYTES

    @property
    def weight_bytes(self) -> float:
        return self.parameters * VALUE_BYTES


@dataclass(frozen=True, slots=True)
class Deployment:
    accelerator: Accelerator
    shape: ModelShape
    count: int = 1  # accelerators that share the model

    @property
    def name(self) -> str:
        parallel = f"-tp{self.count}" if self.count > 1 else ""
        return f"{self.accelerator.name}-{self.shape.name}{parallel}"

    @property
    def kv_capacity_tokens(self) -> int:
        room = self.accelerator.memory_bytes * self.count * KV_MEMORY_SHARE
        return int((room - self.shape.weight_bytes) / self.shape.kv_token_bytes)


H100 = Accelerator("h100", 989e12, 3.35e12, 80e9, 450e9, 64e9, 50e9)
H200 = Accelerator("h200", 989e12, 4.8e12, 141e9, 450e9, 64e9, 50e9)
A100 = Accelerator("a100", 312e12, 2.039e12, 80e9, 300e9, 32e9, 25e9)
L4 = Accelerator("l4", 121e12, 300e9, 24e9, 32e9, 32e9, 12.5e9)

LLAMA3_8B = ModelShape("llama3-8b", 8.03e9, 32, 4096, 32, 8, 128)
LLAMA3_70B = ModelShape("llama3-70b", 70.6e9, 80, 8192, 64, 8, 128)
LLAMA2_70B = ModelShape("llama2-70b", 69.0e9, 80, 8192, 64, 8, 128)

SHIPPED = (
    Deployment(H100, LLAMA3_8B),
    Deployment(H100, LLAMA3_70B, 4),
    Deployment(H100, LLAMA3_70B, 8),
    Deployment(H200, LLAMA3_8B),
    Deployment(H200, LLAMA3_70B, 4),
    Deployment(A100, LLAMA3_8B),
    Deployment(A100, LLAMA2_70B, 8),
    Deployment(L4, LLAMA3_8B),
)


def analytic_costs(deployment: Deployment) -> CostModel:
    accelerator, shape, count = deployment.accelerator, deployment.shape, deployment.count
    flops_per_s = count * accelerator.peak_flops_per_s * COMPUTE_SHARE
    bytes_per_s = count * accelerator.memory_bytes_per_s * MEMORY_SHARE
    weights_s = shape.weight_bytes / bytes_per_s
    arithmetic_s = 2 * shape.parameters / flops_per_s
    reduce_s = _reduce_s(deployment)
    start_s = shape.layers * (LAYER_START_S + (2 * REDUCE_START_S if count > 1 else 0))
    context_s = _rounded(shape.kv_token_bytes / bytes_per_s)
    return CostModel(
        name=deployment.name,
        origin="analytic",
        prefill=PrefillCost(
            fixed_s=_rounded(start_s + weights_s),
            token_s=_rounded(arithmetic_s + reduce_s),
            pair_s=_rounded(2 * shape.layers * shape.heads * shape.head_dim / flops_per_s),
        ),
        decode=DecodeCost(
            small=StepCost(
                fixed_s=_rounded(start_s + weights_s),
                context_s=context_s,
                sequence_s=_rounded(SEQUENCE_S + reduce_s),
            ),
            large=StepCost(
                fixed_s=_rounded(start_s),
                context_s=context_s,
                sequence_s=_rounded(SEQUENCE_S + reduce_s + arithmetic_s),
            ),
            large_from=int(weights_s / arithmetic_s) + 1,
        ),
        handoff=_move(count * accelerator.network_bytes_per_s),
        host=_move(count * accelerator.host_bytes_per_s),
        ssd=_move(SSD_BYTES_PER_S),
        kv_token_bytes=shape.kv_token_bytes,
    )


def explanation(deployment: Deployment) -> dict[str, Any]:
    """What a reader of the profile should know, as plain values."""
    return {
        "formula": FORMULA,
        "accelerators": deployment.count,
        "kv_capacity_tokens": deployment.kv_capacity_tokens,
        "accelerator": asdict(deployment.accelerator),
        "model": asdict(deployment.shape),
        "assumed": {
            "compute_share": COMPUTE_SHARE,
            "memory_share": MEMORY_SHARE,
            "link_share": LINK_SHARE,
            "layer_start_s": LAYER_START_S,
            "reduce_start_s": REDUCE_START_S,
            "sequence_s": SEQUENCE_S,
            "move_start_s": MOVE_START_S,
            "kv_memory_share": KV_MEMORY_SHARE,
            "value_bytes": VALUE_BYTES,
            "ssd_bytes_per_s": SSD_BYTES_PER_S,
        },
    }


def _reduce_s(deployment: Deployment) -> float:
    """A token's part of all all-reduces: a ring sends each byte 2 (n − 1) / n times."""
    shape, count = deployment.shape, deployment.count
    sent_bytes = 2 * shape.layers * shape.hidden * VALUE_BYTES * 2 * (count - 1) / count
    return sent_bytes / (deployment.accelerator.link_bytes_per_s * LINK_SHARE)


def _move(peak_bytes_per_s: float) -> MoveCost:
    return MoveCost(fixed_s=MOVE_START_S, bytes_per_s=_rounded(peak_bytes_per_s * LINK_SHARE))


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
