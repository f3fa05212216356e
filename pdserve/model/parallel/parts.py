"""How a model is cut: into equal *parts*, and which *rank* computes which of them.

A part has its share of the heads, of the feed-forward channels and of the vocabulary. A *rank* is a
process; it computes one part or several. What parts add to the residual is summed in their order,
one after the other, whoever computed them: so bits depend on the number of parts and not on that of
ranks, and pools with different ranks write KV blocks of the same bits as long as they cut alike.
"""

import dataclasses
import math
from dataclasses import dataclass

from pdserve.errors import ConfigError
from pdserve.model.architecture import Architecture, LayerKind


@dataclass(frozen=True, slots=True)
class Split:
    part_count: int = 1
    rank_count: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        assert self.part_count % self.rank_count == 0, f"{self}: ranks have equally many parts"
        assert 0 <= self.rank < self.rank_count, f"{self}: there is no such rank"

    @property
    def parts_per_rank(self) -> int:
        return self.part_count // self.rank_count

    @property
    def parts(self) -> range:
        """Of this rank."""
        first = self.rank * self.parts_per_rank
        return range(first, first + self.parts_per_rank)

    def tokens_of_vocabulary(self, vocab_size: int, part: int) -> range:
        """Whose logits a part computes: equally many, but for the last part, which has the rest."""
        width = -(-vocab_size // self.part_count)  # ceil
        return range(width * part, min(vocab_size, width * (part + 1)))


WHOLE = Split()


def part_of(architecture: Architecture, part_count: int) -> Architecture:
    """What one part looks like from inside; its vocabulary is still whole.

    Raises:
        ConfigError: heads or channels do not come out even.
    """
    divided = {"kv_head_count": architecture.kv_head_count}
    for kind in architecture.layers:
        if kind.experts is None:
            divided["ffn"] = architecture.ffn
        else:
            divided["experts' ffn"] = kind.experts.ffn
    uneven = [f"{name} is {count}" for name, count in divided.items() if count % part_count]
    if uneven:
        common = math.gcd(*divided.values())
        possible = [str(count) for count in range(1, common + 1) if common % count == 0]
        raise ConfigError(
            f"prefill.tensor_parallel and decode.tensor_parallel cut the model into {part_count} "
            f"parts (their least common multiple), but its {', its '.join(uneven)}; such a model "
            f"can have {', '.join(possible)}"
        )
    return dataclasses.replace(
        architecture,
        head_count=architecture.head_count // part_count,
        kv_head_count=architecture.kv_head_count // part_count,
        ffn=max(1, architecture.ffn // part_count),
        layers=tuple(_part_of_layer(kind, part_count) for kind in architecture.layers),
    )


def _part_of_layer(kind: LayerKind, part_count: int) -> LayerKind:
    if kind.experts is None:
        return kind
    experts = dataclasses.replace(kind.experts, ffn=kind.experts.ffn // part_count)
    return dataclasses.replace(kind, experts=experts)
