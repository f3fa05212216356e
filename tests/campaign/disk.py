"""Damage to the files of a disk tier, as bad hardware does it: bytes in another place."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.ssd.format import PAGE_BYTES, Kind, batch_bytes, batch_records
from tests.campaign.world import BLOCK_BYTES

KIND = Kind(BLOCK_BYTES, PayloadCodec.UNSTATED)
SWAPS = 20


def swap_records(directory: Path, chance: random.Random) -> None:
    """Let some pairs of payloads change places, in the segments of a node that is running."""
    for path in directory.glob("*.seg"):
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue  # its node has let it go
        try:
            offsets = list(_payloads(descriptor, int(path.stem)))
            for _ in range(SWAPS if len(offsets) > 1 else 0):
                one, other = chance.sample(offsets, 2)
                first = os.pread(descriptor, BLOCK_BYTES, one)
                second = os.pread(descriptor, BLOCK_BYTES, other)
                os.pwrite(descriptor, second, one)
                os.pwrite(descriptor, first, other)
        finally:
            os.close(descriptor)


def _payloads(descriptor: int, number: int) -> Iterator[int]:
    """Where the blocks are, as the pages before them say."""
    offset = PAGE_BYTES
    while named := batch_records(KIND, number, offset, os.pread(descriptor, PAGE_BYTES, offset)):
        yield from (record.offset for record in named)
        offset += batch_bytes(KIND, len(named))
