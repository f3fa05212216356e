"""LoRA: a low-rank change of the base model's linear layers, for some rows of a batch.

    y = W x + B (A x)        A [R, C], B [O, R], B already times the adapter's scale

The base model's product is computed for all rows, exactly as it is without adapters, whatever its
weights are packed or quantised as; then each adapter's is added to that adapter's rows. Both of
its products are ``Ops.linear`` in the model's dtype, and the sum is one addition per element: so a
row's bits depend on it, its adapter and the base model alone, as they do without (``ops.py``).

What the base model has joined is joined here too (q, k and v; gate and up): the A's stand below one
another, the B's along a diagonal with zeros around them, so that an adapted layer takes two
products whatever is in it. R is then the sum of their ranks, filled up to whole groups with zeros.

Shape letters as in ``ops.py``; O outputs of a linear layer, R rank.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from pdserve.model.adapter_files import MATRICES_FILE, AdapterFiles
from pdserve.model.architecture import Architecture
from pdserve.model.ops import (
    AdaptedRows,
    Adapter,
    AdapterLayer,
    LinearWeight,
    LowRank,
    Ops,
)

RANK_GROUP = 16
"""Ranks are filled up to a multiple of it: no product has an odd or tiny number of channels."""

_STORED = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\."
    r"(?P<part>\w+)_proj)\.lora_(?P<half>[AB])\.weight"
)
_JOINED = {
    "qkv": ("q", "k", "v"),
    "attention_output": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
_PARTS = tuple(part for parts in _JOINED.values() for part in parts)


def load_adapters(
    located: Sequence[AdapterFiles],
    architecture: Architecture,
    ops: Ops,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Adapter]:
    """All adapters by their digests, converted, joined, packed and on the device.

    Raises:
        ConfigError: a file cannot be read, adapts what we do not, or does not fit the base model.
    """
    return {
        files.digest: _Builder(files, architecture, ops, dtype, device).build() for files in located
    }


def add_low_rank(
    ops: Ops, x_NC: Tensor, y_NO: Tensor, adapted: Sequence[AdaptedRows], index: int, part: str
) -> None:
    """Adds to ``y_NO``, in place, what each adapter has for this linear layer.

    Args:
        index: of the layer.
        part: a field of ``AdapterLayer``.
    """
    for rows in adapted:
        low_rank: LowRank | None = getattr(rows.adapter.layers[index], part)
        if low_rank is not None:
            x = x_NC[rows.first : rows.end]
            y_NO[rows.first : rows.end] += ops.linear(ops.linear(x, low_rank.a), low_rank.b)


class _Builder:
    def __init__(
        self,
        files: AdapterFiles,
        architecture: Architecture,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._files = files
        self._architecture = architecture
        self._ops = ops
        self._dtype = dtype
        self._device = device
        self._halves = self._read()

    def build(self) -> Adapter:
        shape = self._architecture
        layers = tuple(
            AdapterLayer(
                **{field: self._low_rank(index, parts) for field, parts in _JOINED.items()}
            )
            for index in range(shape.layer_count)
        )
        if self._halves:
            raise self._files.refusal(
                f"{min(self._halves)} has no second half; the file is not whole"
            )
        return Adapter(layers)

    def _read(self) -> dict[str, Tensor]:
        """The stored matrices by their names, each of which is one of ours."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            stored = load_file(self._files.directory / MATRICES_FILE)
        except (OSError, SafetensorError) as error:
            raise self._files.refusal(
                f"cannot read {MATRICES_FILE}: {error}; save it again"
            ) from error
        for name in stored:
            self._check_name(name)
        if not stored:
            raise self._files.refusal(f"{MATRICES_FILE} is empty; save it again")
        return stored

    def _check_name(self, name: str) -> None:
        shape = self._architecture
        found = _STORED.fullmatch(name)
        if found is None or found["part"] not in _PARTS:
            raise self._files.refusal(
                f"{name} adapts what is not supported; target_modules can be "
                f"{', '.join(f'{part}_proj' for part in _PARTS)}"
            )
        layer, is_dense_part = int(found["layer"]), found["part"] in ("gate", "up", "down")
        if layer >= shape.layer_count:
            raise self._files.refusal(
                f"{name} is of layer {layer}, the base model has {shape.layer_count}; it was "
                "trained on another model"
            )
        if is_dense_part and shape.layers[layer].experts is not None:
            raise self._files.refusal(f"{name}: layer {layer} has experts, which take no adapters")

    def _low_rank(self, index: int, parts: tuple[str, ...]) -> LowRank | None:
        """Of what the base model has joined; None where none of it is adapted."""
        pairs = {part: pair for part in parts if (pair := self._pair(index, part)) is not None}
        if not pairs:
            return None
        rank = sum(a_RC.shape[0] for a_RC, _ in pairs.values())
        outputs, inputs = sum(self._outputs(part) for part in parts), self._inputs(parts[0])
        a_RC = torch.zeros((-(-rank // RANK_GROUP) * RANK_GROUP, inputs))
        b_OR = torch.zeros((outputs, a_RC.shape[0]))
        first_output = first_rank = 0
        for part in parts:
            end_output = first_output + self._outputs(part)
            if part in pairs:
                part_a_RC, part_b_OR = pairs[part]
                end_rank = first_rank + part_a_RC.shape[0]
                a_RC[first_rank:end_rank] = part_a_RC
                b_OR[first_output:end_output, first_rank:end_rank] = part_b_OR
                first_rank = end_rank
            first_output = end_output
        return LowRank(self._packed(a_RC), self._packed(b_OR))

    def _pair(self, index: int, part: str) -> tuple[Tensor, Tensor] | None:
        """A and scaled B in float32; None where this is not adapted."""
        block = "self_attn" if part in "qkvo" else "mlp"
        module = f"model.layers.{index}.{block}.{part}_proj"
        names = [f"base_model.model.{module}.lora_{half}.weight" for half in "AB"]
        if not all(name in self._halves for name in names):
            return None
        a_RC, b_OR = (self._halves.pop(name).float() for name in names)
        rank = self._files.rank_of(module)
        for name, half, wanted in (
            (names[0], a_RC, (rank, self._inputs(part))),
            (names[1], b_OR, (self._outputs(part), rank)),
        ):
            if tuple(half.shape) != wanted:
                raise self._files.refusal(
                    f"{name} has the shape {tuple(half.shape)}, the base model and the rank say "
                    f"{wanted}; it was trained on another model"
                )
        return a_RC, b_OR * self._files.scale_of(module)

    def _inputs(self, part: str) -> int:
        shape = self._architecture
        sizes = {"o": shape.head_count * shape.head_dim, "down": shape.ffn}
        return sizes.get(part, shape.hidden)

    def _outputs(self, part: str) -> int:
        shape = self._architecture
        kept = shape.kv_head_count * shape.head_dim
        sizes = {"q": shape.head_count * shape.head_dim, "k": kept, "v": kept}
        return (sizes | {"gate": shape.ffn, "up": shape.ffn}).get(part, shape.hidden)

    def _packed(self, weight: Tensor) -> LinearWeight:
        return self._ops.pack(LinearWeight(weight.to(device=self._device, dtype=self._dtype)))
