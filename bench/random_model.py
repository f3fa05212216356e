"""Models of real shapes whose weights are random: speed needs no others, and no file is read.

Weights come from a seed, so that two processes with the same kind of device have the same model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.model.architecture import Architecture, LayerKind
from pdserve.model.graphs import CudaRecorder
from pdserve.model.ops import FeedForward, LayerWeights, LinearWeight, Ops
from pdserve.model.pool import KvPool
from pdserve.model.rope import Rope
from pdserve.model.runner import ModelRunner
from pdserve.model.weights import Weights

DTYPE = torch.bfloat16
BLOCK_TOKENS = 16


def dense(
    *, layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int,
    vocab: int, context_tokens: int, qk_norm: bool = False, rope_base: float = 500_000.0,
) -> Architecture:  # fmt: skip
    return Architecture(
        family="qwen3" if qk_norm else "llama",
        layers=(LayerKind(rope=Rope(base=rope_base)),) * layers,
        hidden=hidden,
        head_count=heads,
        kv_head_count=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab_size=vocab,
        context_tokens=context_tokens,
        norm_eps=1e-5,
        attention_scale=head_dim**-0.5,
        tied_head=False,
        eos_token_ids=(),
        bos_token_id=None,
        qk_norm=qk_norm,
    )


# What their config.json say; the contexts are as long as anything here needs.
LLAMA_3_8B = dense(
    layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14_336, vocab=128_256,
    context_tokens=16_384,
)  # fmt: skip
QWEN3_8B = dense(
    layers=36, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=12_288, vocab=151_936,
    context_tokens=16_384, qk_norm=True, rope_base=1_000_000.0,
)  # fmt: skip
TINY = dense(
    layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=256, context_tokens=512
)


def random_runner(
    architecture: Architecture,
    device: torch.device,
    *,
    block_count: int,
    running_max: int,
    seed: int = 0,
) -> ModelRunner:
    """A runner as ``model.load`` makes one, but for where its weights come from."""
    ops = _ops(device)
    on_gpu = device.type == "cuda"
    pool = KvPool(
        architecture,
        block_count=block_count,
        block_tokens=BLOCK_TOKENS,
        dtype=DTYPE,
        device=device,
        scratch=on_gpu,
    )
    return ModelRunner(
        architecture,
        _Random(device, seed, ops).weights(architecture),
        ops,
        pool,
        recorder=CudaRecorder(device) if on_gpu else None,
        recorded_rows_max=running_max,
    )


def _ops(device: torch.device) -> Ops:
    if device.type == "cuda":
        from pdserve.model.triton_ops import TritonOps

        return TritonOps()
    from pdserve.model.cpu_ops import cpu_ops

    return cpu_ops()


class _Random:
    def __init__(self, device: torch.device, seed: int, ops: Ops) -> None:
        self._device = device
        self._ops = ops
        self._generator = torch.Generator(device).manual_seed(seed)

    def weights(self, shape: Architecture) -> Weights:
        embedding = LinearWeight(self._matrix(shape.vocab_size, shape.hidden, scale=1.0))
        return Weights(
            embedding,
            tuple(self._layer(shape) for _ in shape.layers),
            self._ones(shape.hidden),
            self._linear(shape.vocab_size, shape.hidden),
        )

    def _layer(self, shape: Architecture) -> LayerWeights:
        attended, kept = (
            count * shape.head_dim for count in (shape.head_count, shape.kv_head_count)
        )
        head_norm = self._ones(shape.head_dim) if shape.qk_norm else None
        return LayerWeights(
            attention_norm_C=self._ones(shape.hidden),
            qkv=self._linear(attended + 2 * kept, shape.hidden),
            q_norm_D=head_norm,
            k_norm_D=head_norm,
            attention_output=self._linear(shape.hidden, attended),
            attention_output_norm_C=None,
            ffn_norm_C=self._ones(shape.hidden),
            ffn=FeedForward(
                gate_up=self._linear(2 * shape.ffn, shape.hidden),
                down=self._linear(shape.hidden, shape.ffn),
            ),
            ffn_output_norm_C=None,
        )

    def _linear(self, outputs: int, inputs: int) -> LinearWeight:
        return self._ops.pack(LinearWeight(self._matrix(outputs, inputs, scale=inputs**-0.5)))

    def _matrix(self, rows: int, columns: int, *, scale: float) -> Tensor:
        matrix = torch.empty(rows, columns, dtype=DTYPE, device=self._device)
        return matrix.normal_(generator=self._generator).mul_(scale)

    def _ones(self, count: int) -> Tensor:
        return torch.ones(count, dtype=DTYPE, device=self._device)


@dataclass(frozen=True, slots=True)
class Costs:
    """What a step moves and computes at least."""

    architecture: Architecture

    def decode_bytes(self, sequences: int, context: int) -> int:
        """Every matrix once, and the KV of every sequence."""
        return self.layers_bytes + self.head_bytes + sequences * context * self.kv_bytes

    def prefill_operations(self, tokens: int) -> float:
        """Of one prompt whose last token alone gets logits."""
        shape = self.architecture
        pairs = tokens * (tokens + 1) / 2
        attention = 4 * shape.head_count * shape.head_dim * pairs * shape.layer_count
        matrices = sum(rows * columns for rows, columns in self._matrices()) * shape.layer_count
        return 2 * tokens * matrices + 2 * shape.vocab_size * shape.hidden + attention

    @property
    def layers_bytes(self) -> int:
        elements = sum(rows * columns for rows, columns in self._matrices())
        return elements * self.architecture.layer_count * DTYPE.itemsize

    @property
    def head_bytes(self) -> int:
        return self.architecture.vocab_size * self.architecture.hidden * DTYPE.itemsize

    @property
    def kv_bytes(self) -> int:
        """Of a token."""
        shape = self.architecture
        return 2 * shape.layer_count * shape.kv_head_count * shape.head_dim * DTYPE.itemsize

    def _matrices(self) -> Iterator[tuple[int, int]]:
        """Of a layer."""
        shape = self.architecture
        attended = shape.head_count * shape.head_dim
        yield attended + 2 * shape.kv_head_count * shape.head_dim, shape.hidden
        yield shape.hidden, attended
        yield 2 * shape.ffn, shape.hidden
        yield shape.hidden, shape.ffn
