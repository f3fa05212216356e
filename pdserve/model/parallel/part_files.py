"""One part's share of a model's files, under the names of the whole.

Matrices that make heads or channels (q, k, v, gate, up) are cut by rows, those that take them (o,
down) by columns: the first need no word with the other parts, the second give sums that are added.
A bias behind such a sum is the first part's alone. The output layer is cut by rows too, not always
into equal parts. The rest is everybody's: norms, the embedding, the routers of experts. Files are
mapped, so of a plain matrix of theirs only the rows or columns of the part are ever read.
"""

from collections.abc import Iterable

from torch import Tensor

from pdserve.config import Quantization
from pdserve.errors import ConfigError
from pdserve.model.families.family import TensorNames
from pdserve.model.parallel.parts import Split
from pdserve.model.quantised import GROUP, QuantisedWeight
from pdserve.model.weights import WeightFiles

_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")
_HEAD = "lm_head"


class PartFiles:
    def __init__(
        self,
        files: WeightFiles,
        split: Split,
        part: int,
        names: TensorNames,
        quantization: Quantization,
    ) -> None:
        self._files = files
        self._split = split
        self._part = part
        self._rounds = quantization in ("int8", "int4")
        # An expert's matrices may have names of their own; those of a dense layer never do.
        self._by_rows = {*_BY_ROWS, _HEAD, names.expert_gate, names.expert_up}
        self._by_columns = {*_BY_COLUMNS, names.expert_down}

    def names(self) -> Iterable[str]:
        return [name for name in self._files.names() if not self._is_anothers(name)]

    def tensor(self, name: str) -> Tensor:
        whole = self._files.tensor(name)
        if self._module(name) in self._by_rows:
            rows = self._rows(name, whole.shape[0])
            return whole[rows.start : rows.stop]
        if self._module(name) in self._by_columns and name.endswith(".weight"):
            columns = self._share(name, whole.shape[1])
            return whole[:, columns.start : columns.stop]
        return whole

    def quantised(self, name: str) -> QuantisedWeight | None:
        """None also where a part ends within a group: that matrix is computed in bfloat16, which
        gives the same bits.

        Raises:
            ConfigError: the same where the weights are still to be rounded, which would give others
                than those of the whole matrix.
        """
        by_columns = self._module(name) in self._by_columns
        if by_columns and self._rounds:
            self._check_groups(name, self._files.tensor(name).shape[1])
        whole = self._files.quantised(name)
        if whole is None:
            return None
        blocks_OB, (output_count, channel_count) = whole.weight_OC, whole.shape
        if self._module(name) in self._by_rows:
            rows = self._rows(name, output_count)
            blocks_OB = blocks_OB[rows.start : rows.stop]
        elif by_columns:
            channels = self._share(name, channel_count)
            if len(channels) % GROUP:
                return None
            group_bytes = whole.format.block_bytes
            first, last = channels.start // GROUP, channels.stop // GROUP
            blocks_OB = blocks_OB[:, first * group_bytes : last * group_bytes].contiguous()
        return QuantisedWeight(blocks_OB, format=whole.format)

    def _check_groups(self, name: str, channel_count: int) -> None:
        """A matrix without whole groups is not rounded, in parts or not."""
        each = len(self._share(name, channel_count))
        if channel_count % GROUP == 0 and each % GROUP:
            raise ConfigError(
                f"model.quantization rounds weights in groups of {GROUP} channels, and a part of "
                f"{name} has {each}; take file or none, or another prefill.tensor_parallel and "
                "decode.tensor_parallel"
            )

    def _is_anothers(self, name: str) -> bool:
        """A bias of what is summed."""
        summed = self._module(name) in self._by_columns
        return summed and name.endswith(".bias") and self._part != 0

    def _module(self, name: str) -> str:
        return name.rpartition(".")[0].rpartition(".")[2]

    def _rows(self, name: str, count: int) -> range:
        if self._module(name) == _HEAD:
            return self._split.tokens_of_vocabulary(count, self._part)
        return self._share(name, count)

    def _share(self, name: str, count: int) -> range:
        parts = self._split.part_count
        if count % parts:
            raise ConfigError(f"{name} has {count} rows or columns, no multiple of {parts}")
        each = count // parts
        return range(each * self._part, each * (self._part + 1))
