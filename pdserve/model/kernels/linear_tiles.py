"""Tiles of the linear layers: which a launch takes, by its rows.

Tiles of 16 and of 32 rows are the work of one matrix instruction, so a row has the same bits in
either. For 64 rows and more Hopper and Blackwell have larger instructions, which promise no such
thing.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiles:
    """What a program works on at a time, and with how many hands."""

    rows: int
    outputs: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class TilesByRows:
    few: Tiles
    """For as many rows as it has, or fewer: what waits for weights."""

    many: Tiles
    large: Tiles
    """Not deterministic: see the top of this file."""

    def of(self, row_count: int, *, deterministic: bool) -> Tiles:
        if row_count <= self.few.rows:
            return self.few
        return self.many if deterministic or row_count <= self.large.rows // 2 else self.large
