"""Coordinates within a block: which of its bytes are whose.

A block is [layer, k/v, kv head, token, dim]. Cut into equal *head groups*, one per part of a split
model (``parts``), and into ranges of layers, it falls into rectangles. A rectangle is named by its
coordinates, and not by who computes it: a rank has those of its parts, whatever the number of
ranks, so pools of different degrees share blocks, and each of their ranks moves its own rectangles
and nothing else. Heads that do not come out even are refused when a model is cut
(``parts.part_of``); no group is ever a part of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdserve.model.parallel.parts import Split

ByteArray = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Rectangle:
    layers: range
    group: int
    groups: int

    def of(self, piece: ByteArray) -> ByteArray:
        """Its bytes as a view [k/v of each layer, bytes of the group's heads].

        Args:
            piece: of a block, all head groups of exactly these layers.
        """
        return piece.reshape(2 * len(self.layers), self.groups, -1)[:, self.group]


def objects(split: Split, layers: range) -> Iterator[Rectangle]:
    """The rectangles of one rank in these layers, in the order of its parts."""
    for part in split.parts:
        yield Rectangle(layers, part, split.part_count)
