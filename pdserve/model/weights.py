"""A model's weights in the shape in which one step wants them, from either file format.

Files name tensors differently and store them in different types; a ``WeightFiles`` hides that and
hands out one tensor at a time under one set of names (those of safetensors directories), so that
no more than one layer exists twice. q, k and v become one matrix, gate and up another: fewer and
larger products. Every tensor's shape is checked against the architecture, and none may be left
over: what we would silently ignore could change an answer.

Shape letters: V vocabulary, C hidden, O outputs of a linear layer, D channels of a head.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pdserve.errors import ConfigError
from pdserve.model.architecture import Architecture
from pdserve.model.ops import LayerWeights, LinearWeight, Ops

_IGNORED = re.compile(r".*rotary_emb\.inv_freq")  # old checkpoints carry what config.json says


class WeightFiles(Protocol):
    def names(self) -> Iterable[str]: ...

    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored, or in float32 where it was quantised; on the CPU."""
        ...


@dataclass(frozen=True, slots=True)
class Weights:
    embedding_VC: Tensor
    layers: tuple[LayerWeights, ...]
    norm_C: Tensor
    head: LinearWeight


def build_weights(
    architecture: Architecture,
    files: WeightFiles,
    ops: Ops,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Weights:
    """All weights, converted, joined, packed and on the device.

    Raises:
        ConfigError: a tensor is missing, has another shape than the architecture says, or is one
            that this architecture does not know.
    """
    return _Builder(architecture, files, ops, dtype, device).build()


class _Builder:
    def __init__(
        self,
        architecture: Architecture,
        files: WeightFiles,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._architecture = architecture
        self._files = files
        self._ops = ops
        self._dtype = dtype
        self._device = device
        self._left = {name for name in files.names() if not _IGNORED.fullmatch(name)}

    def build(self) -> Weights:
        shape = self._architecture
        embedding_VC = self._take("model.embed_tokens.weight", (shape.vocab_size, shape.hidden))
        layers = tuple(self._layer(index) for index in range(shape.layer_count))
        norm_C = self._take("model.norm.weight", (shape.hidden,))
        if shape.tied_head:
            head = self._ops.pack(LinearWeight(embedding_VC))
            self._left.discard("lm_head.weight")  # some files store the shared tensor twice
        else:
            head = self._linear(["lm_head"], [shape.vocab_size], shape.hidden)
        if self._left:
            raise ConfigError(
                f"the weights hold {len(self._left)} tensors that a {shape.family} model does not "
                f"have, {sorted(self._left)[0]} among them; the files and config.json disagree"
            )
        return Weights(embedding_VC, layers, norm_C, head)

    def _layer(self, index: int) -> LayerWeights:
        shape = self._architecture
        at = f"model.layers.{index}."
        q, kv = shape.head_count * shape.head_dim, shape.kv_head_count * shape.head_dim
        attention = [f"{at}self_attn.{name}_proj" for name in ("q", "k", "v")]
        norms = [f"{at}self_attn.{name}_norm.weight" for name in ("q", "k")]
        if shape.qkv_bias and f"{attention[0]}.bias" not in self._left:
            raise ConfigError(f"the weights lack {attention[0]}.bias")
        return LayerWeights(
            attention_norm_C=self._take(f"{at}input_layernorm.weight", (shape.hidden,)),
            qkv=self._linear(attention, [q, kv, kv], shape.hidden),
            q_norm_D=self._take(norms[0], (shape.head_dim,)) if shape.qk_norm else None,
            k_norm_D=self._take(norms[1], (shape.head_dim,)) if shape.qk_norm else None,
            attention_output=self._linear([f"{at}self_attn.o_proj"], [shape.hidden], q),
            ffn_norm_C=self._take(f"{at}post_attention_layernorm.weight", (shape.hidden,)),
            gate_up=self._linear(
                [f"{at}mlp.gate_proj", f"{at}mlp.up_proj"], [shape.ffn] * 2, shape.hidden
            ),
            down=self._linear([f"{at}mlp.down_proj"], [shape.hidden], shape.ffn),
        )

    def _linear(self, names: Sequence[str], outputs: Sequence[int], inputs: int) -> LinearWeight:
        """One matrix of those named, one below the other, with their biases if they have any."""
        weights = [
            self._take(f"{name}.weight", (rows, inputs))
            for name, rows in zip(names, outputs, strict=True)
        ]
        biases = [
            self._take(f"{name}.bias", (rows,))
            for name, rows in zip(names, outputs, strict=True)
            if f"{name}.bias" in self._left
        ]
        if biases and len(biases) != len(weights):
            raise ConfigError(f"only some of {', '.join(names)} have a bias")
        return self._ops.pack(LinearWeight(_joined(weights), _joined(biases) if biases else None))

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._left:
            raise ConfigError(f"the weights lack {name}")
        self._left.remove(name)
        tensor = self._files.tensor(name)
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"{name} has the shape {tuple(tensor.shape)}, the architecture says {shape}"
            )
        return tensor.to(device=self._device, dtype=self._dtype).contiguous()


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
