"""A model's weights in the shape in which one step wants them, from either file format.

Files name tensors differently and store them in different types; a ``WeightFiles`` hides that and
hands out one tensor at a time under one set of names (those of safetensors directories), so that
no more than one layer exists twice. q, k and v become one matrix, gate and up another: fewer and
larger products. Every tensor's shape is checked against the architecture, and none may be left
over: what we would silently ignore could change an answer.

Shape letters: V vocabulary, C hidden, O outputs of a linear layer, D channels of a head.
"""

import collections
import dataclasses
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pdserve.config import Quantization
from pdserve.errors import ConfigError
from pdserve.model.architecture import Architecture, Experts
from pdserve.model.families.registry import FAMILIES
from pdserve.model.fp8_weights import in_fp8
from pdserve.model.ops import FeedForward, LayerWeights, LinearWeight, Mixture, Ops
from pdserve.model.quantised import Q4_1, Q8_0, QuantisedWeight, joined, quantised

_logger = logging.getLogger(__name__)

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"

_IGNORED = re.compile(r".*rotary_emb\.inv_freq")  # old checkpoints carry what config.json says


class WeightFiles(Protocol):
    def names(self) -> Iterable[str]: ...

    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored, or in float32 where it was quantised; on the CPU."""
        ...

    def quantised(self, name: str) -> QuantisedWeight | None:
        """The matrix as it is stored, where that is a format of ours."""
        ...


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: LinearWeight
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
    quantization: Quantization = "none",
    head_tokens: range | None = None,
) -> Weights:
    """All weights, converted, joined, packed and on the device.

    Args:
        head_tokens: whose logits ``head`` gives; None is the whole vocabulary.
        quantization: which matrices stay quantised, or become so (``config.ModelConfig``). The
            weights are the same where ``ops`` cannot read them so; they take more memory then.

    Raises:
        ConfigError: a tensor is missing, has another shape than the architecture says, or is one
            that this architecture does not know.
    """
    if quantization != "none" and not ops.reads_quantised:
        _logger.warning(
            "quantised weights are computed as %s here, in its memory and at its speed: the %s "
            "kernels on this machine do not read them",
            *(str(dtype).removeprefix("torch."), ops.name),
        )
    tokens = head_tokens or range(architecture.vocab_size)
    return _Builder(architecture, files, ops, dtype, device, quantization).build(tokens)


class _Builder:
    def __init__(
        self,
        architecture: Architecture,
        files: WeightFiles,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization,
    ) -> None:
        self._architecture = architecture
        self._names = FAMILIES[architecture.family].names
        self._files = files
        self._ops = ops
        self._dtype = dtype
        self._device = device
        self._quantization = quantization
        self._kept: collections.Counter[str] = collections.Counter()  # matrices, by their format
        self._left = {name for name in files.names() if not _IGNORED.fullmatch(name)}

    def build(self, head_tokens: range) -> Weights:
        shape = self._architecture
        is_shared = shape.tied_head and len(head_tokens) == shape.vocab_size
        embedding = self._matrix(_EMBEDDING, (shape.vocab_size, shape.hidden))
        layers = tuple(self._layer(index) for index in range(shape.layer_count))
        norm_C = self._norm("model.norm", shape.hidden)
        if shape.tied_head:
            head = self._packed(embedding if is_shared else _rows(embedding, head_tokens))
            self._left.discard(_HEAD)  # some files store the shared tensor twice
        else:
            head = self._linear(["lm_head"], [len(head_tokens)], shape.hidden)
        if isinstance(embedding, QuantisedWeight):
            # Rows are unpacked as they are looked up, a microsecond each: a plain copy beside the
            # head would take twice the head's memory.
            embedding = head if is_shared else self._ops.pack(embedding)
        if self._left:
            raise ConfigError(
                f"the weights hold {len(self._left)} tensors that a {shape.family} model does not "
                f"have, {sorted(self._left)[0]} among them; the files and config.json disagree"
            )
        kept = ", ".join(f"{count} of {name}" for name, count in self._kept.items())
        _logger.debug("matrices of layers and head as they are in memory: %s", kept)
        return Weights(embedding, layers, norm_C, head)

    def _layer(self, index: int) -> LayerWeights:
        shape, names = self._architecture, self._names
        at = f"model.layers.{index}."
        q, kv = shape.head_count * shape.head_dim, shape.kv_head_count * shape.head_dim
        attention = [f"{at}self_attn.{name}_proj" for name in ("q", "k", "v")]
        experts = shape.layers[index].experts
        if shape.qkv_bias and f"{attention[0]}.bias" not in self._left:
            raise ConfigError(f"the weights lack {attention[0]}.bias")
        return LayerWeights(
            attention_norm_C=self._norm(f"{at}input_layernorm", shape.hidden),
            qkv=self._linear(attention, [q, kv, kv], shape.hidden),
            q_norm_D=self._norm_if(shape.qk_norm, f"{at}self_attn.q_norm", shape.head_dim),
            k_norm_D=self._norm_if(shape.qk_norm, f"{at}self_attn.k_norm", shape.head_dim),
            attention_output=self._linear([f"{at}self_attn.o_proj"], [shape.hidden], q),
            attention_output_norm_C=self._norm_if(
                shape.output_norms, f"{at}{names.attention_output_norm}", shape.hidden
            ),
            ffn_norm_C=self._norm(f"{at}{names.ffn_norm}", shape.hidden),
            ffn=self._feed_forward(f"{at}mlp.", ("gate_proj", "up_proj", "down_proj"), shape.ffn)
            if experts is None
            else self._mixture(at, experts),
            ffn_output_norm_C=self._norm_if(
                shape.output_norms, f"{at}{names.ffn_output_norm}", shape.hidden
            ),
        )

    def _feed_forward(self, at: str, names: tuple[str, str, str], ffn: int) -> FeedForward:
        gate, up, down = (f"{at}{name}" for name in names)
        hidden = self._architecture.hidden
        return FeedForward(
            gate_up=self._linear([gate, up], [ffn, ffn], hidden),
            down=self._linear([down], [hidden], ffn),
        )

    def _mixture(self, at: str, experts: Experts) -> Mixture:
        names = self._names
        parts = (names.expert_gate, names.expert_up, names.expert_down)
        # Never quantised: it is small, and who computes hangs on it.
        router = self._take(
            f"{at}{names.router}.weight", (experts.count, self._architecture.hidden)
        )
        return Mixture(
            router=self._ops.pack(LinearWeight(router)),
            experts=tuple(
                self._feed_forward(f"{at}{names.experts}.{expert}.", parts, experts.ffn)
                for expert in range(experts.count)
            ),
        )

    def _norm(self, module: str, size: int) -> Tensor:
        """A norm's weight as it is multiplied with: the offset is added before anything is rounded,
        and the sum rounded once."""
        weight, offset = self._stored(f"{module}.weight", (size,)), self._architecture.norm_offset
        return self._converted(weight.float() + offset if offset else weight)

    def _norm_if(self, present: bool, module: str, size: int) -> Tensor | None:
        return self._norm(module, size) if present else None

    def _linear(self, names: Sequence[str], outputs: Sequence[int], inputs: int) -> LinearWeight:
        """One matrix of those named, one below the other, with their biases if they have any."""
        weights = [
            self._matrix(f"{name}.weight", (rows, inputs))
            for name, rows in zip(names, outputs, strict=True)
        ]
        biases = [
            self._take(f"{name}.bias", (rows,))
            for name, rows in zip(names, outputs, strict=True)
            if f"{name}.bias" in self._left
        ]
        if biases and len(biases) != len(weights):
            raise ConfigError(f"only some of {', '.join(names)} have a bias")
        weight = self._below_one_another(weights)
        if biases:
            weight = dataclasses.replace(weight, bias_O=_joined(biases))
        if self._quantization == "fp8" and f"{names[0]}.weight" != _HEAD:
            weight = in_fp8(weight)
        return self._packed(weight)

    def _packed(self, weight: LinearWeight) -> LinearWeight:
        plain = str(weight.weight_OC.dtype).removeprefix("torch.")
        self._kept[weight.format.name if isinstance(weight, QuantisedWeight) else plain] += 1
        return self._ops.pack(weight)

    def _below_one_another(self, parts: Sequence[LinearWeight]) -> LinearWeight:
        quantised = [part for part in parts if isinstance(part, QuantisedWeight)]
        if len(quantised) == len(parts) and (whole := joined(quantised)) is not None:
            return whole
        return LinearWeight(_joined([self._plain(part) for part in parts]))

    def _plain(self, weight: LinearWeight) -> Tensor:
        if isinstance(weight, QuantisedWeight):
            return self._converted(weight.dequantised())
        return weight.weight_OC

    def _matrix(self, name: str, shape: tuple[int, int]) -> LinearWeight:
        """Quantised, if that is wanted and possible, else plain."""
        self._claim(name)
        weight = self._quantised(name)
        if weight is None:
            return LinearWeight(self._converted(_checked(name, self._files.tensor(name), shape)))
        _check_shape(name, weight.shape, shape)
        return weight if self._ops.reads_quantised else LinearWeight(self._plain(weight))

    def _quantised(self, name: str) -> QuantisedWeight | None:
        if self._quantization in ("none", "fp8"):
            return None
        stored = self._files.quantised(name)
        if self._quantization == "file":
            return stored
        # The last layer's errors are the answer's: its weights keep 8 bits, as in files of 4 bits.
        coarse = self._quantization == "int4" and name not in (_EMBEDDING, _HEAD)
        target = Q4_1 if coarse else Q8_0
        if stored is not None and stored.format.bits == target.bits:
            return stored  # rounded again, it would only lose
        return quantised(self._files.tensor(name), target)

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._converted(self._stored(name, shape))

    def _stored(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._claim(name)
        return _checked(name, self._files.tensor(name), shape)

    def _claim(self, name: str) -> None:
        if name not in self._left:
            raise ConfigError(f"the weights lack {name}")
        self._left.remove(name)

    def _converted(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self._device, dtype=self._dtype).contiguous()


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    _check_shape(name, tuple(tensor.shape), shape)
    return tensor


def _check_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if found != shape:
        raise ConfigError(f"{name} has the shape {found}, the architecture says {shape}")


def _rows(weight: LinearWeight, outputs: range) -> LinearWeight:
    return dataclasses.replace(weight, weight_OC=weight.weight_OC[outputs.start : outputs.stop])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
