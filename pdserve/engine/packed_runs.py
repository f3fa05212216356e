"""A step's runs as bytes, for the other ranks of a split model: nothing but whole numbers.

count of runs · for each: tokens, start, blocks, wants_logits, draft_count, reads_logits · all
tokens · all blocks

What is read of a run's logits is the first rank's to look at; others compute their part of them.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from pdserve.model.runner import Reader, Run

_FIELDS = 6
_NUMBER = np.dtype("<i8")
_LOOKS_AWAY = Reader(logits=lambda _: None)


def packed(runs: Sequence[Run]) -> bytes:
    numbers = [len(runs)]
    for run in runs:
        numbers += (
            *(len(run.tokens), run.start, len(run.blocks)),
            *(int(run.wants_logits), run.draft_count),
            int(run.reader is not None and run.reader.logits is not None),
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
    for length, start, block_count, wants_logits, draft_count, reads_logits in fields:
        runs.append(
            Run(
                numbers[token : token + length],
                start,
                numbers[block : block + block_count],
                bool(wants_logits),
                draft_count,
                reader=_LOOKS_AWAY if reads_logits else None,
            )
        )
        token, block = token + length, block + block_count
    return runs
