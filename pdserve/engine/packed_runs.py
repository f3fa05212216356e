"""A step's runs as bytes, for the other ranks of a split model: nothing but whole numbers.

count of runs · for each: tokens, start, blocks, wants_logits, draft_count · all tokens · all blocks
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from pdserve.model.runner import Run

_FIELDS = 5
_NUMBER = np.dtype("<i8")


def packed(runs: Sequence[Run]) -> bytes:
    numbers = [len(runs)]
    for run in runs:
        numbers += (
            *(len(run.tokens), run.start, len(run.blocks)),
            *(int(run.wants_logits), run.draft_count),
        )
    numbers += chain.from_iterable(run.tokens for run in runs)
    numbers += chain.from_iterable(run.blocks for run in runs)
    return np.array(numbers, dtype=_NUMBER).tobytes()


def unpacked(data: bytes) -> list[Run]:
    """What was ``packed``; the other end is our own process, so nothing is checked."""
    numbers = np.frombuffer(data, dtype=_NUMBER).tolist()
    ends = 1 + _FIELDS * numbers[0]
    fields = [numbers[at : at + _FIELDS] for at in range(1, ends, _FIELDS)]
    token, block = ends, ends + sum(length for length, *_ in fields)
    runs = []
    for length, start, block_count, wants_logits, draft_count in fields:
        runs.append(
            Run(
                numbers[token : token + length],
                start,
                numbers[block : block + block_count],
                bool(wants_logits),
                draft_count,
            )
        )
        token, block = token + length, block + block_count
    return runs
