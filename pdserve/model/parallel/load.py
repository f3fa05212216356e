"""One rank of a split model: its parts' weights, its share of the pool, the way to the others."""

import dataclasses
from collections.abc import Callable, Sequence

from pdserve.model.families.registry import FAMILIES
from pdserve.model.load import Prepared
from pdserve.model.parallel.group import Group
from pdserve.model.parallel.head import HeadOfParts
from pdserve.model.parallel.layers import LayersOfParts
from pdserve.model.parallel.part_files import PartFiles
from pdserve.model.parallel.parts import Split, part_of
from pdserve.model.parallel.pool import OtherRank, PartedPool
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.weights import Weights, build_weights


def load_rank(
    prepared: Prepared,
    split: Split,
    *,
    join: Callable[[], Group],
    others: Sequence[OtherRank] = (),
    before: Callable[[Sequence[Run]], None] | None = None,
    staging: memoryview | None = None,
) -> ModelRunner:
    """A runner of this rank's parts; with the others' in ``join``'s group its logits are the
    model's.

    Args:
        join: called once the weights are in memory.
        others: the ranks behind this one; for the first rank alone.
        staging: as ``PartedPool``'s.

    Raises:
        ConfigError: the model cannot be cut so, or its weights are not what it declares.
    """
    assert not prepared.adapters, "a configuration with both is refused"
    architecture, ops = prepared.architecture, prepared.ops
    part = part_of(architecture, split.part_count)
    parts = [_weights_of(prepared, split, index) for index in split.parts]
    pool = PartedPool(
        architecture,
        split,
        block_count=prepared.block_count,
        block_tokens=prepared.block_tokens,
        dtype=prepared.dtype,
        device=prepared.device,
        others=others,
        staging=staging,
    )
    group = join()
    return ModelRunner(
        architecture,
        parts[0],
        ops,
        pool,
        layers=LayersOfParts(ops, [weights.layers for weights in parts], part, group),
        head=HeadOfParts(
            ops, [weights.head for weights in parts], split, architecture.vocab_size, group
        ),
        before=before,
    )


def _weights_of(prepared: Prepared, split: Split, part: int) -> Weights:
    architecture = prepared.architecture
    names = FAMILIES[architecture.family].names
    weights = build_weights(
        part_of(architecture, split.part_count),
        PartFiles(prepared.files, split, part, names, prepared.quantization),
        prepared.ops,
        dtype=prepared.dtype,
        device=prepared.device,
        quantization=prepared.quantization,
        head_tokens=split.tokens_of_vocabulary(architecture.vocab_size, part),
    )
    if part != split.parts.start:
        # Who looks tokens up is the first part; the others' copies would be memory for nothing.
        return dataclasses.replace(weights, embedding=weights.head)
    return weights
